"""Top-n-sigma truncation: keep logits within n standard deviations of the best one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..array import Array, array_namespace
from ..ops import mask_out, native
from .stage import Context, Stage, check_number


def apply_top_n_sigma(logits: Array, n: float) -> Array:
    """Set to -inf every logit below ``max(logits) - n * sigma``.

    Parameters
    ----------
    logits : float array (..., V)
        ``sigma`` is the population standard deviation of the entries above -inf.
    n : float >= 0
        0 keeps everything.

    Notes
    -----
    Temperature scales ``max`` and ``sigma`` alike, so its place in the chain does not matter. As in
    llama.cpp 0 means off; by the formula alone it would keep only the most likely token.

    References
    ----------
    Tang et al., "Top-nσ: Not All Logits Are You Need", arXiv:2411.07641.
    """
    return logits if n <= 0 else mask_out(logits, keep_top_n_sigma(logits, n))


def keep_top_n_sigma(logits: Array, n: float) -> Array:
    """Return the mask (..., V) of :func:`apply_top_n_sigma`; n > 0."""
    xp = array_namespace(logits)
    top = xp.max(logits, axis=-1, keepdims=True)
    return logits >= top - n * finite_std(logits)


@native
def finite_std(logits: Array) -> Array:
    """Return the population standard deviation (..., 1) of the entries above -inf."""
    xp = array_namespace(logits)
    top = xp.max(logits, axis=-1, keepdims=True)
    some = logits > -xp.inf
    # Distances to the best keep float32 sums small; removed entries count as nothing.
    below = xp.where(some, top - logits, xp.zeros_like(logits))
    count = xp.sum(xp.astype(some, logits.dtype), axis=-1, keepdims=True)
    count = xp.where(count > 0, count, xp.ones_like(count))
    mean = xp.sum(below, axis=-1, keepdims=True) / count
    spread = xp.where(some, (below - mean) ** 2, xp.zeros_like(logits))
    return xp.sqrt(xp.sum(spread, axis=-1, keepdims=True) / count)


@finite_std.twin("numpy")
def _finite_std_numpy(logits: Array) -> Array:
    if logits.min() > -np.inf:
        return logits.std(axis=-1, keepdims=True)
    return finite_std.portable(logits)


@dataclass(frozen=True, kw_only=True)
class TopNSigma(Stage):
    """Keep logits within ``n`` standard deviations of the best one; 0 is off."""

    name: ClassVar[str] = "top_n_sigma"
    truncates: ClassVar[bool] = True
    n: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.name, "n", self.n, 0, 1000)

    @property
    def off(self) -> bool:
        return self.n == 0

    def keep(self, logits: Array, context: Context) -> Array:
        return keep_top_n_sigma(logits, self.n)
