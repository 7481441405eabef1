"""The check of files from outside: child process, verdicts, safetensors headers."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf_files
import pytest

from steersman.backends.files import guard
from steersman.backends.files.guard import check_file
from steersman.backends.files.hf_folder import check_hf_folder, check_safetensors
from steersman.core.errors import InvalidInput, MissingFile
from steersman.core.locate import ModelSource


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path / "home"))


def _source(path: Path, **how: object) -> ModelSource:
    return ModelSource(name="x", kind="gguf", path=path, **how)  # type: ignore[arg-type]


def test_child_refuses_the_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    keys = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 63)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + keys)
    assert path.stat().st_size == 49
    with pytest.raises(InvalidInput, match="array of 9223372036854775808"):
        check_file(_source(path))


def test_llama_cpp_has_a_say(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = tmp_path / "headless.gguf"  # sound to our reader, no architecture for llama.cpp
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(40))
    with pytest.raises(InvalidInput, match="llama.cpp cannot open it") as caught:
        check_file(_source(path))
    assert "\n" not in str(caught.value)


def test_verdict_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    path = gguf_files.write_tokenizer_only(tmp_path / "sound.gguf")
    looks = []
    monkeypatch.setattr(guard, "_check_in_child", looks.append)
    check_file(_source(path))
    check_file(_source(path))
    assert looks == [path]
    os.utime(path, ns=(1, 1))
    check_file(_source(path))
    assert looks == [path, path]
    check_file(_source(tmp_path / "nowhere", trusted=True))


@pytest.mark.parametrize(
    ("code", "how"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"), ("exit(3)", "code 3")],
)
def test_a_crash_in_the_child_is_one_line(
    code: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {guard.sys.executable} -c "{code}"\n')
    fake.chmod(0o755)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(guard.sys, "executable", str(fake))
    with pytest.raises(InvalidInput, match=rf"test process failed \(.*{how}\)"):
        check_file(_source(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        check_file(_source(tmp_path / "absent.gguf"))


# -- safetensors -------------------------------------------------------------------------------


def _safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _entry(begin: int, end: int, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_of_the_library_pass(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    path = tmp_path / "a.safetensors"
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.int8), "c": np.ones((), "f2")}
    numpy.save_file(tensors, path, metadata={"format": "pt"})
    check_safetensors(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (struct.pack("<Q", 1 << 63), "truncated"),
        (_safetensors(b"{"), "not valid"),
        (_safetensors(b"[" * 100_000), "not valid"),
        (_safetensors([1]), "not a JSON object"),
        (_safetensors(b'{"a":1,"a":2}'), "twice"),
        (_safetensors({"a": 1}), "no description"),
        (_safetensors({"a": _entry(0, 8, dtype="Q9")}, bytes(8)), "unusable"),
        (_safetensors({"a": _entry(0, 8, shape=[-2])}, bytes(8)), "unusable"),
        (_safetensors({"a": _entry(0, 8, shape=[1 << 62, 4])}, bytes(8)), "does not fit"),
        (_safetensors({"a": _entry(0, 8)}, bytes(4)), "truncated"),
        (_safetensors({"a": _entry(0, 8), "b": _entry(4, 12)}, bytes(12)), "expected 8"),
        (_safetensors({"a": _entry(0, 8)}, bytes(16)), "holds 16"),
    ],
)
def test_refuses_a_bad_safetensors_header(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=message):
        check_safetensors(path)


def test_refuses_a_header_of_200_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # sparse
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    with pytest.raises(InvalidInput, match="header of 200000000 bytes") as caught:
        check_safetensors(path)
    assert "\n" not in str(caught.value)


def _folder(path: Path, config: object = None) -> Path:
    path.mkdir()
    value = {"model_type": "llama"} if config is None else config
    (path / "config.json").write_text(json.dumps(value))
    return path


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no such folder"):
        check_hf_folder(tmp_path / "absent")
    with pytest.raises(InvalidInput, match="model_type"):
        check_hf_folder(_folder(tmp_path / "untyped", {}))
    pickled = _folder(tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidInput, match=r"pickled \(pytorch_model.bin\)"):
        check_hf_folder(pickled)
    with pytest.raises(MissingFile, match="no safetensors"):
        check_hf_folder(_folder(tmp_path / "bare"))
    good = _folder(tmp_path / "good")
    (good / "model.safetensors").write_bytes(_safetensors({"a": _entry(0, 8)}, bytes(8)))
    check_hf_folder(good)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "m.bin"])
def test_an_index_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match="not a safetensors file in this folder"):
        check_hf_folder(folder)
