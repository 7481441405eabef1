"""Temperature: sharpen or flatten the distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..array import Array, array_namespace
from ..ops.sorting import positions_like
from .stage import Context, Stage, check_number

GREEDY_BELOW = 1e-6  # a float32 logit divided by less than this may overflow


def apply_temperature(logits: Array, t: float) -> Array:
    """Divide logits by ``t``, so that probabilities become ``p ** (1 / t)``, renormalised.

    Parameters
    ----------
    logits : float array (..., V)
    t : float >= 0
        1 changes nothing, below 1 sharpens, above flattens. 0 (and anything below 1e-6) keeps only
        the most likely token, the lowest id among equals.
    """
    if t >= GREEDY_BELOW:
        return logits / t
    xp = array_namespace(logits)
    best = xp.argmax(logits, axis=-1, keepdims=True)
    return xp.where(positions_like(logits) == best, logits, -xp.inf)


@dataclass(frozen=True, kw_only=True)
class Temperature(Stage):
    """Divide logits by ``t``; 0 is greedy, 1 is off."""

    name: ClassVar[str] = "temperature"
    listwise: ClassVar[bool] = True
    t: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.name, "t", self.t, 0, 10_000)

    @property
    def off(self) -> bool:
        return self.t == 1

    @property
    def greedy(self) -> bool:
        """Whether only the most likely token remains."""
        return self.t < GREEDY_BELOW

    def __call__(self, logits: Array, context: Context) -> Array:
        return apply_temperature(logits, self.t)

    def on_list(self, values: list[float]) -> list[float]:
        return values[:1] if self.greedy else [value / self.t for value in values]
