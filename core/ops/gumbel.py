"""Gumbel noise and the Gumbel-Softmax: draws from a categorical distribution, sharp or soft."""

from __future__ import annotations

from ..array import Array, array_namespace
from .softmax import softmax
from .sorting import positions_like

_LEAST = 1e-30  # stands in for a uniform of 0, whose noise would be -inf
_MOST = 1 - 1e-7  # largest float32 below 1: a uniform that rounds to 1 would give +inf


def gumbel(uniform: Array) -> Array:
    """Return standard Gumbel noise ``-log(-log(u))`` (...) of uniforms in [0, 1)."""
    xp = array_namespace(uniform)
    most = 1 - 2.0**-53 if uniform.dtype == xp.float64 else _MOST
    return -xp.log(-xp.log(xp.clip(uniform, _LEAST, most)))


def gumbel_softmax(scores: Array, tau: float) -> Array:
    """Return ``softmax(scores / tau)`` (..., k): weights that a tau towards 0 makes one-hot.

    With ``scores = log p + gumbel(u)`` the largest weight stands at a draw from ``p`` (the
    Gumbel-max law), whatever ``tau`` is.

    Parameters
    ----------
    scores : float array (..., k)
        -inf entries get weight 0.
    tau : float >= 0
        0: one-hot at the largest score, the first among equals.

    References
    ----------
    Jang, Gu and Poole, arXiv:1611.01144; Maddison, Mnih and Teh, arXiv:1611.00712.
    """
    if tau > 0:
        return softmax(scores / tau)
    xp = array_namespace(scores)
    best = xp.argmax(scores, axis=-1, keepdims=True)
    return xp.astype(positions_like(scores) == best, scores.dtype)
