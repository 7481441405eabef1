"""K-SEQ: choose a token from several independent drafts so that its law is the target's.

At one position ``k`` tokens were drawn independently from the draft model's distribution ``p``; the
target's distribution is ``q``. With ``rho`` in [1, k], the drafts are tried in turn, and a draft
``x`` is accepted with probability ``min(1, q(x) / (rho * p(x)))``. If none is accepted, the token
is drawn from a residual::

    beta   = sum_x min(p(x), q(x) / rho)
    c      = (1 - (1 - beta)**k) / beta
    res(x) = (q(x) - c * min(p(x), q(x) / rho)) / (1 - beta)**k

The residual is a distribution exactly where ``rho * beta >= 1 - (1 - beta)**k``, and the smallest
such ``rho`` accepts most often: ``1 - (1 - beta)**k``. With one draft ``rho`` is 1, and the rule is
that of speculative sampling (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318).

References
----------
Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport", arXiv:2310.15141. Formulas of
``beta`` and the acceptance agree with the appendix of Sequoia, arXiv:2402.12374.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...array import Array, array_namespace, to_numpy, wide_dtype

Probs = npt.NDArray[np.float64]

EXACT = 1e-12  # relative width to which rho is narrowed
STEPS = 60  # most evaluations; halving alone reaches EXACT in 50


def overlap(p: Array, q: Array, rho: float) -> Array:
    """Return ``min(p(x), q(x) / rho)`` (V,): what one draft wins for each token.

    Parameters
    ----------
    p, q : float array (V,)
        Probabilities of the draft and of the target.
    rho : float, at least 1
    """
    return array_namespace(p, q).minimum(p, q / rho)


def accepted(beta: float, k: int) -> float:
    """Return ``1 - (1 - beta)**k``: the probability that one of ``k`` drafts is accepted."""
    return 1.0 if beta >= 1 else -math.expm1(k * math.log1p(-max(beta, 0.0)))


def smallest_rho(p: Array, q: Array, k: int) -> float:
    """Return the smallest ``rho`` in [1, k] whose residual is a distribution.

    ``f(rho) = 1 - (1 - beta)**k - rho * beta`` falls in ``rho``. Newton's steps narrow a bracket of
    its root, and halvings take over where they do not; the upper end is returned, where ``f <= 0``,
    so that the residual has no negative entry.

    Parameters
    ----------
    p, q : float array (V,)
        Probabilities. Summed in float64 where the library has it.
    k : int, at least 1
        Drafts that are tried at this position.
    """
    if k == 1:
        return 1.0
    low, high = 1.0, float(k)
    value, slope = _validity(p, q, low, k)
    if value <= 1e-15:
        return low
    at, before = low, math.inf
    for _ in range(STEPS):
        if high - low <= EXACT * high:
            break
        beyond = EXACT / 4 if value > 0 else -EXACT / 4  # to enclose the root from both sides
        newton = (at - value / slope) * (1 + beyond) if slope < 0 else low
        slow = abs(value) > before / 2
        at = (low + high) / 2 if slow or not low < newton < high else newton
        before = abs(value)
        value, slope = _validity(p, q, at, k)
        if value <= 0:
            high = at
        else:
            low = at
    return high


def _validity(p: Array, q: Array, rho: float, k: int) -> tuple[float, float]:
    """Return ``f(rho)`` of :func:`smallest_rho` and its derivative."""
    xp = array_namespace(p, q)
    won = overlap(p, q, rho)
    beta = float(xp.sum(won))
    # Tokens of which the target wants less than rho drafts offer, in units of the draft.
    tail = float(xp.sum(xp.where(won < p, won, xp.zeros_like(won))))
    value = accepted(beta, k) - rho * beta
    slope = -k * max(1 - beta, 0.0) ** (k - 1) * tail / rho - (beta - tail)
    return value, slope


def residual(p: Array, q: Array, rho: float, k: int) -> Array:
    """Return the distribution (V,) of the token when none of ``k`` drafts was accepted.

    It is ``q`` where the supports are disjoint, and also where no draft can be rejected: rounding
    alone could then ask for it.
    """
    xp = array_namespace(p, q)
    won = overlap(p, q, rho)
    beta = float(xp.sum(won))
    share = accepted(beta, k) / beta if beta > 0 else 0.0
    left = q - share * won
    left = xp.where(left > 0, left, xp.zeros_like(left))
    total = float(xp.sum(left))
    return left / total if total > 0 else q / xp.sum(q)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One position's outcome.

    Attributes
    ----------
    token : int
    draft : int or None
        Which of the drafts was accepted; None when the token comes from the residual.
    """

    token: int
    draft: int | None = None


@dataclass(frozen=True, kw_only=True)
class KSeq:
    """The rule of one position; build it with :meth:`between`.

    Attributes
    ----------
    p, q : float64 (V,)
        Distributions of the draft, exactly the one its tokens were drawn from, and of the target.
    k : int
        Drafts that are tried.
    rho : float in [1, k]
    """

    p: Probs
    q: Probs
    k: int
    rho: float

    @classmethod
    def between(cls, p: Probs, q: Probs, k: int) -> KSeq:
        """Return the rule that accepts most often."""
        both = np.flatnonzero((p > 0) & (q > 0))  # elsewhere nothing can be won
        return cls(p=p, q=q, k=k, rho=smallest_rho(p[both], q[both], k))

    def chance(self, token: int) -> float:
        """Return the probability that a draft of ``token`` is accepted when it is tried.

        A token below 0 stands for one outside these distributions, which is never accepted.
        """
        if token < 0:
            return 0.0
        offered, wanted = self.rho * float(self.p[token]), float(self.q[token])
        if offered <= 0:
            return 0.0
        return 1.0 if wanted >= offered else wanted / offered

    @property
    def acceptance(self) -> float:
        """Probability that one of the drafts is accepted."""
        return accepted(float(overlap(self.p, self.q, self.rho).sum()), self.k)

    @property
    def acceptance_of_one(self) -> float:
        """Probability that a single draft would be accepted."""
        return float(overlap(self.p, self.q, 1.0).sum())

    @cached_property
    def residual(self) -> Probs:
        """Distribution (V,) of the token when no draft was accepted."""
        left: Probs = residual(self.p, self.q, self.rho, self.k)
        return left

    def law(self, drafts: Sequence[int]) -> Probs:
        """Return the distribution (V,) of the chosen token given the ``k`` drafted ones."""
        out, left = np.zeros(len(self.q)), 1.0
        for token in drafts:
            chance = self.chance(token)
            out[token] += left * chance
            left *= 1 - chance
        return out + left * self.residual if left > 0 else out

    def choose(self, drafts: Sequence[int], uniforms: Sequence[float], last: float) -> Choice:
        """Choose the token of this position.

        Parameters
        ----------
        drafts : sequence of k int
            Tokens drawn independently from ``p``, repetitions kept.
        uniforms : sequence of k float in [0, 1)
            One per draft.
        last : float in [0, 1)
            For the draw from the residual, see :func:`pick`.
        """
        for i, (token, uniform) in enumerate(zip(drafts, uniforms, strict=True)):
            if uniform < self.chance(token):
                return Choice(token=int(token), draft=i)
        return Choice(token=pick(self.residual, last))


def pick(weights: Array, uniform: float) -> int:
    """Return the first index whose share of the running sum of ``weights`` exceeds ``uniform``.

    An index of weight 0 is never returned; ``weights`` (V,) must hold a positive one.
    """
    host = to_numpy(weights).astype(np.float64, copy=False)
    total = np.cumsum(host)
    index = int(total.searchsorted(uniform * total[-1], side="right"))
    if index < len(host) and host[index] > 0:
        return index
    # Rounding at the very end: the last index that can be drawn.
    return int(np.flatnonzero(host > 0)[-1])


def as_probs(logprobs: Array) -> Array:
    """Return probabilities (..., V) in float64 (where there is one), summing to 1.

    Natural logarithms in float32 sum to 1 only to seven digits; what is missing is shared out, so
    that acceptance and residual add up to the target's law.
    """
    xp = array_namespace(logprobs)
    probs = xp.exp(xp.astype(logprobs, wide_dtype(logprobs)))
    return probs / xp.sum(probs, axis=-1, keepdims=True)
