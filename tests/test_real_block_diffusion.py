"""Block diffusion on SmolLM2 and each engine: what holds for a model that was never adapted too."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.core import generate
from steersman.core.array import to_numpy
from steersman.core.decode import BlockDiffusion
from steersman.core.decode.rng import Rng
from steersman.core.decode.types import Request
from steersman.core.logits import Chain, Temperature
from steersman.core.model import Forward, Model

pytestmark = pytest.mark.weights

BEGUN = "Once upon a time"


def test_blocks_of_one_token_are_greedy_decoding(engine_model: Model) -> None:
    plain = generate(engine_model, BEGUN, profile="greedy", max_tokens=4, logprobs=2)
    blocks = generate(
        engine_model,
        BEGUN,
        profile="block-diffusion",
        max_tokens=4,
        logprobs=2,
        overrides={"block_diffusion.block_length": 1},
    )
    assert blocks.token_ids == plain.token_ids
    assert [t.raw_logprob for t in blocks.tokens] == [t.raw_logprob for t in plain.tokens]


def test_the_cache_after_every_block_equals_a_fresh_prefill(engine_model: Model) -> None:
    model = engine_model
    strategy = BlockDiffusion(
        block_length=4, threshold=0.1, credit={}, chain=Chain((Temperature(t=0),))
    )
    text = model.tokenizer.encode(BEGUN)
    request = Request(
        prompt=np.array(text),
        models={"target": model},
        eos_ids=frozenset(),
        max_tokens=9,
        context=64,
    )
    needs = strategy.requires["target"]
    commits = 0
    with model.session(needs=needs, context=64) as session:
        state, step = strategy.init(request, Rng(0))
        while not step.finish:
            ask = step.ask["target"]
            out = session.forward(ask)
            if ask.causal and ask.keep:
                assert ask.tokens is not None and ask.keep == len(text)
                text += np.asarray(ask.tokens)[0].tolist()
                commits += 1
                got = np.array(to_numpy(out.logits))
                with model.session(needs=needs, context=64) as fresh:
                    answer = fresh.forward(Forward(keep=0, tokens=np.array([text])))
                    want = np.array(to_numpy(answer.logits))
                tolerance = 0 if model.info.batch_invariant else 1e-3
                np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)
                assert session.row_tokens().tolist() == text
            state, step = strategy.step(state, {"target": out}, Rng(0))
    assert commits == 2
