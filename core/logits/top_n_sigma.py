"""Top-n-sigma truncation: keep logits within n standard deviations of the best one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..array import Array, array_namespace
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
    if n <= 0:
        return logits
    xp = array_namespace(logits)
    top = xp.max(logits, axis=-1, keepdims=True)
    some = logits > -xp.inf
    # Distances to the best keep float32 sums small; removed entries count as nothing.
    below = xp.where(some, top - logits, xp.zeros_like(logits))
    count = xp.sum(xp.astype(some, logits.dtype), axis=-1, keepdims=True)
    count = xp.where(count > 0, count, xp.ones_like(count))
    mean = xp.sum(below, axis=-1, keepdims=True) / count
    spread = xp.where(some, (below - mean) ** 2, xp.zeros_like(logits))
    sigma = xp.sqrt(xp.sum(spread, axis=-1, keepdims=True) / count)
    return xp.where(logits >= top - n * sigma, logits, -xp.inf)


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

    def __call__(self, logits: Array, context: Context) -> Array:
        return apply_top_n_sigma(logits, self.n)
