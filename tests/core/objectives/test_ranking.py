"""Ranking losses against worked numbers, their gradients, and their invariances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steersman.core.array import to_numpy
from steersman.core.objectives import lambdarank, listnet, ranknet, ranks_of

SCORES, RANKS = [2.0, 1.0, 0.0, -1.0], [2, 1, 4, 3]


def test_worked_ranknet(lib: Any) -> None:
    s, r = lib(SCORES), lib(RANKS, np.int64)
    assert float(ranknet(s, r, aggregate="sum")) == pytest.approx(0.750619, abs=2e-6)
    assert float(ranknet(s, r)) == pytest.approx(0.125103, abs=1e-6)
    assert float(ranknet(s, r, weighted=False)) == pytest.approx(0.540371, abs=1e-6)


def test_batches_are_rows(lib: Any) -> None:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((3, 5))
    ranks = np.array([generator.permutation(5) + 1 for _ in range(3)])
    for loss in (ranknet, lambdarank, listnet):
        together = to_numpy(loss(lib(scores), lib(ranks, np.int64)))
        alone = [float(loss(lib(s), lib(r, np.int64))) for s, r in zip(scores, ranks)]
        np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_lambdarank_by_its_definition() -> None:
    generator = np.random.default_rng(1)
    scores, ranks = generator.standard_normal(6), generator.permutation(6) + 1
    position = np.empty(6)
    position[np.argsort(-scores, kind="stable")] = np.arange(1, 7)
    ideal = sum(2.0**-k / np.log2(1 + k) for k in range(1, 7))
    total = 0.0
    for i in range(6):
        for j in range(6):
            if ranks[i] < ranks[j]:
                gain = abs(2.0 ** -ranks[i] - 2.0 ** -ranks[j]) / ideal
                swap = abs(1 / np.log2(1 + position[i]) - 1 / np.log2(1 + position[j]))
                total += gain * swap * np.log1p(np.exp(scores[j] - scores[i]))
    assert float(lambdarank(scores, ranks, aggregate="sum")) == pytest.approx(total, rel=1e-6)
    assert float(lambdarank(scores, ranks)) == pytest.approx(total / 15, rel=1e-6)


def test_right_order_with_large_gaps_costs_nothing(lib: Any) -> None:
    r = lib([1, 2, 3], np.int64)
    for loss in (ranknet, lambdarank):
        assert float(loss(lib([200.0, 100.0, 0.0]), r)) < 1e-6
        assert float(loss(lib([0.0, 100.0, 200.0]), r)) > 1


def test_ranks_of_an_order() -> None:
    assert ranks_of([2, 0, 1], like=np.zeros(1)).tolist() == [2, 3, 1]


def test_gradients() -> None:
    torch = pytest.importorskip("torch")
    s = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    r = torch.tensor(RANKS)
    ranknet(s, r).backward()
    expected = [0.035722, -0.054546, 0.029682, -0.010859]
    np.testing.assert_allclose(s.grad.numpy(), expected, atol=1e-6)
    for loss in (ranknet, listnet):
        assert torch.autograd.gradcheck(lambda x, f=loss: f(x, r), (s,))
        s.grad = None
        loss(s, r).backward()
        assert abs(float(s.grad.sum())) < 1e-12  # only differences of scores matter
