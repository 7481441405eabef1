"""OPERA against its definition: column scores, penalty, retrospection, and the cache behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy_tokenizer import small_tokenizer
from toys import TableModel, TableSession, ToyTransformer, reference

from steersman.core.array import to_numpy
from steersman.core.decode import BeamSearch, Opera, Sample
from steersman.core.decode.events import Event, Finished, Note, TokenEvent, Withdrawn
from steersman.core.decode.loop import decode
from steersman.core.decode.overtrust import grown_columns, overtrust, strongest_heads
from steersman.core.decode.retrospection import inherited
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, Temperature
from steersman.core.model import Capability, Forward, Model, Output, Plan
from steersman.core.ops import log_softmax

W = np.array(
    [
        [1.0, 0, 0, 0, 0],
        [0.6, 0.4, 0, 0, 0],
        [0.1, 0.8, 0.1, 0, 0],
        [0.05, 0.7, 0.05, 0.2, 0],
        [0.02, 0.75, 0.03, 0.1, 0.1],
    ]
)


def scores(weights: np.ndarray, sigma: float) -> np.ndarray:
    columns = np.empty(0)
    for i, row in enumerate(weights):
        columns = grown_columns(columns, row[: i + 1], sigma)
    return columns


# -- the formulas ----------------------------------------------------------------------------------


def test_worked_column_scores() -> None:
    columns = scores(W, 50)
    np.testing.assert_allclose(np.exp(columns), [18750, 1050000, 18.75, 50, 5], rtol=1e-9)
    assert columns[1] == pytest.approx(13.864301, abs=1e-6)
    penalty, column = overtrust(columns, window=512, scale=1e-7)
    assert column == 1 and penalty == pytest.approx(0.105, rel=1e-9)
    columns = scores(W, 5)
    np.testing.assert_allclose(np.exp(columns), [0.1875, 105, 0.01875, 0.5, 0.5], rtol=1e-9)
    assert overtrust(columns, window=512, scale=1e-7)[1] == 1
    assert overtrust(columns, window=3, scale=1e-7)[1] == 3  # of equal ones the first


def attention_like(n: int, seed: int) -> np.ndarray:
    weights = np.tril(np.random.default_rng(seed).random((n, n)))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_logarithms_equal_the_product(seed: int) -> None:
    weights = attention_like(12, seed)
    product = [np.prod(50 * weights[j:, j]) for j in range(12)]
    np.testing.assert_allclose(np.exp(scores(weights, 50)), product, rtol=1e-6)


@pytest.mark.parametrize("sigma", [1e-3, 50, 1e6])
def test_long_texts_stay_finite(sigma: float) -> None:
    columns = scores(attention_like(512, 0), sigma)
    penalty, _ = overtrust(columns, window=512, scale=1e-7)
    assert np.isfinite(columns).all() and 0 <= penalty <= 65504.1


def test_rows_are_the_strongest_heads_and_sum_to_one(lib: Any) -> None:
    rng = np.random.default_rng(0)
    attention = rng.random((3, 4, 2, 9)).astype(np.float32)
    got = to_numpy(strongest_heads(lib(attention)))
    strongest = attention[:, :, 1].max(axis=1)
    np.testing.assert_allclose(got.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(got, strongest / strongest.sum(-1, keepdims=True), rtol=1e-6)


def test_the_penalty_can_flip_a_choice() -> None:
    before, after = np.array([5.0, 4.8]), np.array([5.0, 4.8]) - np.array([2.0, 0.5])
    np.testing.assert_allclose(log_softmax(before), [-0.598, -0.798], atol=5e-4)
    np.testing.assert_allclose(after, [3.0, 4.3])
    np.testing.assert_allclose(log_softmax(after), [-1.541, -0.241], atol=5e-4)


# -- running it ------------------------------------------------------------------------------------

PROMPT = (0, 1, 2)
NEVER: dict[str, Any] = {"threshold": None}


def run(
    model: Model,
    strategy: Any,
    *,
    prompt: tuple[int, ...] = PROMPT,
    max_tokens: int = 8,
    eos: frozenset[int] | None = None,
    evidence: tuple[tuple[int, int], ...] = (),
    logprobs: int | None = None,
    sessions: Sessions | None = None,
) -> list[Event]:
    sessions = Sessions(model) if sessions is None else sessions
    request = Request(
        prompt=np.array(prompt),
        models=sessions.models,
        eos_ids=model.tokenizer.eos_ids if eos is None else eos,
        max_tokens=max_tokens,
        context=model.info.context,
        evidence=evidence,
        logprobs=logprobs,
    )
    return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(0)))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def toy(xp: Any = np, seed: int = 0) -> ToyTransformer:
    return ToyTransformer(xp, tokenizer=small_tokenizer(), seed=seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [1, 3])
def test_without_penalty_and_with_every_candidate_it_is_beam_search(seed: int, beams: int) -> None:
    model = toy(seed=seed)
    strategy = Opera(beams=beams, candidates=13, alpha=0, **NEVER)
    plain = run(model, BeamSearch(beams=beams), logprobs=0)
    found = run(model, strategy, logprobs=0)
    assert end(found).token_ids == end(plain).token_ids and end(found).reason == end(plain).reason
    ours = [e for e in found if isinstance(e, TokenEvent)]
    theirs = [e for e in plain if isinstance(e, TokenEvent)]
    for a, b in zip(ours, theirs, strict=True):
        assert a.raw_logprob == pytest.approx(b.raw_logprob, abs=1e-6)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def restricted_beam(
    model: ToyTransformer,
    width: int,
    few: int,
    length: int,
    penalty: Callable[[list[int], int], float] = lambda text, n: 0.0,
    full: bool = False,
) -> list[tuple[float, tuple[int, ...]]]:
    """Return the beams of a search over each beam's top candidates, from whole texts alone."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for step in range(length):
        found = []
        for score, text in beams:
            logits = reference(model, [*PROMPT, *text])[0][-1]
            logprobs = logits - np.log(np.exp(logits).sum())
            top = np.argsort(-logprobs, kind="stable")[: max(few, width) if step == 0 else few]
            adjusted = np.array(
                [logprobs[v] - penalty([*PROMPT, *text, int(v)], step + 1) for v in top]
            )
            if not full:
                adjusted = adjusted - np.log(np.exp(adjusted).sum())
            found += [(score + a, (*text, int(v))) for v, a in zip(top, adjusted, strict=True)]
        beams = sorted(found, key=lambda pair: -pair[0])[:width]
    return beams


@pytest.mark.parametrize("renormalise", ["candidates", "full"])
def test_few_candidates_are_a_beam_search_over_those(renormalise: Any) -> None:
    model = toy(seed=4)
    strategy = Opera(beams=2, candidates=3, alpha=0, renormalise=renormalise, **NEVER)
    expected = restricted_beam(model, 2, 3, 5, full=renormalise == "full")
    found = end(run(model, strategy, max_tokens=5, eos=frozenset()))
    assert found.token_ids == expected[0][1]


def exact_penalty(
    model: ToyTransformer, strategy: Opera, evidence: tuple[tuple[int, int], ...] = ()
) -> Callable[[list[int], int], float]:
    """Return alpha times the penalty of a text by the direct product over its whole attention."""

    def penalty(text: list[int], n: int) -> float:
        weights = reference(model, text)[2][-1].max(axis=0)
        weights = weights / weights.sum(axis=1, keepdims=True)
        if n <= strategy.bonus_steps:
            return -strategy.alpha * sum(weights[-1, a:b].sum() for a, b in evidence)
        response = weights[len(PROMPT) :, len(PROMPT) :]  # no column before the response
        columns = [np.prod(strategy.sigma * response[j:, j]) for j in range(n)]
        return float(strategy.alpha * strategy.scale * max(columns))

    return penalty


def test_bonus_and_penalty_equal_their_definition(lib: Any) -> None:
    """Evidence counts for the first tokens, column scores afterwards; both change the text."""
    evidence = ((0, 2), (2, 3))
    strategy = Opera(beams=2, candidates=3, alpha=4.0, sigma=3.0, scale=0.5, bonus_steps=3, **NEVER)
    changed = set()
    for seed in range(3 if lib.name == "numpy" else 1):
        model = toy(lib.xp, seed=seed)
        oracle = toy(seed=seed)
        penalty = exact_penalty(oracle, strategy, evidence)
        expected = restricted_beam(oracle, 2, 3, 7, penalty)
        found = end(run(model, strategy, max_tokens=7, eos=frozenset(), evidence=evidence))
        assert found.token_ids == expected[0][1]
        plain = run(model, replace(strategy, alpha=0), max_tokens=7, eos=frozenset())
        changed.add(found.token_ids != end(plain).token_ids)
    assert True in changed


def test_a_constant_penalty_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from steersman.core.decode import opera

    model = toy(seed=2)
    strategy = Opera(beams=3, candidates=3, bonus_steps=0, **NEVER)
    monkeypatch.setattr(opera, "overtrust", lambda columns, **_: (0.0, 0))
    none = end(run(model, strategy, eos=frozenset()))
    monkeypatch.setattr(opera, "overtrust", lambda columns, **_: (7.0, 0))
    assert end(run(model, strategy, eos=frozenset())).token_ids == none.token_ids


# -- retrospection ---------------------------------------------------------------------------------


class PointingModel(TableModel):
    """Attention that always goes to one position of the response (the newest before that)."""

    def __init__(self, column: int, **options: Any) -> None:
        super().__init__(**options)
        self.capabilities |= Capability.ATTENTIONS
        self.info = replace(self.info, layers=1, heads=1)
        self.column = column
        self.kept: list[list[int]] = []

    def session(self, *, max_rows: int = 1, needs: Any = Capability.NONE, context: Any = None):
        return PointingSession(self, max_rows=max_rows, needs=needs, context=self.info.context)


class PointingSession(TableSession):
    def _run(self, plan: Plan) -> Output:
        out = super()._run(plan)
        if not plan.attentions:
            self.model.kept.append(plan.base.tolist())  # type: ignore[attr-defined]
            return out
        at = len(PROMPT) + self.model.column  # type: ignore[attr-defined]
        weights = np.zeros((plan.batch, 1, plan.width, int(plan.end.max())), np.float32)
        for b, i in np.ndindex(plan.batch, plan.width):
            weights[b, 0, i, min(at, int(plan.positions[b, i]))] = 1
        return Output(logits=out.logits, attentions={0: weights})


def rewinds(events: list[Event]) -> list[dict[str, Any]]:
    return [e.values["rewind"] for e in events if isinstance(e, Note) and "rewind" in e.values]


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_retrospection_goes_back_behind_the_column_and_stays_bounded(beams: int) -> None:
    beta, r, limit = 3, 4, 30
    model = PointingModel(12, order=2, seed=1)
    strategy = Opera(beams=beams, candidates=3, threshold=r, max_rewinds=beta)
    events = run(model, strategy, max_tokens=limit, eos=frozenset())
    # Behind the column as often as allowed, then at the column, then never again.
    assert [note["to"] for note in rewinds(events)] == [13] * beta + [12] * beta
    assert len(end(events).token_ids) == limit
    assert model.calls["forward"] - 1 <= limit * (1 + beta)
    # Rewinding restores exactly the tokens before the position (one of them is fed again).
    assert [max(k) for k in model.kept[1:]] == [len(PROMPT) + 12] * beta + [len(PROMPT) + 11] * beta
    if beams == 1:
        rejected = [note["token"] for note in rewinds(events)]
        assert len(set(rejected[:beta])) == beta and len(set(rejected[beta:])) == beta
        assert end(events).token_ids[13] not in rejected[:beta]
        assert end(events).token_ids[12] not in rejected[beta:]


@pytest.mark.parametrize("r", [2, 5])
def test_it_triggers_after_more_than_r_entries(r: int) -> None:
    """The first entry is made when position 12 is chosen, and one more at each later position."""
    strategy = Opera(beams=2, candidates=2, threshold=r, max_rewinds=1)
    for limit, triggered in ((12 + r, False), (13 + r, True)):
        model = PointingModel(12, order=2, seed=1)
        assert bool(rewinds(run(model, strategy, max_tokens=limit, eos=frozenset()))) == triggered


def test_overlap_counter_is_strict() -> None:
    strategy = Opera(beams=1, first_column=0, threshold=4)
    history = [(3, 1, 1, 2, 1, 1, 1)]
    model = PointingModel(1)
    request = Request(
        prompt=np.array(PROMPT), models={"target": model}, eos_ids=frozenset(), max_tokens=99,
        context=256,
    )  # fmt: skip
    state, _ = strategy.init(request, Rng(0))
    state = replace(state, moments=state.moments * 8)
    assert strategy._back_to(state, history, [1]) == 2
    assert replace(strategy, threshold=5)._back_to(state, history, [1]) is None
    assert replace(strategy, first_column=2)._back_to(state, history, [1]) is None
    # Every beam must agree.
    assert strategy._back_to(state, [*history, (1, 1, 1)], [1, 1]) is None


def test_an_early_column_causes_no_retrospection() -> None:
    model = PointingModel(9, order=2, seed=1)
    strategy = Opera(beams=2, candidates=2, threshold=2)
    assert rewinds(run(model, strategy, max_tokens=30, eos=frozenset())) == []


def test_shown_text_is_withdrawn() -> None:
    model = PointingModel(12, order=1, sharpness=6.0, seed=1)
    strategy = Opera(beams=1, candidates=2, threshold=3, max_rewinds=1)
    events = run(model, strategy, max_tokens=24, eos=frozenset())
    (first, *_) = [e for e in events if isinstance(e, Withdrawn)]
    assert first.keep == 13
    shown: list[int] = []
    for event in events:
        if isinstance(event, Withdrawn):
            del shown[event.keep :]
        elif isinstance(event, TokenEvent):
            shown.append(event.id)
    assert tuple(shown) == end(events).token_ids


def test_going_back_restores_the_moment_ended_texts_included() -> None:
    (eos,) = small_tokenizer().eos_ids
    strategy = Opera(beams=2, candidates=4, threshold=3, max_rewinds=2, length_penalty=3.0)
    forgotten = 0
    for seed in range(6):
        model = PointingModel(12, order=2, sharpness=0.3, seed=seed)
        request = Request(
            prompt=np.array(PROMPT), models={"target": model}, eos_ids=frozenset({eos}),
            max_tokens=24, context=256,
        )  # fmt: skip
        before: dict[int, Any] = {}
        with model.session(max_rows=8, needs=strategy.requires["target"]) as session:
            state, step = strategy.init(request, Rng(0))
            while step.ask:
                out = session.forward(step.ask["target"])
                last = state.now.beams.done
                state, step = strategy.step(state, {"target": out}, Rng(0))
                if "rewind" in step.note:
                    to = step.note["rewind"]["to"]
                    assert state.position == to and state.now is before[to]
                    forgotten += last != state.now.beams.done
                before[state.position] = state.now
    assert forgotten


def test_history_follows_the_texts_unless_faithful() -> None:
    history = ((1, 2), (3, 4))
    assert inherited(history, [1, 1, 0], by_place=False) == ((3, 4), (3, 4), (1, 2))
    assert inherited(history, [1, 1, 0], by_place=True) == ((1, 2), (3, 4), (1, 2))


class Watched(Sessions):
    """Keeps the calls and the logits that follow each of them."""

    def prepare(self, strategy: Any, *, name: str) -> Any:
        found = super().prepare(strategy, name=name)
        session = found["target"]
        forward, self.rewound = session.forward, []

        def watch(ask: Forward) -> Output:
            out = forward(ask)
            plain = ask.rows is not None and not ask.attentions
            if plain or getattr(self, "after", False):
                rows = [session.row_tokens(row).tolist() for row in range(session.batch)]
                self.rewound.append((rows, np.array(to_numpy(out.logits))))
                self.after = plain
            return out

        session.forward = watch  # type: ignore[method-assign]
        return found


def assert_caches_are_fresh(watched: Watched, model: Model, tolerance: float) -> None:
    assert watched.rewound
    for rows, logits in watched.rewound:
        for row, got in zip(rows, logits, strict=True):
            with model.session() as session:
                fresh = session.forward(Forward(keep=0, tokens=np.array([row]))).logits
            assert np.abs(to_numpy(fresh)[0] - got).max() <= tolerance


EAGER: dict[str, Any] = {"threshold": 0, "first_column": 1, "max_rewinds": 2, "bonus_steps": 2}


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_after_going_back_equals_a_fresh_prefill(beams: int, lib: Any) -> None:
    rewound = 0
    for seed in range(2):
        model = toy(lib.xp, seed=seed)
        watched = Watched(model)
        strategy = Opera(beams=beams, candidates=3, **EAGER)
        events = run(model, strategy, max_tokens=10, eos=frozenset(), sessions=watched)
        rewound += len(rewinds(events))
        if rewinds(events):
            assert_caches_are_fresh(watched, model, 1e-4)
    assert rewound


def test_one_beam_with_one_candidate_is_greedy() -> None:
    model = toy(seed=1)
    strategy = Opera(beams=1, candidates=1, **NEVER)
    greedy = Sample(chain=Chain((Temperature(t=0),)))
    assert end(run(model, strategy)).token_ids == end(run(model, greedy)).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, r"opera: beams must be an integer, in 1..64"),
        ({"beams": 64, "candidates": 5}, r"opera: beams times candidates must be at most 256"),
        ({"sigma": 0}, r"opera: sigma must be in \(0,"),
        ({"max_rewinds": 16}, r"opera: max_rewinds must be an integer, in 0..15"),
        ({"renormalise": "no"}, r"opera: renormalise must be candidates or full, got 'no'"),
    ],
)
def test_bad_parameters_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Opera(**options)


# -- real weights --------------------------------------------------------------------------------


@pytest.mark.weights
def test_going_back_on_every_engine(engine_model: Model) -> None:
    prompt = tuple(engine_model.tokenizer.encode("Tom has a dog. The dog"))
    strategy = Opera(beams=2, candidates=2, **{**EAGER, "max_rewinds": 1})
    with Watched(engine_model, context=256) as watched:
        events = run(
            engine_model, strategy, prompt=prompt, max_tokens=5, evidence=((0, 4),),
            sessions=watched,
        )  # fmt: skip
        assert rewinds(events)
        watched.rewound = watched.rewound[:2]
        assert_caches_are_fresh(watched, engine_model, 1e-4)
