"""Reciprocal rank fusion against its definition."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.core.errors import UsageError
from steersman.core.fusion import reciprocal_ranks

permutations = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))
)


@given(permutations, st.floats(0.01, 100), st.integers(0, 100))
def test_equals_the_sum_of_reciprocal_ranks(orders, weight, offset):
    first, second = orders
    places = [{item: rank for rank, item in enumerate(order, 1)} for order in orders]
    sums = {i: weight / (offset + places[0][i]) + 1 / (offset + places[1][i]) for i in first}
    found = reciprocal_ranks([first, second], [weight, 1.0], offset)
    assert sorted(found) == sorted(first)
    assert all(sums[a] >= sums[b] - 1e-15 for a, b in pairwise(found))


def test_worked_numbers():
    # 1/61 + 1/64 = .03202, 1/62 + 1/62 = .03226, 1/63 + 1/61 = .03227, 1/64 + 1/63 = .03150
    assert reciprocal_ranks([[0, 1, 2, 3], [2, 1, 3, 0]], [1, 1]) == [2, 1, 0, 3]
    # Without an offset the first places decide: 1 + 1/4, 1, 1/3 + 1, 1/4 + 1/3.
    assert reciprocal_ranks([[0, 1, 2, 3], [2, 1, 3, 0]], [1, 1], 0) == [2, 0, 1, 3]


@given(permutations)
def test_no_weight_leaves_the_other_order_and_ties_go_to_the_first(orders):
    first, second = orders
    assert reciprocal_ranks([first, second], [0, 1]) == list(second)
    assert reciprocal_ranks([first, second], [1, 0]) == list(first)
    reverse = list(first)[::-1]
    found = reciprocal_ranks([first, reverse], [1, 1])
    sums = 1 / (61 + np.arange(len(first))) + 1 / (60 + len(first) - np.arange(len(first)))
    expected = [first[int(i)] for i in np.argsort(-sums.round(15), kind="stable")]
    assert found == expected


def test_refuses_what_is_not_one_list():
    with pytest.raises(UsageError, match="not of the same items"):
        reciprocal_ranks([[0, 1], [1, 2]], [1, 1])
    for weights in ([1], [0, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(UsageError, match="weights"):
            reciprocal_ranks([[0, 1], [1, 0]], weights)
