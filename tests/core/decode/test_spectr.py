"""Speculation with a draft model: exact laws by enumeration, and the equalities it promises."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from toys import ToyTransformer

from steersman.core.decode import Sample
from steersman.core.decode.events import TokenEvent
from steersman.core.decode.rng import Rng
from steersman.core.decode.sample import begin
from steersman.core.decode.speculative.draft_model import fit
from steersman.core.decode.speculative.spectr import SpecTr, Speculative, drafts_of, kseq_rule
from steersman.core.decode.speculative.tree import histories
from steersman.core.decode.speculative.verify import Target, target_at, walk
from steersman.core.logits import Chain
from steersman.core.model import Capability, Output

from .spectr_support import (
    CHAINS,
    FILTERS,
    GREEDY,
    Script,
    assert_same_law,
    end,
    exact,
    notes,
    request,
    run,
    table,
)

# -- exact laws: every outcome of every draw -------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "penalty"])
def test_two_positions_have_the_targets_joint_law(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random 3-state Markov pair, two drafts of two tokens, branch filtering and all."""
    chain = CHAINS[name]
    target, draft = table(3, seed=1), table(3, seed=2)
    begun = begin(request({"target": target, "draft": draft}, max_tokens=2), chain)

    def law_after(prefix: tuple[int, ...]) -> Target:
        history = np.append(begun.history, np.array(prefix, np.int64))
        logits = np.log(draft.probs(history)).astype(np.float32)
        return target_at(replace(begun, history=history), chain, logits, Rng(0))

    laws = {p: law_after(p) for p in [(), (0,), (1,), (2,)]}
    singles = {
        (a, b): laws[()].prob(a) * laws[(a,)].prob(b)
        for a, b in itertools.product(range(3), repeat=2)
    }
    script, total = Script(monkeypatch), Counter[tuple[int, ...]]()

    def outcome(pair: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        drafts = drafts_of(pair, laws)
        texts = [text.tolist() for text in histories(begun.history, drafts.tree)]
        logits = np.log([target.probs(text) for text in texts]).astype(np.float32)[None]
        out = Output(logits=logits)
        walked = walk(begun, drafts.tree, out, chain, Rng(0), kseq_rule(drafts))
        return tuple(t.id for t in walked.tokens)

    for pair in itertools.product(singles, repeat=2):
        weight = singles[pair[0]] * singles[pair[1]]
        for text, chance in script.every(partial(outcome, pair)).items():
            total[text] += weight * chance
    # Where the walk ended after one token, plain sampling gives the second.
    joint: Counter[tuple[int, ...]] = Counter()
    expected = exact(target, chain, (0,), 2)
    ones = exact(target, chain, (0,), 1)
    for text, chance in total.items():
        for b in range(3):
            if len(text) == 1:
                joint[(*text, b)] += chance * expected[(*text, b)] / ones[text]
        if len(text) == 2:
            joint[text] += chance
    assert any(len(text) == 2 for text in total)
    assert_same_law(joint, expected)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(
    "strategy", [Speculative(length=2), SpecTr(drafts=2, length=2)], ids=["one", "two"]
)
def test_whole_texts_have_the_targets_law(
    strategy: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every outcome of drafting and checking through the loop, over two letters."""
    chain = CHAINS[name]
    if name == "mirostat":  # its state must move along every path
        target, draft = table(2, seed=3, sharpness=0.7), table(2, seed=5, sharpness=0.7)
    else:
        target, draft = table(2, seed=3), table(2, seed=4)
    made = type(strategy)(**{**vars(strategy), "chain": chain})
    script = Script(monkeypatch)
    got = script.every(lambda: end(run(made, target, draft, max_tokens=4)).token_ids)
    assert_same_law(got, exact(target, chain, (0,), 4))


@pytest.mark.parametrize("strategy", [Speculative(length=3), SpecTr(drafts=2, length=3)])
def test_end_tokens_have_the_targets_law(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = table(2, seed=3), table(2, seed=4)
    eos = frozenset({1})
    script = Script(monkeypatch)
    got = script.every(lambda: end(run(strategy, target, draft, max_tokens=5, eos=eos)).token_ids)
    assert_same_law(got, exact(target, Chain(), (0,), 5, eos))


# -- equalities ------------------------------------------------------------------------------------


def test_spectr_with_one_draft_is_speculative_sampling() -> None:
    target, draft = table(8, seed=1, order=2), table(8, seed=2)
    for seed in range(20):
        one = run(Speculative(length=3), target, draft, seed, max_tokens=12)
        same = run(SpecTr(drafts=1, length=3), target, draft, seed, max_tokens=12)
        assert end(one).token_ids == end(same).token_ids
        assert notes(one) == notes(same)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_draft_like_the_target_is_always_accepted(k: int) -> None:
    model = table(8, seed=1, order=2)
    events = run(SpecTr(drafts=k, length=3), model, model, max_tokens=1 + 4 * 4)
    assert all(note["accepted"] == 3 for note in notes(events))
    assert end(events).timings.calls["target"] == 4  # each gives four tokens


@pytest.mark.parametrize("strategy", [Speculative, SpecTr])
def test_without_chance_the_text_is_greedy(strategy: Any) -> None:
    for seed in range(2):
        target, draft = ToyTransformer(seed=seed), ToyTransformer(seed=seed + 50)
        prompt = tuple(b"once upon")
        options: dict[str, Any] = {"prompt": prompt, "max_tokens": 14}
        plain = end(run(Sample(chain=GREEDY), target, draft, **options)).token_ids
        made = strategy(length=4, chain=GREEDY)
        assert made.requires["draft"] == Capability.LAST_LOGITS | Capability.ROLLBACK
        assert end(run(made, target, draft, **options)).token_ids == plain
        itself = run(made, target, target, **options)
        assert end(itself).token_ids == plain
        assert all(note["accepted"] == min(4, note["drafted"]) for note in notes(itself))


def test_tokens_carry_the_targets_logprobs() -> None:
    target, draft = table(8, seed=1, order=2), table(8, seed=2)
    events = run(SpecTr(drafts=3, length=3, chain=FILTERS), target, draft, logprobs=2, max_tokens=9)
    text = [0]
    for token in (e for e in events if isinstance(e, TokenEvent)):
        probs = target.probs(text)
        assert token.raw_logprob == pytest.approx(np.log(probs[token.id]), abs=1e-5)
        assert [a.id for a in token.top] == np.argsort(-probs)[:2].tolist()
        law = exact(target, FILTERS, text, 1)
        assert token.logprob == pytest.approx(np.log(law[(token.id,)]), abs=1e-5)
        text.append(token.id)


def test_models_of_different_libraries(lib: Any) -> None:
    """Logits come as arrays of each engine's own library; texts are those of one library."""
    prompt = tuple(b"two engines")
    for seed, chain in ((0, GREEDY), (1, Chain()), (2, FILTERS)):
        strategy = SpecTr(drafts=2, length=2, chain=chain)
        target, draft = ToyTransformer(), ToyTransformer(seed=1)
        here = run(strategy, target, draft, seed, prompt=prompt, max_tokens=6)
        there = run(strategy, ToyTransformer(lib.xp), draft, seed, prompt=prompt, max_tokens=6)
        assert end(here).token_ids == end(there).token_ids
        there = run(
            strategy, target, ToyTransformer(lib.xp, seed=1), seed, prompt=prompt, max_tokens=6
        )
        assert end(here).token_ids == end(there).token_ids


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_vocabularies_of_unequal_length(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that only one model has are never drafted; the law stays the target's."""
    target, draft = table(sizes[0], seed=1), table(sizes[1], seed=2)
    script = Script(monkeypatch)
    for drafts in (1, 2):
        made = SpecTr(drafts=drafts, length=1)
        got = script.every(lambda made=made: end(run(made, target, draft, max_tokens=3)).token_ids)
        assert_same_law(got, exact(target, Chain(), (0,), 3))
    shared = np.array([True, True, False])
    logits = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    assert fit(logits, shared).tolist() == [[1.0, 2.0, -np.inf]]
    assert fit(logits[:, :2], shared).tolist() == [[1.0, 2.0, -np.inf]]
