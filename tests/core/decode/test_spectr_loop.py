"""Speculation with a draft model in the loop: caches, edges and pace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rounds import fresh_logits, rounds
from toy_tokenizer import ToyTokenizer
from toys import TableModel, ToyTransformer

from steersman.core.decode import Sample
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.speculative.spectr import SpecTr, Speculative
from steersman.core.decode.types import Step, Token
from steersman.core.errors import CapabilityError, UsageError

from .spectr_support import (
    GREEDY,
    NONE,
    end,
    letters,
    notes,
    request,
    run,
    table,
)

# -- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Speculative(length=3), SpecTr(drafts=3, length=3)])
def test_kept_caches_equal_a_fresh_start(strategy: Any) -> None:
    """At every round, the first logits from both kept caches equal those of the text anew."""
    target, draft = ToyTransformer(), ToyTransformer(seed=1)
    models = {"target": target, "draft": draft}
    asked = request(models, prompt=tuple(b"cached"), max_tokens=14)
    seen = Counter[str]()
    for seed in range(2):
        for made in rounds(strategy, models, asked, seed):
            if made.begins_round:
                expected = fresh_logits(models[made.role], made.text)
                np.testing.assert_allclose(made.first_logits, expected, atol=1e-12)
                seen[made.role] += 1
    assert seen["target"] > 10
    assert seen["draft"] > 8


@pytest.mark.parametrize("strategy", [Speculative, SpecTr])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_resuming_from_any_text(strategy: Any, after: int) -> None:
    """Rewound to a text of someone else's choice, the greedy continuation is that of the text."""
    target, draft = ToyTransformer(), ToyTransformer(seed=1)
    models = {"target": target, "draft": draft}
    made = strategy(length=3, chain=GREEDY)
    prompt, eos = tuple(b"resume"), NONE
    with Sessions(models) as sessions:
        ready = sessions.prepare(made, name="t")
        asked = request(sessions.models, prompt=prompt, max_tokens=12, eos=eos)
        state, step = made.init(asked, Rng(0))
        text: list[Token] = []

        def go(state: Any, step: Step, text: list[Token], until: int) -> tuple[Any, Step]:
            while step.finish is None and len(text) < until:
                out = {role: ready[role].forward(ask) for role, ask in step.ask.items()}
                state, step = made.step(state, out, Rng(0))
                if step.edit is not None:
                    del text[step.edit.keep :]
                    text.extend(step.edit.tokens)
            return state, step

        state, step = go(state, step, text, after + 1)
        for replaced in (after, 0, 3):
            # A token that was not chosen, so that neither cache holds it.
            text = [*text[:replaced], Token(id=(text[replaced].id + 1) % 200)]
            begun = tuple(t.id for t in text)
            state, step = made.resume(state, text, Rng(0))
            assert step.edit is None
            state, step = go(state, step, text, 9)
            expected = run(
                Sample(chain=GREEDY),
                target,
                draft,
                prompt=prompt + begun,
                max_tokens=9 - len(begun),
            )
            assert tuple(t.id for t in text)[:9] == begun + end(expected).token_ids
            text = text[:9]
            state, step = made.resume(state, text, Rng(0))  # to a known place


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Speculative(length=4), SpecTr(drafts=3, length=4)])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 7])
def test_no_more_tokens_than_asked_for(strategy: Any, most: int) -> None:
    model = table(8, seed=1)
    events = run(strategy, model, model, max_tokens=most)
    assert len(end(events).token_ids) == most
    assert end(events).reason == "length"
    if most == 1:
        assert model.calls["forward"] == 1


@pytest.mark.parametrize("strategy", [Speculative(length=4), SpecTr(drafts=3, length=4)])
def test_the_context_is_filled_and_never_overrun(strategy: Any) -> None:
    target, draft = table(8, seed=1, context=16), table(8, seed=2, context=16)
    for seed in range(5):
        events = run(strategy, target, draft, seed, prompt=(0, 1), max_tokens=14, context=16)
        assert len(end(events).token_ids) == 14


def test_drafts_stop_after_their_own_end_token() -> None:
    values = np.full((4, 3), 1 / 3)
    target = TableModel(table=values, tokenizer=letters(3))
    sure = np.zeros((4, 3))
    sure[:, 2] = 1  # drafts nothing but the end
    draft = TableModel(table=sure, tokenizer=letters(3))
    events = run(SpecTr(drafts=3, length=4), target, draft, max_tokens=30, eos=frozenset({2}))
    assert {note["drafted"] for note in notes(events)} <= {1}
    assert 2 not in end(events).token_ids
    # One call of the draft model per round: after its end token nothing is asked.
    assert draft.calls["forward"] == 1 + len(notes(events))


def test_rejected_drafts_are_noted() -> None:
    target, draft = table(8, seed=1), table(8, seed=2)
    (first, *_) = notes(run(SpecTr(drafts=3, length=3), target, draft, max_tokens=9))
    assert set(first) == {"drafted", "accepted", "rejected"}
    assert first["drafted"] - first["accepted"] >= len(first["rejected"]) > 0


def test_other_tokenizers_are_refused_before_anything_runs() -> None:
    target = table(5, seed=1)
    draft = TableModel(tokenizer=ToyTokenizer([b"a", b"b", b"X"], controls=(), eos=(), bos=None))
    message = (
        r"strategy spectr: models.draft \(toy-table on toy\) has another tokenizer than the "
        r"target \(toy-table on toy\): token 2 is 'X' against 'c'; give a draft model of the same"
    )
    with pytest.raises(CapabilityError, match=message):
        run(SpecTr(drafts=2), target, draft)
    assert target.calls["forward"] == draft.calls["forward"] == 0


def test_no_draft_model_is_refused_readably() -> None:
    with pytest.raises(
        CapabilityError, match=r"needs a model for role 'draft'.*models.draft of the profile"
    ):
        Sessions(table(5, seed=1)).prepare(Speculative(), name="speculative")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Speculative(length=0), r"speculative: length must be in 1\.\.64, got 0"),
        (lambda: SpecTr(drafts=65), r"spectr: drafts must be in 1\.\.64, got 65"),
        (lambda: SpecTr(drafts=64, length=64), r"spectr: drafts \* length must be at most 128"),
    ],
)
def test_bad_parameters_are_named(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


# -- pace ------------------------------------------------------------------------------------------


class Clock:
    """Seconds that calls of the two models are said to take."""

    def __init__(self, target: TableModel, draft: TableModel, cost: Callable[[int], float]) -> None:
        self.models, self.cost, self.draft_cost = (target, draft), cost, 0.0

    def __call__(self) -> float:
        target, draft = (m.calls for m in self.models)
        extra = target["tokens"] - target["forward"]
        return (
            target["forward"] * self.cost(1)
            + extra * (self.cost(2) - self.cost(1))
            + draft["forward"] * self.draft_cost
        )


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize(
    ("draft_cost", "slope", "alike", "pays"),
    [(0.05, 0.02, True, True), (1.0, 0.5, True, False), (0.1, 1.0, False, False)],
    ids=["cheap", "dear", "useless"],
)
def test_never_much_slower_than_plain_decoding(
    drafts: int, draft_cost: float, slope: float, alike: bool, pays: bool
) -> None:
    target = table(8, seed=1, context=600)
    draft = table(8, seed=1 if alike else 2, context=600, sharpness=1.5 if alike else 6.0)
    clock = Clock(target, draft, lambda width: 1 + slope * (width - 1))
    clock.draft_cost = draft_cost
    strategy = SpecTr(drafts=drafts, length=4, adaptive=True)
    events = run(strategy, target, draft, max_tokens=400, context=600, clock=clock)
    assert len(end(events).token_ids) == 400
    took = clock()  # plain decoding would take 400
    assert took < (240 if pays else 420)
