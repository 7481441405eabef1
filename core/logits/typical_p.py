"""Locally typical sampling: keep tokens whose surprise is near the expected one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..array import Array, array_namespace
from ..ops import entropy, log_softmax, mask_out, smallest_set
from .stage import Context, Stage, check_number


def apply_typical_p(logits: Array, p: float) -> Array:
    """Keep the fewest tokens with surprise nearest to the entropy that hold probability ``p``.

    Tokens are ranked by ``|-log(prob) - entropy|``, smallest first (equal ones by id), and taken
    until their probabilities reach ``p``; the others become -inf. The most likely token may go.

    Parameters
    ----------
    logits : float array (..., V)
    p : float in (0, 1]
        1 keeps everything.

    References
    ----------
    Meister et al., "Locally Typical Sampling", arXiv:2202.00666.
    """
    return logits if p >= 1 else mask_out(logits, keep_typical_p(logits, p))


def keep_typical_p(logits: Array, p: float) -> Array:
    """Return the mask (..., V) of :func:`apply_typical_p`; p < 1."""
    xp = array_namespace(logits)
    logprobs = log_softmax(logits)
    distance = xp.abs(logprobs + entropy(logits)[..., None])
    return smallest_set(-distance, xp.exp(logprobs), p)


@dataclass(frozen=True, kw_only=True)
class TypicalP(Stage):
    """Keep the most typical tokens with probability ``p`` in sum; 1 is off."""

    name: ClassVar[str] = "typical_p"
    changes_argmax: ClassVar[bool] = True
    truncates: ClassVar[bool] = True
    p: float = 0.95

    def __post_init__(self) -> None:
        check_number(self.name, "p", self.p, 0, 1, low_open=True)

    @property
    def off(self) -> bool:
        return self.p == 1

    def keep(self, logits: Array, context: Context) -> Array:
        return keep_typical_p(logits, self.p)
