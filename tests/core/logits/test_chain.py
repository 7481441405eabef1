"""The chain: fused and step by step agree, on the host and on a device, on every library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import Library

from steersman.core.array import to_numpy
from steersman.core.errors import BackendError, UsageError
from steersman.core.logits import (
    DRAW_STAGES,
    DRAW_TOKEN,
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
V = 2_500


def ban_small_ids(token_ids, logits):
    """A processor in the manner of llama-cpp-python, which writes into what it is given."""
    logits[: len(token_ids)] = -np.inf
    return logits


CHAINS = {
    "plain": (),
    "temperature": (Temperature(t=0.7),),
    "llama.cpp": (
        Penalties(repetition=1.3, presence=0.2, frequency=0.1),
        Dry(multiplier=0.8, sequence_breakers=()),
        TopNSigma(n=3.0),
        TopK(k=40),
        TypicalP(p=0.9),
        TopP(p=0.95),
        MinP(p=0.05),
        XTC(threshold=0.1, probability=0.5),
        Temperature(t=0.8),
    ),
    "top_p first": (TopP(p=0.9), Temperature(t=1.5)),
    "top_p wide": (TopP(p=0.999), MinP(p=0.001)),
    "min_p": (Temperature(t=1.2), MinP(p=0.1)),
    "min_p wide": (MinP(p=1e-6), XTC(threshold=0.05, probability=1.0)),
    "top_k huge": (TopK(k=1_500), TopP(p=0.9)),
    "top_k beyond": (TopK(k=V + 5),),
    "typical": (TypicalP(p=0.6),),
    "sigma": (TopNSigma(n=1.0), Temperature(t=2.0)),
    "xtc first": (XTC(threshold=0.01, probability=0.7), MinP(p=0.02)),
    "late penalties": (TopK(k=50), Penalties(repetition=2.0, last_n=-1), TopP(p=0.8)),
    "bias": (LogitBias(bias={5: 3.0, 7: -INF, V - 1: 9.0}), MinP(p=0.05)),
    "processor": (Processor(function=ban_small_ids, convention="llamacpp"), TopK(k=20)),
    "mirostat": (Temperature(t=0.9), Mirostat(tau=3.0)),
    "greedy": (Temperature(t=0),),
    "greedy after": (Penalties(repetition=1.5), TopK(k=9), MinP(p=0.1), Temperature(t=0), TopP()),
    "greedy after xtc": (XTC(threshold=0.05, probability=1.0), Temperature(t=0)),
}


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Where the logits are said to be: the device path runs on the CPU as well."""
    if request.param == "device":
        monkeypatch.setattr("steersman.core.logits.chain.is_on_host", lambda x: False)
    return request.param


def logits_like_a_model(rng, rows, peaked=4.0):
    """Rows with a few likely tokens, ties, and a long tail."""
    x = rng.normal(0, 2, (rows, V)).astype(np.float32)
    x[:, :200] += rng.exponential(peaked, (rows, 200)).astype(np.float32)
    x[:, ::3] = np.round(x[:, ::3])
    return x


def histories(rng, rows):
    phrase = rng.integers(0, V, 6)
    return [
        np.concatenate([phrase, rng.integers(0, V, 5 * row), phrase[: 3 + row % 3]]).astype(
            np.int64
        )
        for row in range(rows)
    ]


def keyed(seed):
    def uniforms(row, draw):
        return float(np.random.default_rng([seed, row, draw]).random())

    return uniforms


@pytest.mark.parametrize("name", CHAINS)
def test_fused_equals_step_by_step(lib, place, name):
    chain, plain = Chain(CHAINS[name]), Chain(CHAINS[name], fused=False)
    rng = np.random.default_rng(7)
    for seed in range(2):
        x, history = logits_like_a_model(rng, 3), histories(rng, 3)
        asked = {"history": history, "uniforms": keyed(seed)}
        want = plain.select(lib(x), logprobs=3, **asked)
        got = chain.select(lib(x), logprobs=3, **asked)
        # Uniforms are fixed, so a rare draw within rounding of an edge would show here at once.
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.raw_logprobs, want.raw_logprobs, atol=1e-4)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
        for ours, theirs in zip(got.top, want.top):
            assert [i for i, _ in ours] == [i for i, _ in theirs]
            np.testing.assert_allclose([v for _, v in ours], [v for _, v in theirs], atol=1e-4)
        filtered, full = (to_numpy(c.apply(lib(x), **asked)) for c in (chain, plain))
        np.testing.assert_array_equal(filtered > -INF, full > -INF)
        np.testing.assert_allclose(filtered, full, rtol=1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_every_library_gives_the_same_tokens(name):
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    rng = np.random.default_rng(8)
    x, history = logits_like_a_model(rng, 4), histories(rng, 4)
    results = [
        Chain(CHAINS[name]).select(
            Library(library)(x), history=history, uniforms=keyed(1), logprobs=0
        )
        for library in ("numpy", "strict", "torch", "mlx")
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other.tokens, results[0].tokens)
        np.testing.assert_allclose(other.logprobs, results[0].logprobs, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "llama.cpp", "top_p wide", "late penalties"])
def test_a_row_is_the_same_alone_and_in_a_batch(lib, place, name):
    chain = Chain(CHAINS[name])
    rng = np.random.default_rng(9)
    x, history = logits_like_a_model(rng, 3), histories(rng, 3)
    together = chain.select(lib(x), history=history, uniforms=keyed(2))
    for row in range(3):
        alone = chain.select(
            lib(x[row : row + 1]),
            history=[history[row]],
            uniforms=lambda _, draw, row=row: keyed(2)(row, draw),
        )
        assert alone.tokens[0] == together.tokens[row]


STAGES = st.lists(
    st.one_of(
        st.builds(Temperature, t=st.sampled_from([0.5, 1.0, 1.7])),
        st.builds(TopK, k=st.integers(0, 12)),
        st.builds(TopP, p=st.floats(0.05, 1.0)),
        st.builds(MinP, p=st.floats(0.0, 0.9)),
        st.builds(TopNSigma, n=st.floats(0.0, 3.0)),
        st.builds(XTC, threshold=st.floats(0.01, 0.4), probability=st.sampled_from([0.0, 1.0])),
        st.builds(Penalties, repetition=st.floats(0.5, 2.0), presence=st.floats(-1, 1)),
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(STAGES, st.integers(0, 2**32 - 1))
def test_any_order_of_stages_gives_the_same_distribution(stages, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, (2, 60)).astype(np.float32)
    history = [rng.integers(0, 60, 20), rng.integers(0, 60, 3)]
    asked = {"history": history, "uniforms": keyed(0)}
    fused = Chain(tuple(stages)).apply(x, **asked)
    plain = Chain(tuple(stages), fused=False).apply(x, **asked)
    got, want = (scipy.special.softmax(y.astype(np.float64), axis=-1) for y in (fused, plain))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "llama.cpp", "top_p wide", "min_p"])
def test_tokens_follow_the_distribution(name):
    x = np.random.default_rng(10).normal(0, 1.2, (1, 300)).astype(np.float32)
    chain = Chain(tuple(s for s in CHAINS[name] if not isinstance(s, (XTC, Penalties, Dry))))
    probs = scipy.special.softmax(
        chain.apply(x, uniforms=lambda *_: 0.0).astype(np.float64), axis=-1
    )[0]
    draws = np.random.default_rng(11).random(2_000)
    n = len(draws)
    picked = chain.select(np.tile(x, (n, 1)), uniforms=lambda row, draw: draws[row]).tokens
    seen = np.bincount(picked, minlength=x.shape[1])
    assert seen[probs == 0].sum() == 0
    common = n * probs >= 5
    observed = np.append(seen[common], seen[~common].sum())
    expected = np.append(n * probs[common], n * probs[~common].sum())
    some = expected > 0
    assert some.sum() >= 8
    assert scipy.stats.chisquare(observed[some], expected[some]).pvalue > 0.001


def test_greedy_takes_the_first_of_equals_and_draws_nothing(lib, place):
    def forbidden(row, draw):
        raise AssertionError("greedy decoding drew a random number")

    x = np.array([[1.0, 5.0, 5.0], [2.0, -INF, 0.0]], np.float32)
    chain = Chain((TopP(p=0.5), Temperature(t=0)))
    assert chain.greedy
    got = chain.select(lib(x), uniforms=forbidden, logprobs=1)
    assert got.tokens.tolist() == [1, 0]
    assert got.logprobs.tolist() == [0.0, 0.0]
    assert got.raw_logprobs[0] == pytest.approx(-math.log(2 + math.exp(-4)), abs=1e-5)
    assert got.top[1][0] == (0, pytest.approx(-math.log(1 + math.exp(-2)), abs=1e-5))


def test_each_use_of_chance_has_its_own_key(lib, place):
    asked = []

    def uniforms(row, draw):
        asked.append((row, draw))
        return 0.25

    stages = (XTC(probability=0.5), TopK(k=0), XTC(probability=0.1), MinP(p=0.1))
    Chain(stages).select(lib(np.zeros((2, 8))), uniforms=uniforms)
    draws = (DRAW_TOKEN, DRAW_STAGES, DRAW_STAGES + 2)
    assert sorted(asked) == [(row, draw) for row in (0, 1) for draw in draws]


def test_logprobs_are_optional(lib, place):
    x = lib(np.random.default_rng(0).normal(0, 1, (2, 30)))
    without = Chain((TopK(k=3),)).select(x, uniforms=keyed(0))
    assert without.raw_logprobs is None
    assert without.logprobs is None
    assert without.top == ((), ())
    bare = Chain((TopK(k=3),)).select(x, uniforms=keyed(0), logprobs=0)
    assert bare.top == ((), ())
    assert bare.raw_logprobs.shape == bare.logprobs.shape == (2,)
    assert (bare.logprobs >= bare.raw_logprobs).all()
    assert bare.tokens.dtype == np.int64


def test_borrowed_logits_are_not_written():
    x = np.random.default_rng(0).normal(0, 1, (1, V)).astype(np.float32)
    x.flags.writeable = False
    before = x.copy()
    for stages in CHAINS.values():
        for fused in (True, False):
            chain = Chain(stages, fused=fused)
            chain.select(x, uniforms=keyed(0), history=[np.arange(9)], logprobs=2)
            got = chain.apply(x, uniforms=keyed(0), history=[np.arange(9)])
            assert not np.shares_memory(got, x) or not stages or not fused
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_unusable_logits_are_refused(lib, place, bad):
    x = np.zeros((2, 6), np.float32)
    x[1, 3] = bad
    with pytest.raises(BackendError, match="row 1"):
        Chain((TopK(k=2),)).select(lib(x), uniforms=keyed(0))
    x[1] = -INF
    with pytest.raises(BackendError, match="row 1 holds only -inf"):
        Chain().select(lib(x), uniforms=keyed(0))


def test_a_chain_that_leaves_nothing_says_so(lib, place):
    chain = (LogitBias(bias={0: -INF, 1: -INF}),)
    for fused in (True, False):
        with pytest.raises(BackendError, match="no token in row 0; check logit_bias"):
            Chain(chain, fused=fused).select(lib([[1.0, 2.0]]), uniforms=keyed(0))


def test_arguments_are_checked():
    chain = Chain((Penalties(repetition=2.0),))
    assert chain.needs_history
    assert chain.changes_argmax
    with pytest.raises(UsageError, match="1 rows but history has 0"):
        chain.select(np.zeros((1, 3), np.float32), uniforms=keyed(0))
    with pytest.raises(UsageError, match=r"must be \(B, V\)"):
        chain.select(np.zeros(3, np.float32), uniforms=keyed(0))
    with pytest.raises(UsageError, match="mirostat must be the last stage"):
        Chain((Mirostat(), TopK(k=3)))


def test_stages_behind_a_temperature_of_zero_are_passed_over():
    chain = Chain((Temperature(t=0), XTC(probability=1.0), Penalties(repetition=2.0)))
    assert [stage.name for _, stage in chain.active] == ["temperature"]
    assert not chain.needs_history


def zipf(size, exponent=1.1):
    return (-exponent * np.log(np.arange(1, size + 1)))[None].astype(np.float32)


@pytest.mark.parametrize("tau", [2.0, 4.0, 6.0])
@pytest.mark.parametrize("fused", [True, False])
def test_mirostat_holds_the_surprise_at_tau(tau, fused):
    chain = Chain((Mirostat(tau=tau, eta=0.1),), fused=fused)
    x, rng, state = zipf(5_000), np.random.default_rng(0), chain.init(1)
    surprise = []
    for _ in range(600):
        drawn = rng.random()
        got = chain.select(x, state=state, uniforms=lambda *_, u=drawn: u, logprobs=0)
        state = got.state
        surprise.append(-got.logprobs[0] / math.log(2))
    assert np.mean(surprise[100:]) == pytest.approx(tau, abs=0.15)


def test_mirostat_state_is_per_row_and_a_value(lib):
    chain = Chain((TopK(k=50), Mirostat(tau=3.0, eta=0.5)))
    x = np.tile(zipf(100), (2, 1))
    start = chain.init(2)
    first = start[1].copy()
    got = chain.select(lib(x), state=start, uniforms=lambda row, _: (0.1, 0.9)[row], logprobs=0)
    np.testing.assert_array_equal(start[1], first)
    mu = got.state[1]
    want = 6.0 - 0.5 * (-got.logprobs / math.log(2) - 3.0)
    np.testing.assert_allclose(mu, want)
    assert mu[0] != mu[1]
    np.testing.assert_array_equal(chain.rows(got.state, [1, 1, 0])[1], mu[[1, 1, 0]])
    by_hand = chain.observe(start, got.logprobs)
    np.testing.assert_array_equal(by_hand[1], mu)
