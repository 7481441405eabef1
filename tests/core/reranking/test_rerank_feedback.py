"""Relevance feedback against worked numbers and finite differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.core.errors import UsageError
from steersman.core.reranking import distill_query
from steersman.core.reranking.feedback import weighted_ranknet

PASSAGES = [[1, 0], [0.8, 0.6], [0, 1]]


def test_worked_loss_and_gradient():
    loss, gradient = weighted_ranknet(np.array([2.0, 1, 0, -1]), np.array([2, 1, 4, 3]))
    assert loss == pytest.approx(0.125103, abs=5e-7)
    np.testing.assert_allclose(
        gradient, [0.035722, -0.054546, 0.029682, -0.010859], rtol=0, atol=5e-7
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=7), st.randoms(use_true_random=False))
def test_gradient_equals_central_differences_and_sums_to_zero(values, random):
    scores = np.array(values)
    ranks = np.array(random.sample(range(1, len(values) + 1), len(values)))
    _, gradient = weighted_ranknet(scores, ranks)
    assert abs(gradient.sum()) < 1e-12
    for i in range(len(values)):
        step = np.zeros(len(values))
        step[i] = 1e-5
        up, _ = weighted_ranknet(scores + step, ranks)
        down, _ = weighted_ranknet(scores - step, ranks)
        assert gradient[i] == pytest.approx((up - down) / 2e-5, abs=1e-7)


def test_loss_vanishes_as_right_gaps_grow_and_stays_finite_when_wrong():
    ranks = np.array([1, 2, 3])
    assert weighted_ranknet(np.array([2e3, 1e3, 0.0]), ranks)[0] == 0.0
    loss, gradient = weighted_ranknet(np.array([0.0, 1e3, 2e3]), ranks)
    assert np.isfinite(loss) and np.isfinite(gradient).all() and loss > 100


def test_twenty_steps_of_the_worked_example():
    moved = distill_query([1, 0], PASSAGES, [1, 2, 3])
    np.testing.assert_allclose(moved.query, [0.980011, 0.019989], atol=5e-7)
    assert moved.losses[0] == pytest.approx(0.292770, abs=5e-7)
    assert moved.losses[-1] == pytest.approx(0.288172, abs=5e-7)
    assert len(moved.losses) == 20


def test_many_steps_reach_the_target_order():
    moved = distill_query([1, 0], PASSAGES, [1, 2, 3], steps=2000, learning_rate=0.01)
    assert np.argsort(np.asarray(PASSAGES) @ moved.query).tolist() == [0, 1, 2]


def test_teacher_stage_falls_and_comes_first():
    moved = distill_query([1, 0], PASSAGES, [1, 2, 3], teacher=[0.0, 2.0, 1.0], steps=0)
    assert len(moved.losses) == 100
    assert moved.losses[-1] < moved.losses[0]
    # One step of Adam moves each coordinate by the rate, against the gradient's sign: up the
    # axis of the passages that the teacher likes better.
    one = distill_query([1, 0], PASSAGES, [1, 2, 3], teacher=[0, 2, 1], steps=0, teacher_steps=1)
    np.testing.assert_allclose(one.query, [0.995, 0.005], atol=1e-6)


def test_nothing_to_scale_leaves_the_query():
    for passages in ([[1, 0], [1, 5]], np.empty((0, 2))):
        moved = distill_query([1.0, 0.0], passages, np.arange(len(passages)))
        assert moved.skipped and moved.losses == () and moved.query.tolist() == [1.0, 0.0]


def test_input_is_not_changed_and_shapes_are_checked():
    query = np.array([1.0, 0.0])
    distill_query(query, PASSAGES, [1, 2, 3])
    assert query.tolist() == [1.0, 0.0]
    with pytest.raises(UsageError, match="disagree"):
        distill_query([1, 0, 0], PASSAGES, [1, 2, 3])
    with pytest.raises(UsageError, match="finite"):
        distill_query([1, 0], PASSAGES, [1, 2, float("nan")])
