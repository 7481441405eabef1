"""``Chain.explain`` against ``Chain.apply`` and the definitions, on every library."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steersman.core.array import to_numpy
from steersman.core.errors import BackendError, UsageError
from steersman.core.logits import (
    XTC,
    Chain,
    Dry,
    LogitBias,
    MinP,
    Mirostat,
    Penalties,
    Processor,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    TypicalP,
)

INF = math.inf
V = 60


def keyed(seed: int) -> Any:
    return lambda row, draw: float(np.random.default_rng([seed, row, draw]).random())


def revive(token_ids: Any, logits: Any) -> Any:
    """A processor that makes a removed token possible again."""
    logits[7] = 2.0
    return logits


STAGES = st.lists(
    st.one_of(
        st.builds(Temperature, t=st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        st.builds(TopK, k=st.integers(0, 12)),
        st.builds(TopP, p=st.floats(0.05, 1.0)),
        st.builds(MinP, p=st.floats(0.0, 0.9)),
        st.builds(TopNSigma, n=st.floats(0.0, 3.0)),
        st.builds(TypicalP, p=st.floats(0.1, 1.0)),
        st.builds(XTC, threshold=st.floats(0.01, 0.4), probability=st.sampled_from([0.5, 1.0])),
        st.builds(Penalties, repetition=st.floats(0.5, 2.0), presence=st.floats(-1, 1)),
        st.just(LogitBias(bias={3: 2.5, 5: -INF})),
        st.just(Processor(function=revive, convention="llamacpp")),
    ),
    max_size=5,
)


def check(trace: Any, stages: list[Any], x: Any, row: int, n: int, token: int, ask: Any) -> None:
    """Compare one row's account with distributions from ``apply`` on ever longer chains."""
    before = scipy.special.softmax(to_numpy(x).astype(np.float64), axis=-1)[row]
    described(trace["raw"], before, n, token)
    ranks = scipy.stats.rankdata(-to_numpy(x)[row], method="ordinal")
    assert trace["raw"]["rank"] == ranks[token]
    acting = Chain(tuple(stages)).active
    assert [s["name"] for s in trace["stages"]] == [stage.name for _, stage in acting]
    for (place, _), entry in zip(acting, trace["stages"]):
        filtered = to_numpy(Chain(tuple(stages[: place + 1])).apply(x, **ask))[row]
        after = scipy.special.softmax(filtered.astype(np.float64))
        described(entry, after, n, token)
        assert entry["removed"] == pytest.approx(before[after == 0].sum(), abs=2e-6)
        assert entry["tv"] == pytest.approx(np.abs(before - after).sum() / 2, abs=2e-6)
        kl = scipy.special.rel_entr(after, before).sum()
        if math.isinf(kl):
            assert entry["kl"] is None
        else:
            assert entry["kl"] == pytest.approx(kl, abs=3e-5)
        assert entry["argmax_changed"] == (before.argmax() != after.argmax())
        before = after


def described(entry: Any, probs: np.ndarray, n: int, token: int) -> None:
    assert entry["left"] == (probs > 0).sum()
    assert entry["entropy"] == pytest.approx(scipy.stats.entropy(probs), abs=2e-5)
    assert entry["p"] == pytest.approx(probs[token], abs=2e-6)
    order = np.argsort(-probs, kind="stable")[: min(n, entry["left"])]
    assert len(entry["top"]) == len(order)
    for (i, p), j in zip(entry["top"], order):
        assert p == pytest.approx(probs[j], abs=2e-6)
        assert probs[i] == pytest.approx(probs[j], abs=1e-7)  # equal tokens may stand either way


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(STAGES, st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_it_says_what_apply_does(lib: Any, stages: list[Any], seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = lib(rng.normal(0, 2, (2, V)))
    history = [rng.integers(0, V, 20), rng.integers(0, V, 3)]
    tokens = rng.integers(0, V, 2)
    ask = {"history": history, "uniforms": keyed(seed)}
    traces = Chain(tuple(stages)).explain(x, n=n, tokens=tokens, **ask)
    assert len(traces) == 2
    for row, trace in enumerate(traces):
        check(trace, stages, x, row, n, int(tokens[row]), ask)


@pytest.mark.parametrize("fused", [True, False])
def test_over_a_real_vocabulary_with_every_kind_of_stage(lib: Any, fused: bool) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0, 2, (3, 9_000)).astype(np.float32)
    values[:, :200] += rng.exponential(3, (3, 200)).astype(np.float32)
    x, history = lib(values), [rng.integers(0, 9_000, 40) for _ in range(3)]
    stages = [
        Penalties(repetition=1.3, presence=0.2),
        Dry(multiplier=0.8, sequence_breakers=()),
        MinP(p=1e-6),  # leaves more than the chain keeps as a short list
        TopK(k=300),
        XTC(threshold=0.02, probability=1.0),
        TopP(p=0.95),
        Temperature(t=0.8),
        Mirostat(tau=3.0),
    ]
    ask = {"history": history, "uniforms": keyed(1)}
    chain = Chain(tuple(stages), fused=fused)
    selection = chain.select(x, trace=4, logprobs=0, **ask)
    assert selection.tokens.tolist() == chain.select(x, **ask).tokens.tolist()
    for row, trace in enumerate(selection.traces):
        check(trace, stages, x, row, 4, int(selection.tokens[row]), ask)
        assert math.log(trace["raw"]["p"]) == pytest.approx(selection.raw_logprobs[row], abs=1e-4)
        last = trace["stages"][-1]
        assert math.log(last["p"]) == pytest.approx(selection.logprobs[row], abs=1e-4)
        assert json.loads(json.dumps(trace, allow_nan=False)) == trace


def test_what_a_strategy_did_comes_first(lib: Any) -> None:
    raw = np.log(np.array([[0.5, 0.3, 0.2]]))
    made = np.log(np.array([[0.1, 0.6, 0.3]]))
    (trace,) = Chain((TopK(k=2),)).explain(
        lib(made), uniforms=keyed(0), n=2, tokens=[1], raw=lib(raw), name="dola"
    )
    assert trace["raw"]["p"] == pytest.approx(0.3)
    assert trace["raw"]["rank"] == 2
    first, second = trace["stages"]
    assert first["name"] == "dola" and second["name"] == "top_k"
    assert first["tv"] == pytest.approx(0.4)
    assert first["kl"] == pytest.approx(
        0.1 * math.log(0.2) + 0.6 * math.log(2) + 0.3 * math.log(1.5), abs=1e-6
    )
    assert first["argmax_changed"] and not second["argmax_changed"]
    assert second["removed"] == pytest.approx(0.1)
    assert second["top"] == [[1, pytest.approx(2 / 3)], [2, pytest.approx(1 / 3)]]


def test_state_is_that_of_the_selection_and_nothing_is_drawn_twice(lib: Any) -> None:
    chain = Chain((Mirostat(tau=1.0, eta=1.0),))
    x = lib([[4.0, 2.0, 1.0, 0.0]])
    state = chain.init(1)
    lefts = []
    for _ in range(3):
        picked = chain.select(x, uniforms=lambda *_: 0.0, state=state, trace=0)
        filtered = to_numpy(chain.apply(x, uniforms=lambda *_: 0.0, state=state))
        lefts.append(picked.traces[0]["stages"][0]["left"])
        assert lefts[-1] == (filtered > -INF).sum()
        state = picked.state
    assert picked.traces[0]["stages"][0]["top"] == []
    assert lefts[-1] > lefts[0]


def test_nothing_is_computed_unasked(lib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.core.logits.chain.explain", None)
    assert Chain().select(lib(np.zeros((1, 3))), uniforms=keyed(0)).traces == ()


def test_limits_and_unusable_logits(lib: Any) -> None:
    chain = Chain((TopK(k=2),))
    with pytest.raises(UsageError, match=r"trace: must list 0\.\.100"):
        chain.explain(lib(np.zeros((1, 3))), uniforms=keyed(0), n=101)
    with pytest.raises(BackendError, match="row 0 holds nan"):
        chain.explain(lib([[math.nan, 0.0]]), uniforms=keyed(0))
    with pytest.raises(BackendError, match="no token in row 0"):
        Chain((LogitBias(bias={0: -INF, 1: -INF}),)).explain(lib([[1.0, 2.0]]), uniforms=keyed(0))
