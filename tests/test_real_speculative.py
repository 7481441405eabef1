"""Prompt lookup and STAND on SmolLM2 and every engine: caches and texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steersman.core import generate
from steersman.core.api import encode_prompt
from steersman.core.array import to_numpy
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.speculative.prompt_lookup import PromptLookup
from steersman.core.decode.speculative.stand import STAND
from steersman.core.decode.speculative.tree import ask_again
from steersman.core.decode.types import Request
from steersman.core.logits import Chain, Temperature
from steersman.core.model import Model

pytestmark = pytest.mark.weights

LIST = "red apple, red pear, red plum, red apple, red pear, red plum, red apple, red"
GREEDY = Chain((Temperature(t=0),))


@pytest.mark.parametrize("name", ["prompt_lookup", "stand"])
def test_kept_drafts_leave_the_cache_of_a_fresh_start(name: str, engine_model: Model) -> None:
    model = engine_model
    strategy: Any = PromptLookup(chain=GREEDY, adaptive=False, length=4)
    if name == "stand":
        strategy = STAND(chain=GREEDY, adaptive=False, nodes=6, share="request")
    request = Request(
        prompt=encode_prompt(model.tokenizer, LIST),
        models={"target": model},
        eos_ids=model.tokenizer.eos_ids,
        max_tokens=16,
        context=256,
    )
    rng, rounds, accepted = Rng(0), 0, 0
    with Sessions(model, context=256) as sessions:
        session = sessions.prepare(strategy, name=name)["target"]
        state, step = strategy.init(request, rng)
        text = request.prompt
        while step.finish is None and rounds < 4:
            out = session.forward(step.ask["target"])
            logits = to_numpy(out.logits)
            root = logits[0, 0] if logits.ndim == 3 else logits[0]
            with model.session(context=256) as fresh:
                want = to_numpy(fresh.forward(ask_again(text, 0, text)).logits)[0]
            if model.info.batch_invariant and name == "prompt_lookup":
                np.testing.assert_array_equal(root, want)
            # llama.cpp sums attention over a cache with branches in another order.
            bound = 1.5 if model.info.backend == "llamacpp" else 2e-3
            assert np.abs(root - want).max() < bound
            assert int(root.argmax()) == int(want.argmax())
            state, step = strategy.step(state, {"target": out}, rng)
            assert step.edit is not None
            fed = [token.id for token in step.edit.tokens]
            accepted += len(fed) - 1
            text, rounds = np.append(text, fed), rounds + 1
    assert accepted >= 4


@pytest.mark.parametrize("profile", ["prompt-lookup", "stand"])
def test_drafted_text_is_the_plain_text(profile: str, engine_model: Model) -> None:
    fixed = {f"{profile.replace('-', '_')}.adaptive": False, "temperature.t": 0.0}
    plain = generate(engine_model, LIST, profile="greedy", max_tokens=12)
    found = generate(engine_model, LIST, profile=profile, max_tokens=12, overrides=fixed)
    assert found.token_ids == plain.token_ids
    assert found.timings.calls["target"] <= 8 < plain.timings.calls["target"]


def test_drafted_samples_are_the_plain_samples(llamacpp_model: Model, torch_model: Model) -> None:
    for model in (llamacpp_model, torch_model):
        assert model.info.batch_invariant
        for seed in range(2):
            plain = generate(model, LIST, profile="balanced", seed=seed, max_tokens=10)
            found = generate(
                model,
                LIST,
                profile="prompt-lookup",
                seed=seed,
                max_tokens=10,
                overrides={"prompt_lookup.adaptive": False},
            )
            assert found.token_ids == plain.token_ids
