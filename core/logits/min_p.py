"""Min-p truncation: keep tokens at least ``p`` times as likely as the best one."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from operator import neg
from typing import ClassVar

import numpy as np

from ..array import Array, array_namespace
from ..ops import mask_out
from .stage import Context, Stage, check_number


def apply_min_p(logits: Array, p: float) -> Array:
    """Set to -inf every logit below ``max(logits) + log(p)``.

    Softmax shifts all logits alike, so ``prob >= p * max(prob)`` needs no sum.

    Parameters
    ----------
    logits : float array (..., V)
    p : float in [0, 1]
        0 keeps everything; 1 keeps only the most likely token and its equals.

    References
    ----------
    Nguyen et al., "Turning Up the Heat: Min-p Sampling", arXiv:2407.01082.
    """
    return logits if p <= 0 else mask_out(logits, keep_min_p(logits, p))


def keep_min_p(logits: Array, p: float) -> Array:
    """Return the mask (..., V) of :func:`apply_min_p`; p > 0."""
    xp = array_namespace(logits)
    return logits >= xp.max(logits, axis=-1, keepdims=True) + math.log(p)


@dataclass(frozen=True, kw_only=True)
class MinP(Stage):
    """Keep tokens at least ``p`` times as likely as the best one; 0 is off."""

    name: ClassVar[str] = "min_p"
    truncates: ClassVar[bool] = True
    listwise: ClassVar[bool] = True
    p: float = 0.05

    def __post_init__(self) -> None:
        check_number(self.name, "p", self.p, 0, 1)

    @property
    def off(self) -> bool:
        return self.p == 0

    def keep(self, logits: Array, context: Context) -> Array:
        return keep_min_p(logits, self.p)

    def on_list(self, values: list[float]) -> list[float]:
        floor = float(np.float32(values[0]) + np.float32(math.log(self.p)))  # as on float32 arrays
        return values[: bisect_right(values, -floor, key=neg)]
