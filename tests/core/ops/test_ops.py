"""Array operations against brute force, and their twins against the portable form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steersman.core.array import asarray_like, to_numpy
from steersman.core.ops import (
    categorical,
    cumulative_sum,
    entropy,
    js_divergence,
    kl_divergence,
    log_softmax,
    logsumexp,
    mask_out,
    relative_probs,
    smallest_set,
    softmax,
    sum_before,
    target_logprobs,
    token_logprobs,
    top_k,
)
from steersman.core.ops.categorical import draw_1d
from steersman.core.ops.scatter import put_at, take_at

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.one_of(
        st.floats(-20, 20, width=32),
        st.sampled_from([-math.inf, 0.0, -0.0, 1.0, 2.0, -3.0]),  # ties and removed tokens
    ),
)
few = settings(max_examples=30, deadline=None)


def portable(function):
    return getattr(function, "portable", function)


@few
@given(ROWS)
def check_softmax(lib, values):
    x = lib(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = scipy.special.log_softmax(values.astype(np.float64), axis=-1)
        total = scipy.special.logsumexp(values.astype(np.float64), axis=-1)
    empty = np.isinf(values).all(axis=-1)
    want[empty] = -np.inf
    probs = np.exp(want)
    for name, got, expected in (
        ("log_softmax", log_softmax(x), want),
        ("logsumexp", logsumexp(x), total),
        ("logsumexp portable", portable(logsumexp)(x), total),
        ("keepdims", logsumexp(x, keepdims=True), total[:, None]),
        ("softmax", softmax(x), probs),
        ("relative", relative_probs(x), np.where(empty[:, None], 0, probs / _peak(probs))),
    ):
        assert "float32" in str(got.dtype), name
        np.testing.assert_allclose(to_numpy(got), expected, atol=2e-5, rtol=2e-5, err_msg=name)


def _peak(probs):
    top = probs.max(axis=-1, keepdims=True)
    return np.where(top > 0, top, 1)


def test_softmax(lib):
    check_softmax(lib)


def test_sums_over_a_vocabulary_stay_accurate(lib):
    values = np.random.default_rng(0).normal(0, 3, (2, 49_152)).astype(np.float32)
    want = scipy.special.logsumexp(values.astype(np.float64), axis=-1)
    np.testing.assert_allclose(to_numpy(logsumexp(lib(values))), want, atol=2e-6)
    np.testing.assert_allclose(to_numpy(softmax(lib(values))).sum(axis=-1), 1, atol=2e-6)


def test_softmax_of_large_logits_does_not_overflow(lib):
    x = lib([[1e38, -1e38, 0.0]])
    np.testing.assert_array_equal(to_numpy(softmax(x)), [[1, 0, 0]])
    np.testing.assert_allclose(to_numpy(logsumexp(x)), [1e38])


def brute_top_k(row, k):
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@few
@given(ROWS, st.integers(1, 45))
def check_top_k(lib, values, k):
    want = np.array([brute_top_k(row, k) for row in values])
    for form in (top_k, top_k.portable):
        got, indices = form(lib(values), k)
        np.testing.assert_array_equal(to_numpy(indices), want)
        np.testing.assert_array_equal(to_numpy(got), np.take_along_axis(values, want, axis=-1))
        assert to_numpy(indices - 100).max() < 0


def test_top_k(lib):
    check_top_k(lib)


@pytest.mark.parametrize("kind", ["smooth", "rounded", "rising", "equal", "sparse"])
@pytest.mark.parametrize("k", [1, 40, 256, 2000])
def test_top_k_of_a_vocabulary(lib, kind, k):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 3, (2, 30_011)).astype(np.float32)
    if kind == "rounded":
        values = np.round(values)
    elif kind == "rising":
        values = np.sort(values, axis=-1)
    elif kind == "equal":
        values[:] = 1.0
    elif kind == "sparse":
        values[:, 100:] = -np.inf
    got, indices = top_k(lib(values), k)
    want = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(to_numpy(indices), want)
    np.testing.assert_array_equal(to_numpy(got), np.take_along_axis(values, want, axis=-1))


def test_top_k_of_one_row(lib):
    values, indices = top_k(lib([1.0, 3.0, 3.0, 2.0]), 3)
    assert to_numpy(values).tolist() == [3, 3, 2]
    assert to_numpy(indices).tolist() == [1, 2, 3]


def brute_smallest_set(key, weights, share):
    goal, total, keep = share * math.fsum(weights), 0.0, []
    for i in brute_top_k(key, len(key)):
        keep.append(i)
        total += float(weights[i])
        if total >= goal:
            break
    return set(keep)


@few
@given(ROWS, st.floats(0.01, 1.0))
def check_smallest_set(lib, key, share):
    weights = np.abs(np.nan_to_num(key, neginf=0.0)) + np.float32(0.25)
    lower = [brute_smallest_set(k, w, share - 1e-5) for k, w in zip(key, weights)]
    upper = [brute_smallest_set(k, w, share + 1e-5) for k, w in zip(key, weights)]
    order = np.argsort(-key, axis=-1, kind="stable")
    for form in (smallest_set, smallest_set.portable):
        got = to_numpy(form(lib(key), lib(weights), share))
        for row, low, high in zip(got, lower, upper):
            assert low <= set(np.flatnonzero(row).tolist()) <= high
        by_rank = form(
            lib(np.take_along_axis(key, order, -1)),
            lib(np.take_along_axis(weights, order, -1)),
            share,
            ordered=True,
        )
        np.testing.assert_array_equal(to_numpy(by_rank), np.take_along_axis(got, order, -1))


def test_smallest_set(lib):
    check_smallest_set(lib)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_smallest_set_of_a_vocabulary_needs_no_full_sort(scale, share):
    rng = np.random.default_rng(1)
    key = np.round(rng.normal(0, 1, (2, 30_011)) * scale, 3).astype(np.float32)
    weights = np.exp(key)
    got = smallest_set(key, weights, share)
    want = smallest_set.portable(key, weights, share)
    # Sums in another order may differ in the last bit, which moves the cut by one entry at most.
    assert (got != want).sum(axis=-1).max() <= 1
    assert (got.sum(axis=-1) < key.shape[-1]).all() or share == 1.0


@few
@given(ROWS, st.floats(0, 1))
def check_categorical(lib, values, uniform):
    draws = np.full(len(values), uniform)
    for form in (categorical, categorical.portable):
        got = to_numpy(form(lib(values), draws)).tolist()
        for row, index in zip(values.astype(np.float64), got):
            if np.isinf(row).all():
                assert index == -1
                continue
            probs = scipy.special.softmax(row)
            assert row[index] > -np.inf
            below, above = probs[:index].sum(), probs[: index + 1].sum()
            assert below - 1e-5 <= uniform <= above + 1e-5


def test_categorical(lib):
    check_categorical(lib)


@pytest.mark.parametrize("size", [5, 600, 2_000])
def test_categorical_never_returns_a_removed_entry(lib, size):
    values = np.full((4, size), -np.inf, np.float32)
    values[:, 2] = 0.0
    values[:, size // 2] = 1.0
    for uniform in (0.0, 1e-300, 0.5, 1 - 2**-53, 1.0):
        for form in (categorical, categorical.portable):
            got = to_numpy(form(lib(values), np.full(4, uniform)))
            assert np.isin(got, [2, size // 2]).all()
    first, last = (to_numpy(categorical(lib(values), np.full(4, u))) for u in (0.0, 1.0))
    assert (first == 2).all()
    assert (last == size // 2).all()


def test_categorical_frequencies(lib):
    rng = np.random.default_rng(3)
    logits = np.array([0.0, 1.0, -np.inf, 2.0, -1.0, 0.5], np.float32)
    n = 4_000
    got = to_numpy(categorical(lib(np.tile(logits, (n, 1))), rng.random(n)))
    seen = np.bincount(got, minlength=6)
    assert seen[2] == 0
    expected = n * scipy.special.softmax(logits.astype(np.float64))
    some = expected > 0
    assert scipy.stats.chisquare(seen[some], expected[some]).pvalue > 0.001


def test_draws_over_a_vocabulary_follow_the_cumulative_distribution():
    rng = np.random.default_rng(4)
    for scale in (0.0, 1.0, 4.0):
        logits = (rng.normal(0, 1, 10_007) * scale).astype(np.float32)
        probs = scipy.special.softmax(logits.astype(np.float64))
        edges = np.concatenate([[0.0], np.cumsum(probs)])
        for uniform in rng.random(200):
            index, logprob = draw_1d(logits, uniform)
            assert edges[index] - 1e-6 <= uniform <= edges[index + 1] + 1e-6
            assert logprob == pytest.approx(math.log(probs[index]), abs=1e-5)


@few
@given(ROWS, st.integers(0, 2**32 - 1))
def check_information(lib, values, seed):
    values[:, 0] = 1.0  # at least one entry is possible
    shuffled = np.random.default_rng(seed).permutation(values, axis=1)
    p, q = (scipy.special.softmax(v.astype(np.float64), axis=-1) for v in (values, shuffled))
    m = (p + q) / 2
    pairs = [
        (entropy(lib(values)), scipy.special.entr(p).sum(axis=-1)),
        (portable(entropy)(lib(values)), scipy.special.entr(p).sum(axis=-1)),
        (kl_divergence(lib(values), lib(shuffled)), scipy.special.rel_entr(p, q).sum(axis=-1)),
        (
            js_divergence(lib(values), lib(shuffled)),
            (scipy.special.rel_entr(p, m) + scipy.special.rel_entr(q, m)).sum(axis=-1) / 2,
        ),
    ]
    for got, want in pairs:
        np.testing.assert_allclose(to_numpy(got), want, atol=1e-4, rtol=1e-4)


def test_information(lib):
    check_information(lib)


def test_divergence_edges(lib):
    one, other = lib([[0.0, -np.inf]]), lib([[-np.inf, 0.0]])
    assert to_numpy(kl_divergence(one, other)).tolist() == [math.inf]
    assert to_numpy(kl_divergence(one, one)).tolist() == [0.0]
    assert to_numpy(js_divergence(one, other)).item() == pytest.approx(math.log(2))
    assert to_numpy(entropy(lib([[-np.inf, -np.inf]]))).tolist() == [0.0]


def test_token_logprobs_come_from_the_position_before(lib):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (2, 4, 7)).astype(np.float32)
    tokens = np.array([[1, 6, 0, 3], [2, 2, 5, -1]])
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    got = to_numpy(token_logprobs(lib(logits), tokens))
    assert got.shape == (2, 3)
    for row in range(2):
        for i in range(3):
            token = tokens[row, i + 1]
            expected = 0.0 if token < 0 else want[row, i, token]
            assert got[row, i] == pytest.approx(expected, abs=1e-5)
    same = target_logprobs(lib(logits[:, :-1]), asarray_like(tokens[:, 1:], lib(logits)))
    np.testing.assert_allclose(to_numpy(same), got)


def test_running_sums(lib):
    x = lib([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    np.testing.assert_allclose(to_numpy(cumulative_sum(x)), [[1, 3, 6], [0.5, 0.5, -0.5]])
    np.testing.assert_allclose(to_numpy(sum_before(x)), [[0, 1, 3], [0, 0.5, 0.5]])


def test_take_and_put(lib):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    rows, columns = np.array([0, 2, 2]), np.array([3, 0, 2])
    for form in (put_at, put_at.portable):
        x = lib(values)
        np.testing.assert_array_equal(to_numpy(take_at(x, rows, columns)), [3, 8, 10])
        got = form(x, rows, columns, lib([-1.0, -2.0, -np.inf]))
        want = values.copy()
        want[rows, columns] = [-1, -2, -np.inf]
        np.testing.assert_array_equal(to_numpy(got), want)
        np.testing.assert_array_equal(to_numpy(x), values)  # the original stays
        empty = np.empty(0, np.int64)
        np.testing.assert_array_equal(to_numpy(form(x, empty, empty, lib([]))), values)


def test_mask_out(lib):
    got = mask_out(lib([[1.0, 2.0]]), lib([[True, False]], np.bool_))
    assert to_numpy(got).tolist() == [[1.0, -math.inf]]


def test_gradients_pass_through():
    torch = pytest.importorskip("torch")
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 3, 5, dtype=torch.float64)
    tokens = np.array([[0, 1, 4], [2, 2, -1]])
    functions = [
        logsumexp,
        logsumexp.portable,
        log_softmax,
        softmax,
        entropy,
        lambda x: kl_divergence(x, other),
        lambda x: js_divergence(x, other),
        lambda x: token_logprobs(x, tokens),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("function", [top_k, smallest_set, categorical, logsumexp, put_at])
def test_twins_are_documented_by_the_portable_form(function):
    assert function.__doc__ == function.portable.__doc__
    assert set(function.twins) <= {"numpy", "torch", "mlx"}
