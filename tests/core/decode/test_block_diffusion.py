"""Block diffusion on toys: exact distributions, what is certain, and how passes go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from block_toys import MASK, MaskedModel
from scipy import stats
from toys import ToyTransformer

from steersman.core.decode import BlockDiffusion, Sample
from steersman.core.decode.events import TokenEvent, Withdrawn
from steersman.core.decode.rng import Rng
from steersman.core.logits import (
    Chain,
    Penalties,
    TopP,
)

from .block_diffusion_support import (
    GREEDY,
    drive,
    end,
    knowing,
    notes,
    request_for,
    run,
)

ALGORITHMS = ("confidence_threshold", "origin", "entropy", "topk_margin")


# -- equal to sampling where it should be ----------------------------------------------------------


@pytest.mark.parametrize(
    "chain", [Chain(), GREEDY, Chain((Penalties(repetition=1.3), TopP(p=0.9)))]
)
def test_blocks_of_one_token_are_sampling(chain: Chain) -> None:
    model = ToyTransformer(layers=2)
    for seed in range(3):
        texts, calls = set(), []
        for strategy in (BlockDiffusion(block_length=1, chain=chain), Sample(chain=chain)):
            model.calls.clear()
            found = run(model, strategy, seed=seed, max_tokens=12, logprobs=2)
            shown = [(e.id, e.raw_logprob, e.logprob) for e in found if isinstance(e, TokenEvent)]
            texts.add(tuple(shown))
            calls.append(dict(model.calls))
        assert len(texts) == 1
        assert calls[0] == calls[1]


def test_blocks_of_one_token_need_nothing_but_logits() -> None:
    needs = BlockDiffusion(block_length=1).requires["target"]
    assert needs == Sample().requires["target"]
    assert needs in BlockDiffusion().requires["target"]


def test_samples_follow_the_models_joint_distribution() -> None:
    """Exact conditionals, one per pass, in an order that ignores what was drawn: exact texts."""
    model = MaskedModel(seed=3, sharpness=2.0)
    strategy = BlockDiffusion(block_length=3, algorithm="entropy")
    prompt, count = (0, 1), 600
    counts: dict[tuple[int, ...], int] = {}
    session = model.session(needs=strategy.requires["target"])
    for seed in range(count):
        *_, (state, _, _, out) = drive(
            strategy, model, session, request_for(model, prompt, 3), seed=seed
        )
        state, step = strategy.step(state, {"target": out}, Rng(seed))
        assert step.finish == "length"
        text = tuple(state.progress.history[len(prompt) :].tolist())
        counts[text] = counts.get(text, 0) + 1
    texts = all_texts(model, prompt, 3)
    assert set(counts) <= set(texts)
    expected, observed, rest = [], [], 0.0
    for text, p in texts.items():
        if p * count >= 5:
            expected.append(p * count)
            observed.append(counts.get(text, 0))
        else:
            rest += p * count
    expected.append(rest)
    observed.append(count - sum(observed))
    assert len(expected) > 15
    # Fixed seeds: a sound implementation fails once in ten thousand choices of them.
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4


def all_texts(
    model: MaskedModel, prompt: Sequence[int], length: int
) -> dict[tuple[int, ...], float]:
    """Return every text of ``length`` tokens and its probability; an end token ends none here."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        texts = {
            (*text, token): chance * float(p)
            for text, chance in texts.items()
            for token, p in enumerate(model.probs([*prompt, *text]))
            if p > 0
        }
    return texts


# -- a model that knows ----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("length", "parts"), [(1, 1), (2, 1), (4, 2), (6, 3), (8, 1), (32, 4)])
@pytest.mark.parametrize("shift", [True, False])
def test_a_model_that_knows_is_believed(
    algorithm: Any, length: int, parts: int, shift: bool
) -> None:
    model = knowing(shift=shift)
    for chain in (Chain(), GREEDY):
        strategy = BlockDiffusion(
            block_length=length,
            small_blocks=parts,
            algorithm=algorithm,
            label_shift=shift,
            chain=chain,
        )
        events = run(model, strategy, prompt=(0, 1), max_tokens=40, eos_ids=frozenset({12}))
        assert end(events).token_ids == tuple(range(2, 11))
        assert end(events).reason == "eos"
        cut = run(model, strategy, prompt=(0, 1), max_tokens=5, eos_ids=frozenset({12}))
        assert end(cut).token_ids == (2, 3, 4, 5, 6)
        assert end(cut).reason == "length"


def test_certain_blocks_take_one_pass_each() -> None:
    events = run(knowing(), BlockDiffusion(block_length=4), prompt=(0,), max_tokens=10)
    assert end(events).token_ids == tuple(range(1, 11))
    assert notes(events) == [
        {"block": 0, "passes": 1},
        {"block": 1, "passes": 1},
        {"block": 2, "passes": 1, "shortened": 2},
    ]
    # Passes, and two commits: nothing follows the last block.
    assert end(events).timings.calls == {"target": 5}


def test_an_end_token_ends_the_text_without_further_passes() -> None:
    model = knowing(length=3)  # 0 1 2 end
    strategy = BlockDiffusion(block_length=8, algorithm="origin", chain=GREEDY)
    events = run(model, strategy, prompt=(0,), max_tokens=30, eos_ids=frozenset({12}))
    assert end(events).token_ids == (1, 2)
    assert end(events).reason == "eos"
    # 2 and the end are fixed in two passes; the five positions after it never are.
    assert notes(events) == [{"block": 0, "passes": 2}]
    first = run(model, strategy, prompt=(0, 1, 2), max_tokens=30, eos_ids=frozenset({12}))
    assert end(first).token_ids == () and end(first).reason == "eos"
    assert notes(first) == [{"block": 0, "passes": 0}]


# -- passes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [Chain(), GREEDY])
def test_every_pass_fixes_something_and_touches_nothing_fixed(chain: Chain) -> None:
    model = MaskedModel(seed=1)
    for options in (
        {"threshold": 0.4},
        {"threshold": 0.4, "credit": {}},
        {"threshold": 0.4, "credit": "tuning_free", "small_blocks": 2},
        {"algorithm": "topk_margin", "small_blocks": 3},
        {"threshold": 0.5, "near_ties": 1e-5, "tempered": False},
    ):
        strategy = BlockDiffusion(block_length=6, chain=chain, **options)  # type: ignore[arg-type]
        model.asked.clear()
        events = run(model, strategy, prompt=(0, 1), max_tokens=15, seed=4)
        text = end(events).token_ids
        assert len(text) == 15 and MASK not in text
        for note in notes(events):
            length = note.get("shortened", 6)
            assert 1 <= note["passes"] <= length - 1
        assert sum(n["passes"] for n in notes(events)) == len(model.asked)
        begins = iter((0, 6, 12))
        before: tuple[int, ...] = ()
        for block in model.asked:
            if all(t == MASK for t in block[1:]):
                start = next(begins)
            else:
                assert sum(t == MASK for t in block) < sum(t == MASK for t in before)
                kept = [(a, b) for a, b in zip(before, block) if a != MASK]
                assert all(a == b for a, b in kept)
            before = block
            final = text[start : start + len(block)]
            assert all(t in (MASK, f) for t, f in zip(block, final, strict=True))


def test_small_blocks_are_finished_from_left_to_right() -> None:
    model = MaskedModel(seed=2)
    strategy = BlockDiffusion(block_length=6, small_blocks=3, threshold=-1, chain=GREEDY)
    events = run(model, strategy, prompt=(0, 1), max_tokens=6)
    assert notes(events) == [{"block": 0, "passes": 3}]
    assert [[t == MASK for t in block] for block in model.asked] == [
        [False, True, True, True, True, True],
        [False, False, True, True, True, True],
        [False, False, False, False, True, True],
    ]


@pytest.mark.parametrize("chain", [Chain(), GREEDY])
def test_a_threshold_of_one_is_one_per_pass_and_below_zero_all_at_once(chain: Chain) -> None:
    model = ToyTransformer()
    texts = {
        end(run(model, BlockDiffusion(block_length=6, chain=chain, **options), max_tokens=12))
        .token_ids
        for options in ({"threshold": 1.0}, {"algorithm": "origin"})
    }  # fmt: skip
    assert len(texts) == 1
    slow = run(model, BlockDiffusion(block_length=6, chain=chain, threshold=1.0), max_tokens=12)
    assert [n["passes"] for n in notes(slow)] == [5, 5]
    fast = run(model, BlockDiffusion(block_length=6, chain=chain, threshold=-0.1), max_tokens=12)
    assert [n["passes"] for n in notes(fast)] == [1, 1]


def test_shown_tokens_stand_and_appear_as_soon_as_they_do() -> None:
    """The prefix of a block that is fixed is shown before the block is finished."""
    vocab = 13

    def guess(before: Sequence[int], block: Sequence[int]) -> np.ndarray:
        sure = {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.7}  # fixed in the order 2, 3, 4, 1
        probs = np.full((len(block), vocab), 1e-9)
        for j in range(len(block)):
            probs[j] = (1 - sure.get(j, 0.5)) / vocab
            probs[j, j] += sure.get(j, 0.5)
        return probs

    strategy = BlockDiffusion(block_length=5, algorithm="origin", chain=GREEDY)
    events = run(MaskedModel(guess=guess), strategy, prompt=(0,), max_tokens=5)
    assert not [e for e in events if isinstance(e, Withdrawn)]
    assert end(events).token_ids[1:] == (1, 2, 3, 4)
    model, steps = MaskedModel(guess=guess), []
    session = model.session(needs=strategy.requires["target"])
    request = request_for(model, (0,), 10)
    for _, step, _, _ in drive(strategy, model, session, request):
        steps.append(0 if step.edit is None else len(step.edit.tokens))
    # The head's token; passes that fix 2, 3 and 4; the pass that fixes 1 shows all four.
    assert steps[:6] == [0, 1, 0, 0, 0, 4]
    mirrored = BlockDiffusion(block_length=5, small_blocks=5, chain=GREEDY)
    model = MaskedModel(guess=guess)
    session = model.session(needs=strategy.requires["target"])
    steps = [
        0 if step.edit is None else len(step.edit.tokens)
        for _, step, _, _ in drive(mirrored, model, session, request_for(model, (0,), 10))
    ]
    assert steps[:6] == [0, 1, 1, 1, 1, 1]
