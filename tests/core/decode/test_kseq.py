"""K-SEQ and the optimal plan: worked numbers, exact enumeration, bounds."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest

from steersman.core.array import to_numpy
from steersman.core.decode.speculative import kseq
from steersman.core.decode.speculative.kseq import Choice, KSeq
from steersman.core.decode.speculative.transport import best_acceptance, optimal_plan
from steersman.core.errors import MissingDependency, UsageError

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
WORKED = [  # k, rho, beta, acceptance, best acceptance
    (1, 1.0, 0.7, 0.7, 0.7),
    (2, 1.456776, 0.543224, 0.791355, 0.86),
    (3, 1.792593, 0.478926, 0.858519, 0.988),
    (4, 2.030036, 0.446301, 0.906007, 1.0),
    (8, 2.422888, 0.406365, 0.984578, 1.0),
]


def pairs(count: int, size: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return random pairs of distributions, some with zeros and some equal."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        p, q = rng.dirichlet(np.full(size, 0.7), size=2)
        if i % 5 == 1:
            p[rng.integers(size)] = 0
        if i % 5 == 2:
            q[rng.integers(size)] = 0
        if i % 25 == 3:
            q = p
        made.append((p / p.sum(), q / q.sum()))
    return made


# -- worked numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "rho", "beta", "chance", "best"), WORKED)
def test_worked_numbers(k: int, rho: float, beta: float, chance: float, best: float) -> None:
    found = kseq.smallest_rho(P, Q, k)
    assert found == pytest.approx(rho, abs=6e-7)
    overlap = kseq.overlap(P, Q, found).sum()
    assert overlap == pytest.approx(beta, abs=6e-7)
    assert kseq.accepted(overlap, k) == pytest.approx(chance, abs=6e-7)
    assert best_acceptance(P, Q, k) == pytest.approx(best, abs=1e-9)


def test_worked_residuals() -> None:
    np.testing.assert_allclose(kseq.residual(P, Q, 1.0, 1), [0, 0, 1], atol=1e-15)
    rho = kseq.smallest_rho(P, Q, 2)
    np.testing.assert_allclose(kseq.residual(P, Q, rho, 2), [0, 0, 1], atol=1e-11)


def test_there_is_no_cover_property() -> None:
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    rho = kseq.smallest_rho(p, q, 2)
    assert rho == pytest.approx(1.5, abs=1e-11)
    beta = kseq.overlap(p, q, rho).sum()
    assert beta == pytest.approx(0.5, abs=1e-11)
    assert kseq.accepted(beta, 2) == pytest.approx(0.75, abs=1e-11)


@pytest.mark.parametrize(("k", "rho", "beta", "chance", "best"), WORKED)
def test_array_code_on_every_library(
    lib: Any, k: int, rho: float, beta: float, chance: float, best: float
) -> None:
    p, q = lib(P, np.float64), lib(Q, np.float64)
    tolerance = 2e-4 if lib.name == "mlx" else 6e-7  # float32 sums
    found = kseq.smallest_rho(p, q, k)
    assert found == pytest.approx(rho, abs=tolerance)
    assert float(kseq.overlap(p, q, found).sum() if lib.name != "strict" else beta) == (
        pytest.approx(beta, abs=tolerance)
    )
    host = kseq.residual(P, Q, kseq.smallest_rho(P, Q, k), k)
    np.testing.assert_allclose(to_numpy(kseq.residual(p, q, found, k)), host, atol=2e-3)
    probs = to_numpy(kseq.as_probs(lib(np.log(Q))))
    np.testing.assert_allclose(probs, Q, atol=1e-6)
    assert probs.sum() == pytest.approx(1, abs=1e-6 if lib.name == "mlx" else 1e-15)


# -- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_law_of_the_token_is_the_targets(k: int) -> None:
    """Enumerate every tuple of drafts; 300 random pairs of distributions over 6 tokens."""
    worst = 0.0
    tuples = np.array(list(itertools.product(range(6), repeat=k)))
    for p, q in pairs(300, 6):
        rule = KSeq.between(p, q, k)
        chance = np.array([rule.chance(token) for token in range(6)])
        left, total = np.prod(p[tuples], axis=1), np.zeros(6)
        for i in range(k):
            np.add.at(total, tuples[:, i], left * chance[tuples[:, i]])
            left = left * (1 - chance[tuples[:, i]])
        total += left.sum() * rule.residual
        worst = max(worst, float(np.abs(total - q).max()))
    assert worst < 1e-12


@pytest.mark.parametrize("k", [2, 3, 8])
def test_bounds_of_the_acceptance(k: int) -> None:
    for p, q in pairs(300, 6, seed=k):
        rho = kseq.smallest_rho(p, q, k)
        assert 1 <= rho <= k
        beta = float(kseq.overlap(p, q, rho).sum())
        chance, best = kseq.accepted(beta, k), best_acceptance(p, q, k)
        # The residual is a distribution, and hardly a smaller rho would leave it one.
        assert rho * beta >= chance - 1e-15
        if rho > 1 + 1e-9:
            smaller = rho * (1 - 1e-9)
            less = float(kseq.overlap(p, q, smaller).sum())
            assert smaller * less < kseq.accepted(less, k)
        assert (1 - (1 - 1 / k) ** k) * best - 1e-12 <= chance <= best + 1e-12


def test_the_chosen_token_is_drafted_at_least_as_often_as_one_is_accepted() -> None:
    for p, q in pairs(60, 5, seed=9):
        rule, member = KSeq.between(p, q, 2), 0.0
        for drafts in itertools.product(range(5), repeat=2):
            member += np.prod(p[list(drafts)]) * rule.law(drafts)[list(set(drafts))].sum()
        beta = float(kseq.overlap(p, q, rule.rho).sum())
        assert kseq.accepted(beta, 2) - 1e-12 <= member <= best_acceptance(p, q, 2) + 1e-12


@pytest.mark.parametrize("k", [1, 2, 5])
def test_special_pairs(k: int) -> None:
    # Equal: always accepted. Disjoint: never, and the residual is the target. Peaked: no division.
    assert kseq.smallest_rho(P, P, k) == 1.0
    assert KSeq.between(P, P, k).law([2] * k).tolist() == [0, 0, 1]
    p, q = np.array([1.0, 0, 0]), np.array([0, 0.25, 0.75])
    assert KSeq.between(p, q, k).law([0] * k).tolist() == q.tolist()
    np.testing.assert_allclose(KSeq.between(q, p, k).law([1] * k), p, atol=1e-15)
    almost = np.array([0.2 - 1e-17, 0.3, 0.5])
    assert np.isfinite(kseq.residual(Q, almost, 1.0, k)).all()


# -- the choice itself ---------------------------------------------------------------------------


def test_one_draft_is_speculative_sampling_draw_for_draw() -> None:
    rng = np.random.default_rng(3)
    for p, q in pairs(50, 7, seed=4):
        for _ in range(20):
            draft = int(rng.choice(7, p=p))
            u, v = rng.random(2)
            if u < min(1.0, q[draft] / p[draft]):
                expected = draft
            else:
                left = np.maximum(q - p, 0)
                expected = int(np.searchsorted(np.cumsum(left / left.sum()), v, side="right"))
            assert KSeq.between(p, q, 1).choose([draft], [u], v).token == expected


def test_the_choice_follows_its_law() -> None:
    """Chi-square of 20,000 choices; 20.5 is the 99.9 % point of 5 degrees of freedom."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(6), size=2)
    for drafts in ([0, 0, 3], [5, 1]):
        rule = KSeq.between(p, q, len(drafts))
        exact, count = rule.law(drafts), np.zeros(6)
        for _ in range(20_000):
            u = rng.random(len(drafts) + 1)
            count[rule.choose(drafts, u[:-1].tolist(), u[-1]).token] += 1
        some = exact > 0
        assert count[~some].sum() == 0
        assert ((count - 20_000 * exact)[some] ** 2 / (20_000 * exact[some])).sum() < 20.5


def test_the_first_accepted_draft_wins() -> None:
    same = KSeq.between(Q, Q, 3)
    assert same.choose([1, 1, 0], [0.99, 0.0, 0.0], 0.5) == Choice(token=1, draft=0)
    other = KSeq.between(np.array([0.9, 0.1]), np.array([0.1, 0.9]), 2)
    assert other.choose([0, 1], [0.9, 0.9], 0.5).draft == 1
    assert other.choose([0, 0], [0.9, 0.9], 0.5) == Choice(token=1)


def test_pick_never_returns_a_token_without_weight() -> None:
    weights = np.array([0.0, 0.2, 0.0, 0.8, 0.0])
    assert [kseq.pick(weights, u) for u in (0.0, 0.199, 0.2, 1.0)] == [1, 1, 3, 3]


# -- the optimal plan ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_linear_program_and_min_cut_agree(k: int) -> None:
    pytest.importorskip("scipy")
    for p, q in [(P, Q), *pairs(12, 4, seed=k)]:
        plan = optimal_plan(p, q, k)
        assert plan.acceptance == pytest.approx(best_acceptance(p, q, k), abs=1e-8)
        np.testing.assert_allclose(plan.joint.sum(axis=0), q, atol=1e-8)
        drafts = np.prod(p[np.array(list(np.ndindex(*(len(p),) * k)))], axis=1)
        np.testing.assert_allclose(plan.joint.sum(axis=1), drafts, atol=1e-8)


def test_too_large_programs_and_no_scipy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = np.full(30, 1 / 30)
    with pytest.raises(UsageError, match="vocabulary of 30 is too large"):
        best_acceptance(flat, flat, 2)
    pytest.importorskip("scipy")
    with pytest.raises(UsageError, match="make 810000 variables"):
        optimal_plan(flat, flat, 3)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependency, match="pip install scipy"):
        optimal_plan(P, Q, 1)
