"""Relevance feedback: pull a dense query towards a reranker's order, then search again.

No model is trained; only the query vector moves, for a few steps, so that its dot products with
the reranked passages agree with the reranker. Everything is float64 NumPy with the gradients
written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..ops import log_softmax

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A moved query.

    Attributes
    ----------
    query : float64 array (D,)
    losses : tuple of float
        Loss before each step; empty when nothing was done.
    skipped : bool
        True when every passage had the same score, so that there was no scale to work on.
    """

    query: Floats
    losses: tuple[float, ...]
    skipped: bool = False


def weighted_ranknet(scores: Floats, ranks: npt.NDArray[np.int64]) -> tuple[float, Floats]:
    """Return the weighted RankNet loss and its gradient.

    ``mean over pairs with r_i < r_j of log(1 + exp(s_j - s_i)) / (r_i + r_j)``

    Parameters
    ----------
    scores : float64 array (n,)
        Larger is better.
    ranks : int array (n,)
        Wanted place of each, 1 is best; equal ranks form no pair.

    Returns
    -------
    loss : float
        In [0, inf); 0 with no pair, towards 0 as every right gap grows.
    gradient : float64 array (n,)
        Sums to 0, since only differences enter.

    References
    ----------
    Reddy et al., arXiv:2406.15657. The mean over the n(n-1)/2 pairs is the released code's, with
    the weights not renormalised; the paper writes a sum.
    """
    better = ranks[:, None] < ranks[None, :]  # (i, j): i should stand above j
    count = int(better.sum())
    if count == 0:
        return 0.0, np.zeros_like(scores)
    gap = scores[None, :] - scores[:, None]  # s_j - s_i
    weight = better / (ranks[:, None] + ranks[None, :])
    loss = float((weight * np.logaddexp(0.0, gap)).sum() / count)
    # d log(1 + e^g) / dg is the logistic of g, written so that neither end overflows.
    slope = weight * np.exp(-np.logaddexp(0.0, -gap)) / count
    return loss, slope.sum(axis=0) - slope.sum(axis=1)


def _divergence(scores: Floats, teacher: Floats) -> tuple[float, Floats]:
    """Return KL(softmax(teacher) || softmax(scores)) and its gradient in ``scores``."""
    want, have = log_softmax(teacher), log_softmax(scores)
    return float((np.exp(want) * (want - have)).sum()), np.exp(have) - np.exp(want)


def distill_query(
    query: Sequence[float] | Floats,
    passages: Sequence[Sequence[float]] | Floats,
    target: Sequence[float] | Floats,
    *,
    teacher: Sequence[float] | Floats | None = None,
    steps: int = 20,
    learning_rate: float = 0.001,
    teacher_steps: int = 100,
    teacher_learning_rate: float = 0.005,
) -> Distilled:
    """Move a dense query towards the order that a reranker gave to its passages.

    With scale ``c = (max t - min t) / (max Dq - min Dq)``, computed once from the query given,
    ``(c / 2) D q`` is what has to agree with the target, by :func:`weighted_ranknet`; Adam moves
    ``q`` alone.

    Parameters
    ----------
    query : float array (d,)
    passages : float array (m, d)
        Vectors of the reranked passages (the top 100 in the paper).
    target : float array (m,)
        The reranker's scores, larger is better. Their spread sets the scale, their order the loss.
    teacher : float array (m,), optional
        Scores of a cross-encoder. If given, a first stage minimises the divergence between the
        softmaxes of teacher and query scores.
    steps, learning_rate, teacher_steps, teacher_learning_rate
        The released script's values.

    Returns
    -------
    Distilled
        With the query unchanged and ``skipped`` set if all passages score alike.

    Raises
    ------
    UsageError
        Shapes disagree or a value is not finite.

    References
    ----------
    Reddy et al., arXiv:2406.15657, section on relevance feedback.
    """
    q = np.array(query, np.float64)
    matrix = np.asarray(passages, np.float64)
    goal = np.asarray(target, np.float64)
    guide = None if teacher is None else np.asarray(teacher, np.float64)
    if matrix.ndim != 2 or q.shape != matrix.shape[1:] or goal.shape != matrix.shape[:1]:
        raise UsageError(
            f"feedback: query {q.shape}, passages {matrix.shape} and target {goal.shape} disagree"
        )
    if guide is not None and guide.shape != goal.shape:
        raise UsageError(f"feedback: teacher {guide.shape}, expected {goal.shape}")
    for values in (q, matrix, goal) if guide is None else (q, matrix, goal, guide):
        if not np.isfinite(values).all():
            raise UsageError("feedback: vectors and scores must be finite")
    # Equal targets share a rank and form no pair.
    ranks = 1 + (goal[:, None] > goal[None, :]).sum(axis=0)
    losses: list[float] = []
    if guide is not None:
        scale = _scale(matrix @ q, guide)
        if scale is None:
            return Distilled(query=q, losses=(), skipped=True)
        wanted = guide
        q, first = _adam(
            q,
            matrix * scale,
            lambda s: _divergence(s, wanted),
            teacher_steps,
            teacher_learning_rate,
        )
        losses += first
    scale = _scale(matrix @ q, goal)
    if scale is None:
        return Distilled(query=q, losses=tuple(losses), skipped=True)
    loss = partial(weighted_ranknet, ranks=ranks)
    q, last = _adam(q, matrix * scale, loss, steps, learning_rate)
    return Distilled(query=q, losses=(*losses, *last))


def _scale(scores: Floats, goal: Floats) -> float | None:
    """Return half the ratio of the spreads; None when there is no spread to scale."""
    spread = float(np.ptp(scores)) if scores.size else 0.0
    return None if spread == 0.0 else float(np.ptp(goal)) / spread / 2


def _adam(
    q: Floats,
    matrix: Floats,
    loss: Callable[[Floats], tuple[float, Floats]],
    steps: int,
    rate: float,
) -> tuple[Floats, list[float]]:
    """Minimise ``loss(matrix @ q)`` over ``q`` with Adam (0.9, 0.999, 1e-8)."""
    mean, square = np.zeros_like(q), np.zeros_like(q)
    losses: list[float] = []
    for step in range(1, steps + 1):
        value, slope = loss(matrix @ q)
        losses.append(value)
        gradient = matrix.T @ slope
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        unbiased = np.sqrt(square / (1 - 0.999**step))
        q = q - rate * (mean / (1 - 0.9**step)) / (unbiased + 1e-8)
    return q, losses
