"""Opening folders on torch: options, damage, and code that is never run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from steersman.backends.torch import open_model, versions
from steersman.core.errors import (
    InvalidInput,
    MissingDependency,
    MissingFile,
    UsageError,
)

from ..tiny_torch import hf_source


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float31"}, UsageError, "did you mean 'float32'"),
        ({"device": "gpu"}, UsageError, "--device 'gpu'"),
        ({"device": "cuda:99"}, MissingDependency, "CUDA devices"),
        ({"path": "natve"}, UsageError, "did you mean 'native'"),
        ({"threads": 0}, UsageError, "--threads"),
        ({"context": 513}, UsageError, "trained on 1..512"),
        ({"dtype": "q4"}, UsageError, "no GGUF"),
        ({"dtype": "float16", "path": "hf"}, UsageError, "float32 and bfloat16"),
        ({"setting": "fats"}, UsageError, "did you mean 'fast'"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny_folder: Callable[[str], Path],
) -> None:
    with pytest.raises(error, match=message):
        open_model(hf_source(tiny_folder("llama")), **options)


def test_native_path_says_why_not(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="sliding window"):
        open_model(hf_source(tiny_folder("mistral-window")), path="native")
    with pytest.raises(UsageError, match="Gemma3ForCausalLM"):
        open_model(hf_source(tiny_folder("gemma3")), path="native")


def _copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    table = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _drop(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state = {k: v.clone() for k, v in state.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("path", ["native", "hf"])
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_pickled, (InvalidInput, MissingFile), "pickled|safetensors"),
        (_index, InvalidInput, "other.safetensors"),
        (_truncate, InvalidInput, "safetensors"),
        (_drop, InvalidInput, "up_proj"),
        (lambda f: _edit(f, intermediate_size=95), InvalidInput, "shape"),
        (lambda f: _edit(f, num_hidden_layers=-3), InvalidInput, "num_hidden_layers.*-3"),
        (lambda f: _edit(f, architectures="x"), InvalidInput, "architectures"),
        (lambda f: (f / "config.json").write_text("[]"), InvalidInput, "config.json"),
        (lambda f: (f / "config.json").unlink(), MissingFile, "config.json"),
    ],
)
def test_damaged_folders_end_in_one_clear_line(
    damage: Callable[[Path], Any],
    error: Any,
    message: str,
    path: str,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = _copy(tiny_folder("llama"), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        open_model(hf_source(folder), path=path)
    assert "\n" not in str(caught.value)


def test_code_beside_a_model_is_never_run(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = _copy(tiny_folder("llama"), tmp_path / "remote")
    _edit(
        folder,
        architectures=["Evil"],
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((InvalidInput, UsageError)):
        open_model(hf_source(folder))
    assert not (tmp_path / "ran").exists()


def test_the_native_path_does_not_import_transformers(tiny_folder: Callable[[str], Path]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from steersman.backends.torch import open_model, versions; versions()\n"
        "assert 'torch' not in sys.modules\n"
        "from steersman.core.locate import ModelSource\n"
        f"open_model(ModelSource(name='x', kind='hf', path=Path({str(tiny_folder('llama'))!r})))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_versions() -> None:
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"]
