"""Sliding windows against the published list and against the definition."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.core.errors import UsageError
from steersman.core.reranking import windows
from steersman.core.reranking.windows import check_window


def test_published_setting():
    assert windows(100, 20, 10) == [(b, b + 20) for b in range(80, -1, -10)]


@pytest.mark.parametrize(
    ("n", "window", "stride", "expected"),
    [
        (25, 20, 10, [(5, 25), (0, 15)]),
        (20, 20, 10, [(0, 20)]),
        (10, 20, 10, [(0, 10)]),  # a released loop gives none here
        (30, 20, 10, [(10, 30), (0, 20)]),
        (1, 20, 10, [(0, 1)]),
        (0, 20, 10, []),
    ],
)
def test_small_lists(n, window, stride, expected):
    assert windows(n, window, stride) == expected


@given(st.integers(0, 200), st.integers(2, 26), st.data())
def test_every_place_is_covered_and_windows_overlap_or_touch(n, window, data):
    stride = data.draw(st.integers(1, window))
    found = windows(n, window, stride)
    assert {i for b, e in found for i in range(b, e)} == set(range(n))
    assert all(0 < e - b <= window for b, e in found)
    for (_, right_end), (_, left_end) in pairwise(found):
        assert right_end - left_end == stride
    if n:
        assert found[0][1] == n and found[-1][0] == 0


@given(st.integers(2, 26), st.data(), st.randoms(use_true_random=False))
def test_best_of_overlap_reach_the_front(window, data, random):
    stride = data.draw(st.integers(1, window - 1))
    truth = list(range(data.draw(st.integers(1, 90))))
    order = truth[:]
    random.shuffle(order)
    for begin, end in windows(len(order), window, stride):
        order[begin:end] = sorted(order[begin:end])
    best = window - stride
    assert order[:best] == truth[:best]
    assert sorted(order) == truth


@pytest.mark.parametrize(
    ("window", "stride", "passes"), [(27, 10, 1), (1, 1, 1), (20, 21, 1), (20, 0, 1), (20, 10, 0)]
)
def test_settings_that_would_skip_or_have_no_letter_are_refused(window, stride, passes):
    with pytest.raises(UsageError, match="must be"):
        check_window(window, stride, passes)


def test_stride_as_wide_as_the_window_sorts_blocks_only():
    order = list(np.random.default_rng(0).permutation(40))
    for begin, end in windows(40, 20, 20):
        order[begin:end] = sorted(order[begin:end])
    assert order[:20] == sorted(order[:20]) and order != sorted(order)
