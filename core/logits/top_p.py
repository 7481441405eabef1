"""Top-p (nucleus) truncation: keep the smallest set that holds a share p of the probability."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from ..array import Array
from ..ops import mask_out, relative_probs, smallest_set
from .stage import Context, Stage, check_number


def apply_top_p(logits: Array, p: float, *, ordered: bool = False) -> Array:
    """Set to -inf all but the fewest most likely tokens whose probabilities reach ``p``.

    Parameters
    ----------
    logits : float array (..., V)
    p : float in (0, 1]
        1 keeps everything; towards 0 only the most likely token stays. Of equal logits the lower
        ids count first.
    ordered : bool
        Logits already fall along the last axis.

    References
    ----------
    Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751.
    """
    return logits if p >= 1 else mask_out(logits, keep_top_p(logits, p, ordered=ordered))


def keep_top_p(logits: Array, p: float, *, ordered: bool = False) -> Array:
    """Return the mask (..., V) of :func:`apply_top_p`; p < 1."""
    return smallest_set(logits, relative_probs(logits), p, ordered=ordered)


@dataclass(frozen=True, kw_only=True)
class TopP(Stage):
    """Keep the smallest set of tokens with probability ``p`` in sum; 1 is off."""

    name: ClassVar[str] = "top_p"
    truncates: ClassVar[bool] = True
    listwise: ClassVar[bool] = True
    p: float = 0.95

    def __post_init__(self) -> None:
        check_number(self.name, "p", self.p, 0, 1, low_open=True)

    @property
    def off(self) -> bool:
        return self.p == 1

    def keep(self, logits: Array, context: Context) -> Array:
        return keep_top_p(logits, self.p, ordered=context.ordered)

    def on_list(self, values: list[float]) -> list[float]:
        totals = list(accumulate([math.exp(value - values[0]) for value in values]))
        return values[: bisect_left(totals, self.p * totals[-1]) + 1]
