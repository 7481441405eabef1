"""Block diffusion with credit, and what the stages of a chain see of a block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_toys import MaskedModel
from toys import ToyTransformer

from steersman.core.decode import BlockDiffusion
from steersman.core.logits import (
    Chain,
    LogitBias,
    Penalties,
    Processor,
    Temperature,
    TopK,
)

from .block_diffusion_support import (
    GREEDY,
    HELLO,
    drive,
    end,
    knowing,
    notes,
    request_for,
    run,
    steady,
)


@pytest.mark.parametrize("chain", [Chain(), GREEDY, Chain((Penalties(repetition=1.2), TopK(k=3)))])
def test_credit_without_weight_is_no_credit_at_every_step(chain: Chain) -> None:
    for seed in range(4):
        asked, plain = MaskedModel(seed=seed), MaskedModel(seed=seed)
        options: dict[str, Any] = {"block_length": 6, "threshold": 0.5, "chain": chain}
        for model, credit in ((asked, {"alpha": 0.0}), (plain, False)):
            run(model, BlockDiffusion(credit=credit, **options), prompt=(0,), max_tokens=18)
        assert asked.asked == plain.asked


def test_a_steady_block_is_committed_at_the_third_pass() -> None:
    """p = .8 never passes .9 by itself; with credit it has .902833 after three passes."""
    rule = {"alpha": 0.7, "beta": 0.8, "gamma": 0.2}
    options: dict[str, Any] = {"block_length": 8, "threshold": 0.9, "chain": GREEDY}
    model = MaskedModel(guess=steady(0.8))
    plain = run(model, BlockDiffusion(**options), prompt=(0,), max_tokens=16)
    assert [n["passes"] for n in notes(plain)] == [7, 7]
    credit = run(model, BlockDiffusion(credit=rule, **options), prompt=(0,), max_tokens=16)
    assert [n["passes"] for n in notes(credit)] == [3, 3], "each block begins without credit"
    assert end(credit).token_ids[1:8] == (0,) * 7
    # The smallest p that ever gets there is .727103; 40 positions leave time to.
    for p, reaches in ((0.7272, True), (0.7270, False)):
        strategy = BlockDiffusion(block_length=64, threshold=0.9, credit=rule, chain=GREEDY)
        events = run(MaskedModel(guess=steady(p)), strategy, prompt=(0,), max_tokens=64)
        assert (notes(events)[0]["passes"] < 63) == reaches


def test_credit_is_kept_within_a_block_only_and_forgotten_once_fixed() -> None:
    model = ToyTransformer()
    strategy = BlockDiffusion(block_length=6, algorithm="origin", credit={})
    session = model.session(needs=strategy.requires["target"])
    sizes = []
    for state, _, ask, _ in drive(strategy, model, session, request_for(model, HELLO, 18)):
        if ask.causal or state.block is None:
            continue
        held = state.block.credits.held
        sizes.append(len(held))
        assert all(1 <= len(row) <= state.block.passes for row in held.values())
        fresh = state.block.passes == 0
        assert fresh == (not held)
    assert sizes == [0, 5, 4, 3, 2] * 3


def test_tuning_free_credit_takes_a_first_plain_step() -> None:
    for seed in range(4):
        first = []
        for credit in ("tuning_free", False):
            model = MaskedModel(seed=seed)
            strategy = BlockDiffusion(block_length=6, threshold=0.4, credit=credit, chain=GREEDY)
            run(model, strategy, prompt=(0,), max_tokens=6)
            first.append(model.asked[:2])
        assert first[0] == first[1]


def test_forbidden_tokens_earn_no_credit() -> None:
    """Token 0 leads everywhere; a bias or a processor forbids it before credit is given."""

    def forbid(history: Any, logits: Any) -> Any:
        logits = np.array(logits)
        logits[..., 0] = -np.inf
        return logits

    for stage in (LogitBias(bias={0: -np.inf}), Processor(function=forbid, convention="llamacpp")):
        strategy = BlockDiffusion(block_length=6, credit={}, chain=Chain((stage, Temperature(t=0))))
        model = MaskedModel(guess=steady(0.8))
        session = model.session(needs=strategy.requires["target"])
        seen = set()
        for state, _, _, _ in drive(strategy, model, session, request_for(model, (1,), 12)):
            if state.block is not None:
                seen |= {v for row in state.block.credits.held.values() for v in row}
        assert seen == {1}


def test_stages_see_what_is_fixed_to_the_left() -> None:
    histories: list[list[int]] = []

    def watch(history: Any, logits: Any) -> Any:
        histories.append([int(t) for t in np.asarray(history).reshape(-1)])
        return logits

    chain = Chain((Processor(function=watch, convention="llamacpp"), Temperature(t=0)))
    strategy = BlockDiffusion(block_length=4, algorithm="origin", chain=chain)
    events = run(knowing(), strategy, prompt=(0,), max_tokens=4)
    assert end(events).token_ids == (1, 2, 3, 4)
    # The head's turn; three masked positions behind 1; then those that are left.
    assert histories == [[0], [0, 1], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_confidence_before_or_after_the_temperature() -> None:
    """At a low temperature every draw looks sure; the model's own confidence does not change."""
    options: dict[str, Any] = {"block_length": 8, "threshold": 0.9}
    chain = Chain((Temperature(t=0.2),))
    passes = []
    for tempered in (True, False):
        strategy = BlockDiffusion(tempered=tempered, chain=chain, **options)
        events = run(MaskedModel(guess=steady(0.8)), strategy, prompt=(0,), max_tokens=8)
        passes.append(notes(events)[0]["passes"])
    assert passes == [1, 7]
