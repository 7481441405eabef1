"""Top-p (nucleus) truncation: keep the smallest set that holds a share p of the probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..array import Array, array_namespace
from ..ops import smallest_set, softmax
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
    if p >= 1:
        return logits
    xp = array_namespace(logits)
    return xp.where(smallest_set(logits, softmax(logits), p, ordered=ordered), logits, -xp.inf)


@dataclass(frozen=True, kw_only=True)
class TopP(Stage):
    """Keep the smallest set of tokens with probability ``p`` in sum; 1 is off."""

    name: ClassVar[str] = "top_p"
    truncates: ClassVar[bool] = True
    p: float = 0.95

    def __post_init__(self) -> None:
        check_number(self.name, "p", self.p, 0, 1, low_open=True)

    @property
    def off(self) -> bool:
        return self.p == 1

    def __call__(self, logits: Array, context: Context) -> Array:
        return apply_top_p(logits, self.p, ordered=context.ordered)
