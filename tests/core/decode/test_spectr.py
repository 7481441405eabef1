"""Speculation with a draft model: exact laws by enumeration, caches, edges, and a large sample."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from rounds import fresh_logits, rounds
from toy_tokenizer import ToyTokenizer
from toys import TableModel, ToyTransformer

from steersman.core.decode import Sample
from steersman.core.decode.events import Event, Finished, Note, TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sample import begin
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.speculative.draft_model import fit
from steersman.core.decode.speculative.kseq import Choice, KSeq
from steersman.core.decode.speculative.spectr import SpecTr, Speculative, drafts_of, kseq_rule
from steersman.core.decode.speculative.tree import histories
from steersman.core.decode.speculative.verify import Target, target_at, walk
from steersman.core.decode.types import Request, Step, Token
from steersman.core.errors import CapabilityError, UsageError
from steersman.core.logits import Chain, Mirostat, Penalties, Temperature, TopP
from steersman.core.model import Capability, Forward, Model, Output

GREEDY = Chain((Temperature(t=0),))
PENALTY = Chain((Penalties(repetition=1.6, last_n=-1), Temperature(t=0.8)))
FILTERS = Chain((Temperature(t=1.3), TopP(p=0.7)))
CHAINS = {
    "plain": Chain(),
    "top-p": FILTERS,
    "penalty": PENALTY,
    "step by step": Chain(FILTERS.stages + PENALTY.stages, fused=False),
    "mirostat": Chain((Mirostat(tau=1.0, eta=0.5),)),
}
NONE: frozenset[int] = frozenset()


def letters(count: int) -> ToyTokenizer:
    """Return a vocabulary of ``count`` letters and nothing else."""
    return ToyTokenizer([bytes([97 + i]) for i in range(count)], controls=(), eos=(), bos=None)


def table(vocab: int, seed: int, order: int = 1, **options: Any) -> TableModel:
    return TableModel(order=order, seed=seed, tokenizer=letters(vocab), **options)


def request(
    models: Mapping[str, Model],
    *,
    prompt: Sequence[int] = (0,),
    max_tokens: int = 4,
    eos: frozenset[int] = NONE,
    context: int = 256,
    **options: Any,
) -> Request:
    return Request(
        prompt=np.array(prompt),
        models=models,
        eos_ids=eos,
        max_tokens=max_tokens,
        context=context,
        **options,
    )


def run(strategy: Any, target: Model, draft: Model, seed: int = 0, **options: Any) -> list[Event]:
    with Sessions({"target": target, "draft": draft}) as sessions:
        ready = sessions.prepare(strategy, name="t")
        asked = request(sessions.models, **options)
        return list(decode(strategy, ready, asked, Rng(seed)))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def notes(events: list[Event]) -> list[Mapping[str, Any]]:
    return [e.values for e in events if isinstance(e, Note)]


# -- exact laws: every outcome of every draw ------------------------------------------------------


class Script:
    """Replays decisions and notes what else could have been decided, to visit every outcome."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path: list[tuple[int, float, list[int]]] = []  # outcome, its chance, outcomes left
        self.at = 0

        def draw(target: Target, uniform: float) -> tuple[int, float]:
            place = self.decide(target.probs)
            token = place if target.ids is None else int(target.ids[place])
            return token, float(np.log(target.probs[place]))

        def choose(rule: KSeq, drafts: Sequence[int], uniforms: Any, last: float) -> Choice:
            assert len(drafts) == len(uniforms) == rule.k
            return Choice(token=self.decide(rule.law(drafts)))

        monkeypatch.setattr(Target, "draw", draw)
        monkeypatch.setattr(KSeq, "choose", choose)

    def decide(self, law: np.ndarray) -> int:
        if self.at == len(self.path):
            possible = np.flatnonzero(law > 0).tolist()
            self.path.append((possible[0], float(law[possible[0]]), possible[1:]))
        outcome, _, _ = self.path[self.at]
        self.path[self.at] = (outcome, float(law[outcome]), self.path[self.at][2])
        self.at += 1
        return outcome

    def every(self, outcome: Callable[[], tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Return the probability of every result of ``outcome``."""
        found: dict[tuple[int, ...], float] = {}
        while True:
            self.at = 0
            result = outcome()
            assert self.at == len(self.path)
            chance = float(np.prod([c for _, c, _ in self.path]))
            found[result] = found.get(result, 0.0) + chance
            while self.path and not self.path[-1][2]:
                self.path.pop()
            if not self.path:
                return found
            _, _, left = self.path.pop()
            self.path.append((left[0], 0.0, left[1:]))


def exact(
    model: TableModel, chain: Chain, prompt: Sequence[int], length: int, eos: frozenset[int] = NONE
) -> dict[tuple[int, ...], float]:
    """Return the law of plain sampling: every text of ``length`` tokens, or up to an end token."""
    found: dict[tuple[int, ...], float] = {}

    def grow(text: tuple[int, ...], chance: float, state: Any) -> None:
        if len(text) == length:
            found[text] = found.get(text, 0.0) + chance
            return
        history = np.array([*prompt, *text])
        logits = np.log(np.maximum(model.probs(history), 1e-30))[None].astype(np.float32)
        left = chain.apply(logits, uniforms=lambda r, d: 0.5, history=[history], state=state)[0]
        probs = np.exp(left.astype(np.float64) - left.max())
        probs /= probs.sum()
        for token in np.flatnonzero(probs):
            after = chain.observe(state, np.log(probs[token : token + 1]))
            if int(token) in eos:
                found[text] = found.get(text, 0.0) + chance * probs[token]
            else:
                grow((*text, int(token)), chance * probs[token], after)

    grow((), 1.0, chain.init(1))
    return found


def assert_same_law(got: Mapping[Any, float], expected: Mapping[Any, float]) -> None:
    assert sum(expected.values()) == pytest.approx(1, abs=1e-12)
    for text in {*got, *expected}:
        assert got.get(text, 0.0) == pytest.approx(expected.get(text, 0.0), abs=1e-12), text


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


# -- a large sample -------------------------------------------------------------------------------


class Direct:
    """Answers calls on a table model without a session, to draw many texts quickly."""

    def __init__(self, model: TableModel) -> None:
        self.model = model
        self.known: dict[int | None, np.ndarray] = {}
        self.rows: list[list[int]] = [[]]
        self.tree: list[list[int]] = []

    def forward(self, ask: Forward) -> Output:
        rows = [0] if ask.rows is None else [int(r) for r in ask.rows]
        fresh, answers = [], []
        for row, tokens in zip(rows, np.asarray(ask.tokens).tolist(), strict=True):
            kept = self.rows[row][: int(ask.keep)]
            if ask.path is not None:
                kept = kept + [self.tree[row][n] for n in ask.path[row]]
            answers.append([self.logits(token) for token in tokens])
            fresh.append((kept, tokens))
        self.rows = [kept if ask.parents is not None else kept + list(new) for kept, new in fresh]
        self.tree = [list(new) for _, new in fresh]
        logits = np.stack([np.stack(a) for a in answers])
        return Output(logits=logits if ask.logits == "all" else logits[:, -1])

    def logits(self, last: int) -> np.ndarray:
        """The next token depends on the last one alone."""
        if last not in self.known:
            self.known[last] = np.log(self.model.probs([last])).astype(np.float32)
        return self.known[last]


SAMPLES = int(os.environ.get("STEERSMAN_SAMPLES", "600"))
"""Texts per large sample; 20,000 take a minute each, and were drawn when this was written."""


@pytest.mark.parametrize("name", ["plain", "top-p", "penalty"])
def test_a_large_sample_follows_the_exact_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of texts of four tokens over eight letters.

    The enumerations above decide every draw themselves; here the random numbers do. The statistic
    is compared with its own standard deviation: a sound strategy exceeds four of them for about
    one seed in ten thousand, and the seeds are fixed.
    """
    remember(monkeypatch)
    chain = CHAINS[name]
    target, draft = table(8, seed=1, sharpness=1.2), table(8, seed=2, sharpness=1.2)
    strategy = SpecTr(drafts=2, length=3, chain=chain)
    asked = request({"target": target, "draft": draft})
    texts: Counter[tuple[int, ...]] = Counter()
    models = {"target": Direct(target), "draft": Direct(draft)}
    count = SAMPLES
    for seed in range(count):
        rng = Rng(seed)
        state, step = strategy.init(asked, rng)
        text: list[int] = []
        while step.finish is None:
            out = {role: models[role].forward(ask) for role, ask in step.ask.items()}
            state, step = strategy.step(state, out, rng)
            if step.edit is not None:
                text.extend(t.id for t in step.edit.tokens)
        texts[tuple(text)] += 1
    assert chi_square_excess(texts, exact(target, chain, (0,), 4), count) < 4


def remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute what depends on logits and text alone only once."""
    targets: dict[tuple[bytes, bytes], Target] = {}
    rules: dict[tuple[bytes, bytes, int], KSeq] = {}
    between = KSeq.between

    def known(progress: Any, chain: Chain, logits: np.ndarray, rng: Rng) -> Target:
        key = (logits.tobytes(), progress.history.tobytes())
        if key not in targets:
            targets[key] = target_at(progress, chain, logits.copy(), rng)
        return targets[key]

    def rule(p: np.ndarray, q: np.ndarray, k: int) -> KSeq:
        key = (p.tobytes(), q.tobytes(), k)
        if key not in rules:
            rules[key] = between(p, q, k)
        return rules[key]

    monkeypatch.setattr("steersman.core.decode.speculative.verify.target_at", known)
    monkeypatch.setattr("steersman.core.decode.speculative.draft_model.target_at", known)
    monkeypatch.setattr(KSeq, "between", rule)


def chi_square_excess(
    texts: Mapping[tuple[int, ...], int], law: Mapping[tuple[int, ...], float], count: int
) -> float:
    """Return how many standard deviations the statistic exceeds its mean; rare texts are pooled."""
    assert set(texts) <= {text for text, chance in law.items() if chance > 0}
    often = {text: chance for text, chance in law.items() if chance * count >= 5}
    cells = [(texts.get(text, 0), chance * count) for text, chance in often.items()]
    rest = 1 - sum(often.values())
    if rest * count >= 5:
        cells.append((count - sum(seen for seen, _ in cells), rest * count))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def test_the_large_sample_would_notice_a_wrong_law() -> None:
    target = table(8, seed=1, sharpness=1.2)
    law, wrong = exact(target, Chain(), (0,), 4), exact(target, CHAINS["top-p"], (0,), 4)
    rng, count = np.random.default_rng(0), 20_000
    for chances, noticed in ((law, False), (wrong, True)):
        drawn = rng.multinomial(count, list(chances.values()))
        texts = {text: int(n) for text, n in zip(chances, drawn, strict=True)}
        assert (chi_square_excess(texts, law, count) > 4) == noticed


# -- equalities ----------------------------------------------------------------------------------


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


# -- caches --------------------------------------------------------------------------------------


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


# -- edges ---------------------------------------------------------------------------------------


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


# -- pace ----------------------------------------------------------------------------------------


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
