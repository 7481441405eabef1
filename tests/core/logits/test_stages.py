"""Each stage equals its definition, written out as a loop over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steersman.core.array import to_numpy
from steersman.core.errors import UsageError
from steersman.core.logits import (
    STAGES,
    XTC,
    Chain,
    Context,
    LogitBias,
    Mirostat,
    Penalties,
    Stage,
    Temperature,
    TopK,
    apply_logit_bias,
    apply_min_p,
    apply_mirostat,
    apply_penalties,
    apply_temperature,
    apply_top_k,
    apply_top_n_sigma,
    apply_top_p,
    apply_typical_p,
    apply_xtc,
    build_stage,
    stage_class,
)
from steersman.core.logits.registry import stage_fields

BAND = 1e-5
INF = math.inf

# Logits on a coarse grid give many ties; removed tokens and single tokens occur as well.
VALUES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 30)),
    elements=st.one_of(
        st.floats(-8, 8, width=32), st.sampled_from([-INF, 0.0, 1.0, 1.0, 4.0, -2.0])
    ),
).map(lambda x: np.where(np.isinf(x).all(axis=-1, keepdims=True), np.float32(0), x))
few = settings(max_examples=30, deadline=None)


def by_rank(row):
    """Ids with a finite logit, most likely first, ties by id."""
    return sorted(np.flatnonzero(row > -INF).tolist(), key=lambda i: (-row[i], i))


def probabilities(row):
    return scipy.special.softmax(row.astype(np.float64))


def top_p_set(row, p):
    probs, total, keep = probabilities(row), 0.0, set()
    for i in by_rank(row):
        keep.add(i)
        total += probs[i]
        if total >= p:
            break
    return keep


def typical_set(row, p, nudge=0.0):
    probs = probabilities(row)
    surprise = {i: -math.log(probs[i]) for i in by_rank(row) if probs[i] > 0}
    expected = sum(probs[i] * s for i, s in surprise.items())
    total, keep = 0.0, set()
    for i in sorted(surprise, key=lambda i: (abs(surprise[i] - expected) + nudge * i, i)):
        keep.add(i)
        total += probs[i]
        if total >= p:
            break
    return keep


def n_sigma_set(row, n):
    alive = row[row > -INF].astype(np.float64)
    floor = alive.max() - n * alive.std()
    return {i for i in by_rank(row) if row[i] >= floor}


def min_p_set(row, p):
    probs = probabilities(row)
    return {i for i in by_rank(row) if probs[i] >= p * probs.max()}


def mirostat_set(row, mu):
    probs = probabilities(row)
    best = {i for i in by_rank(row) if row[i] == row.max()}
    return best | {i for i in by_rank(row) if -math.log2(max(probs[i], 1e-300)) <= mu}


def xtc_removed(row, threshold):
    likely = [i for i in by_rank(row) if probabilities(row)[i] >= threshold]
    return set(likely[:-1])


def kept(got, before):
    """Ids that survived; their logits must be as they were."""
    got = to_numpy(got)
    assert "float32" in str(got.dtype)
    alive = got > -INF
    np.testing.assert_array_equal(got[alive], before[alive])
    return [set(np.flatnonzero(row).tolist()) for row in alive]


def check_between(got, before, small, large):
    """Each row keeps at least ``small(row)`` and at most ``large(row)``."""
    for row, keep in zip(before, kept(got, before)):
        assert small(row) <= keep <= large(row)


@few
@given(VALUES, st.integers(1, 35))
def check_top_k(lib, x, k):
    for row, keep in zip(x, kept(apply_top_k(lib(x), k), x)):
        assert keep == set(by_rank(row)[:k])


@few
@given(VALUES, st.floats(0.01, 0.99))
def check_top_p(lib, x, p):
    got = apply_top_p(lib(x), p)
    check_between(got, x, lambda row: top_p_set(row, p - BAND), lambda r: top_p_set(r, p + BAND))


@few
@given(VALUES, st.floats(1e-4, 1))
def check_min_p(lib, x, p):
    got = apply_min_p(lib(x), p)
    check_between(
        got,
        x,
        lambda row: min_p_set(row, min(p * (1 + BAND), 1.0)),
        lambda row: min_p_set(row, p * (1 - BAND)),
    )


@few
@given(VALUES, st.floats(0.05, 0.95))
def check_typical_p(lib, x, p):
    # Distances that differ by rounding only may come in either order: leave such rows out.
    for row in x:
        if not typical_set(row, p, 1e-6) == typical_set(row, p) == typical_set(row, p, -1e-6):
            return
    got = apply_typical_p(lib(x), p)
    check_between(
        got, x, lambda row: typical_set(row, p - BAND), lambda row: typical_set(row, p + BAND)
    )


@few
@given(VALUES, st.floats(0.01, 5))
def check_top_n_sigma(lib, x, n):
    got = apply_top_n_sigma(lib(x), n)
    check_between(
        got,
        x,
        lambda row: n_sigma_set(row, n - 1e-4) | {by_rank(row)[0]},
        lambda row: n_sigma_set(row, n + 1e-4),
    )


@few
@given(VALUES, st.floats(0.1, 20))
def check_mirostat(lib, x, mu):
    got = apply_mirostat(lib(x), lib(np.full(len(x), mu)))
    check_between(
        got, x, lambda row: mirostat_set(row, mu - 1e-4), lambda row: mirostat_set(row, mu + 1e-4)
    )


@few
@given(VALUES, st.floats(0.0, 0.5), st.booleans())
def check_xtc(lib, x, threshold, active):
    alive = [set(by_rank(row)) for row in x]
    got = kept(apply_xtc(lib(x), threshold, lib(np.full(len(x), active), np.bool_)), x)
    for row, keep, before in zip(x, got, alive):
        removed = before - keep
        if not active:
            assert removed == set()
            continue
        options = [xtc_removed(row, t) for t in (threshold - 1e-6, threshold, threshold + 1e-6)]
        assert removed in options


@few
@given(VALUES, st.floats(0.05, 20))
def check_temperature(lib, x, t):
    got = to_numpy(apply_temperature(lib(x), t))
    np.testing.assert_allclose(got, x / t, rtol=1e-6)
    for row, keep in zip(x, kept(apply_temperature(lib(x), 0.0), x)):
        assert keep == {by_rank(row)[0]}


HISTORY = st.lists(st.integers(-1, 35), max_size=90)


@few
@given(
    VALUES,
    st.data(),
    st.floats(0.2, 4),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.sampled_from([-1, 0, 1, 5, 64]),
)
def check_penalties(lib, x, data, repetition, presence, frequency, last_n):
    history = [np.array(data.draw(HISTORY), np.int64) for _ in x]
    want = x.astype(np.float64)
    for row, tokens in zip(want, history):
        window = tokens.tolist() if last_n < 0 else tokens.tolist()[-last_n or len(tokens) :]
        for i in range(len(row)):
            count = window.count(i)
            if count and row[i] > -INF:
                row[i] = row[i] / repetition if row[i] > 0 else row[i] * repetition
                row[i] -= count * frequency + presence
    got = apply_penalties(
        lib(x),
        history,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        last_n=last_n,
    )
    np.testing.assert_allclose(to_numpy(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "check",
    [
        check_top_k,
        check_top_p,
        check_min_p,
        check_typical_p,
        check_top_n_sigma,
        check_mirostat,
        check_xtc,
        check_temperature,
        check_penalties,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_stage_equals_its_definition(lib, check):
    check(lib)


def test_logit_bias(lib):
    x = np.array([[1.0, 2.0, 3.0], [0.0, -INF, 4.0]], np.float32)
    got = to_numpy(apply_logit_bias(lib(x), {2: -INF, 0: 1.5, 1: 2.0}))
    np.testing.assert_array_equal(got, [[2.5, 4.0, -INF], [1.5, -INF, -INF]])
    with pytest.raises(UsageError, match=r"token id 3 is outside the vocabulary 0\.\.2"):
        apply_logit_bias(lib(x), {3: 1.0})


NEUTRAL = {
    "temperature": {"t": 1},
    "top_k": {"k": 0},
    "top_p": {"p": 1},
    "min_p": {"p": 0},
    "typical_p": {"p": 1},
    "top_n_sigma": {"n": 0},
    "xtc": {"probability": 0},
    "penalties": {},
    "dry": {"multiplier": 0},
    "logit_bias": {"bias": {}},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_parameters_change_nothing(lib, name):
    stage = build_stage(name, NEUTRAL[name])
    assert stage.off
    x = np.random.default_rng(0).normal(0, 3, (2, 50)).astype(np.float32)
    history = [np.array([1, 2, 1, 2, 1])] * 2
    for fused in (True, False):
        got = Chain((stage,), fused=fused).apply(lib(x), uniforms=lambda *_: 0.0, history=history)
        np.testing.assert_array_equal(to_numpy(got), x)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p", "top_n_sigma"])
def test_pure_functions_take_neutral_values(lib, name):
    functions = {
        "top_k": (apply_top_k, 0),
        "top_p": (apply_top_p, 1),
        "min_p": (apply_min_p, 0),
        "typical_p": (apply_typical_p, 1),
        "top_n_sigma": (apply_top_n_sigma, 0),
    }
    function, value = functions[name]
    x = np.array([[1.0, -INF, 0.5]], np.float32)
    np.testing.assert_array_equal(to_numpy(function(lib(x), value)), x)


RANGES = {
    "temperature": {"t": [-0.1, 10_001]},
    "top_k": {"k": [-1, 1.5, 2.0]},
    "top_p": {"p": [0, -1, 1.1]},
    "min_p": {"p": [-0.1, 2]},
    "typical_p": {"p": [0, 1.5]},
    "top_n_sigma": {"n": [-1]},
    "xtc": {"threshold": [-0.1, 1.1], "probability": [-0.1, 2]},
    "penalties": {
        "repetition": [0, -1, 101],
        "presence": [101],
        "frequency": [-101],
        "last_n": [-2, 1.5],
    },
    "dry": {
        "multiplier": [-1],
        "base": [0.5],
        "allowed_length": [0, 1.5],
        "penalty_last_n": [-2],
        "sequence_breakers": ["\n", [""], [3], 7],
    },
    "mirostat": {"tau": [0, 101], "eta": [0, 2]},
    "logit_bias": {"bias": [[1], {-1: 1}, {1: INF}, {1: 1001}, {True: 1}, {"": 1}, {1.5: 1}]},
}
UNREAL = [math.nan, INF, -INF, True, "0.5", None, [1]]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in RANGES for key in RANGES[name]])
def test_values_out_of_range_are_refused(name, key):
    for value in [*RANGES[name][key], *UNREAL]:
        with pytest.raises(UsageError) as caught:
            build_stage(name, {key: value})
        message = str(caught.value)
        assert message.startswith(f"{name}: "), value
        assert "\n" not in message


def test_every_parameter_is_range_checked():
    for name, cls in STAGES.items():
        if name == "processor":
            continue
        assert set(stage_fields(cls)) == set(RANGES[name]), name


def test_messages_name_stage_key_range_and_value():
    with pytest.raises(UsageError, match=r"^min_p: p must be in \[0, 1\], got 2$"):
        build_stage("min_p", {"p": 2})
    with pytest.raises(UsageError, match=r"^top_p: p must be in \(0, 1\], got nan$"):
        build_stage("top_p", {"p": math.nan})
    with pytest.raises(UsageError, match=r"^top_k: k must be an integer, at least 0, got '40'$"):
        build_stage("top_k", {"k": "40"})
    with pytest.raises(UsageError, match=r"^min_p\.q: unknown key, did you mean 'p'\?$|known: p"):
        build_stage("min_p", {"q": 0.1})
    with pytest.raises(UsageError, match=r"^min-p: unknown stage, did you mean 'min_p'\?$"):
        build_stage("min-p", {})
    with pytest.raises(UsageError, match=r"^temperature: parameters must be a mapping"):
        build_stage("temperature", 0.7)
    with pytest.raises(UsageError, match="unknown key"):
        build_stage("dry", {"breakers": {}})


def test_numpy_numbers_are_numbers():
    assert build_stage("temperature", {"t": np.float32(0.5)}).t == 0.5
    assert build_stage("top_k", {"k": np.int64(4)}).k == 4


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_values(name):
    params = {"function": print, "convention": "llamacpp"} if name == "processor" else {}
    stage = build_stage(name, params)
    assert stage == build_stage(name, params)
    assert stage.name == name
    assert type(stage) is stage_class(name)
    with pytest.raises(AttributeError):
        stage.anything = 1
    assert stage.__doc__


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (Temperature(t=0.7), False),
        (TopK(k=3), False),
        (build_stage("top_p"), False),
        (build_stage("min_p"), False),
        (build_stage("top_n_sigma"), False),
        (Mirostat(), False),
        (build_stage("typical_p", {"p": 0.3}), True),
        (XTC(probability=1.0), True),
        (Penalties(repetition=2.0), True),
        (LogitBias(bias={3: 5.0}), True),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_stages_say_whether_they_change_the_argmax(stage, changes):
    assert stage.changes_argmax is changes
    rng = np.random.default_rng(1)
    for _ in range(50):
        x = rng.normal(0, 1, (1, 12)).astype(np.float32)
        context = Context(
            history=[rng.integers(0, 12, 8)], uniforms=np.zeros(1), state=stage.init(1)
        )
        if stage(x, context).argmax() != x.argmax():
            assert changes
            break
    else:
        assert not changes


def test_a_package_can_add_a_stage(monkeypatch):
    class Shift(Stage):
        name = "shift"

    class Point:
        name = "shift"

        def load(self):
            return Shift

    class Wrong(Point):
        name = "wrong"
        value = "package:thing"

        def load(self):
            return print

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Wrong(), Point()])
    assert stage_class("shift") is Shift
    with pytest.raises(UsageError, match="package:thing is not a Stage"):
        stage_class("wrong")
    with pytest.raises(UsageError, match="did you mean 'shift'"):
        stage_class("shft")


def test_temperature_that_would_overflow_is_greedy(lib):
    x = lib([[3.0, 1.0, 3.0]])
    assert kept(apply_temperature(x, 1e-30), to_numpy(x)) == [{0}]


@pytest.mark.parametrize("name", ["top_k", "top_p", "typical_p", "top_n_sigma", "min_p"])
def test_truncations_work_on_any_leading_shape(lib, name):
    stage = build_stage(name, {"k": 3} if name == "top_k" else None)
    x = np.random.default_rng(2).normal(0, 2, (2, 3, 20)).astype(np.float32)
    got = to_numpy(stage(lib(x), Context()))
    for i in range(2):
        np.testing.assert_array_equal(got[i], to_numpy(stage(lib(x[i]), Context())))
