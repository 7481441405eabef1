"""Bags of words from next-token logits: weights, choice of tokens, whole-number impacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..array import array_namespace, asarray_like, to_numpy

Array = Any
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Bag:
    """A text as weighted tokens.

    Attributes
    ----------
    tokens : int32 array (m,)
        Rising ids.
    impacts : int32 array (m,)
        At least 1.
    """

    tokens: npt.NDArray[np.int32]
    impacts: npt.NDArray[np.int32]

    def dot(self, other: Bag) -> int:
        """Return the inner product with another bag."""
        _, mine, its = np.intersect1d(
            self.tokens, other.tokens, assume_unique=True, return_indices=True
        )
        return int(self.impacts[mine].astype(np.int64) @ other.impacts[its].astype(np.int64))


def saturate(logits: Array) -> Array:
    """Return ``log(1 + max(logits, 0))``, in single precision at least.

    Parameters
    ----------
    logits : float array (..., V)
        Raw ones, no softmax: a bag does not depend on how negative a logit is.

    References
    ----------
    Zhuang et al., "PromptReps", arXiv:2404.18424.
    """
    xp = array_namespace(logits)
    if logits.dtype not in (xp.float32, xp.float64):
        logits = xp.astype(logits, xp.float32)  # half precision moves impacts by whole units
    return xp.log1p(xp.where(logits > 0, logits, xp.zeros_like(logits)))


def centre(logits: Array) -> Array:
    """Subtract each row's median (the lower of the middle two): *ours*, for models with few or
    no positive logits."""
    xp = array_namespace(logits)
    middle = (logits.shape[-1] - 1) // 2
    return logits - xp.sort(logits, axis=-1)[..., middle : middle + 1]


def gather_weights(weights: Array, tokens: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Return each row's weights at its own tokens, in one copy to the host.

    Parameters
    ----------
    weights : float array (B, V)
    tokens : B sequences of int
    """
    xp = array_namespace(weights)
    width = max((len(row) for row in tokens), default=0)
    if not width:
        return [np.zeros(0, np.float32) for _ in tokens]
    wanted = np.zeros((len(tokens), width), np.int64)
    for b, row in enumerate(tokens):
        wanted[b, : len(row)] = row
    places = asarray_like(wanted, weights, dtype=xp.int64)
    taken = to_numpy(xp.take_along_axis(weights, places, axis=-1)).astype(np.float32)
    return [taken[b, : len(row)] for b, row in enumerate(tokens)]


def strongest(weights: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Return the places of the ``count`` largest weights, largest first, ties by place."""
    return np.argsort(-weights, kind="stable")[:count]


def quantise(tokens: Sequence[int], weights: FloatArray, *, keep: int, scale: float = 100.0) -> Bag:
    """Keep the ``keep`` largest weights and round ``scale`` times each to whole impacts.

    Tokens with impact 0 are left out; a tie at the edge goes to the smaller id.
    """
    ids = np.asarray(tokens, np.int64)
    order = np.argsort(ids, kind="stable")
    ids, weights = ids[order], np.asarray(weights, np.float32)[order]
    chosen = np.sort(strongest(weights, keep))
    impacts = np.rint(np.float32(scale) * weights[chosen]).astype(np.int32)
    kept = impacts > 0
    return Bag(tokens=ids[chosen][kept].astype(np.int32), impacts=impacts[kept])
