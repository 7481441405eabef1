"""From laws of the next byte to one: mixing models, sharpening, truncating."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...array import Array, array_namespace
from ...ops import smallest_set
from .vocabulary import FloatArray

FLOOR = 1e-7


def sharpened(probs: Array, temperature: float, top_p: float = 1.0) -> Array:
    """Return probabilities (..., S) raised to ``1 / temperature`` and cut to a nucleus.

    ``(p + 1e-7) ** (1 / temperature)``, normalised, as in the authors' code; symbols of
    probability 0 stay impossible, and a temperature of 1 changes nothing. This acts on bytes, which
    is not what the same temperature does to tokens.

    Parameters
    ----------
    probs : float array (..., S)
    temperature : float
        Below 0.1 only the likeliest symbol is left (the first of several).
    top_p : float in (0, 1]
        Share of the probability that the likeliest symbols kept must reach.
    """
    xp = array_namespace(probs)
    if temperature < 0.1:
        best = xp.argmax(probs, axis=-1, keepdims=True)
        places = xp.astype(xp.cumulative_sum(xp.ones_like(probs), axis=-1) - 1, best.dtype)
        return xp.where(places == best, xp.ones_like(probs), xp.zeros_like(probs))
    if temperature != 1:
        raised = (probs + FLOOR) ** (1 / temperature)
        probs = xp.where(probs > 0, raised, xp.zeros_like(probs))
        probs = probs / xp.sum(probs, axis=-1, keepdims=True)
    if top_p < 1:
        keep = smallest_set(probs, probs, top_p)
        probs = xp.where(keep, probs, xp.zeros_like(probs))
        probs = probs / xp.sum(probs, axis=-1, keepdims=True)
    return probs


def mixture(laws: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
    """Return the weighted arithmetic mean of laws (S,), each normalised first.

    A law that is 0 everywhere has no say.
    """
    total = np.zeros_like(laws[0])
    for law, weight in zip(laws, weights, strict=True):
        if (mass := law.sum()) > 0:
            total += weight * law / mass
    mass = total.sum()
    return total / mass if mass > 0 else total
