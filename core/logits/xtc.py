"""XTC, exclude top choices: now and then remove all but the least of the likely tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..array import Array, array_namespace, asarray_like
from ..ops import log_softmax
from ..ops.sorting import positions_like
from .stage import Context, Stage, check_number


def apply_xtc(logits: Array, threshold: float, active: Array | bool = True) -> Array:
    """Remove every token of at least ``threshold`` probability but the least likely of them.

    Where fewer than two tokens reach the threshold nothing happens. Of equal least likely ones the
    highest id stays.

    Parameters
    ----------
    logits : float array (..., V)
    threshold : float in [0, 1]
        Above 0.5 at most one token can reach it: off.
    active : bool array (...) or bool
        Rows in which to remove anything.

    References
    ----------
    p-e-w, "Exclude Top Choices (XTC)", oobabooga/text-generation-webui pull request 6335.
    """
    if threshold > 0.5:
        return logits
    xp = array_namespace(logits)
    likely = logits > -xp.inf
    if threshold > 0:
        likely = likely & (log_softmax(logits) >= math.log(threshold))
    least = xp.min(xp.where(likely, logits, xp.inf), axis=-1, keepdims=True)
    places = positions_like(logits)
    equal = likely & (logits == least)
    stays = xp.max(xp.where(equal, places, xp.full_like(places, -1)), axis=-1, keepdims=True)
    remove = likely & (places != stays)
    if not isinstance(active, bool):
        remove = remove & active[..., None]
    elif not active:
        return logits
    return xp.where(remove, -xp.inf, logits)


@dataclass(frozen=True, kw_only=True)
class XTC(Stage):
    """With chance ``probability``, exclude the top choices; probability 0 is off.

    Parameters
    ----------
    threshold : float in [0, 1]
        Probability from which a token is a top choice.
    probability : float in [0, 1]
        How often the exclusion happens; drawn anew for every row and position.
    """

    name: ClassVar[str] = "xtc"
    changes_argmax: ClassVar[bool] = True
    needs_uniform: ClassVar[bool] = True
    threshold: float = 0.1
    probability: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.name, "threshold", self.threshold, 0, 1)
        check_number(self.name, "probability", self.probability, 0, 1)

    @property
    def off(self) -> bool:
        return self.probability == 0 or self.threshold > 0.5

    def __call__(self, logits: Array, context: Context) -> Array:
        assert context.uniforms is not None
        active = np.asarray(context.uniforms) < self.probability
        if not active.any():
            return logits
        return apply_xtc(logits, self.threshold, asarray_like(active, logits))
