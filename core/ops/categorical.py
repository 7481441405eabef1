"""Draw from a categorical distribution by inverting its cumulative distribution."""

from __future__ import annotations

import math

import numpy as np

from ..array import Array, array_namespace, asarray_like, wide_dtype
from .native import native
from .softmax import relative_probs
from .sorting import positions_like

_BLOCK = 256


@native
def categorical(logits: Array, uniform: Array) -> Array:
    """Return the index drawn from ``softmax(logits)`` by ``uniform``.

    The cumulative distribution runs in the order of the entries: the result is the first index
    whose cumulative probability exceeds ``uniform``. Equal inputs thus give the same index on every
    library, up to rounding (float32 exponentials, summed in float64 where the library has it).

    Parameters
    ----------
    logits : float array (..., V)
    uniform : float array (...) or host floats
        In [0, 1]; 1 gives the last entry that has any probability.

    Returns
    -------
    signed integer array (...)
        Never an entry of -inf; -1 for a row that holds nothing else.
    """
    xp = array_namespace(logits)
    wide = wide_dtype(logits)
    if not hasattr(uniform, "shape") or isinstance(uniform, np.ndarray):
        uniform = asarray_like(uniform, logits)
    uniform = xp.astype(uniform, wide)[..., None]
    weights = relative_probs(logits)
    total = xp.cumulative_sum(xp.astype(weights, wide), axis=-1)
    places = positions_like(logits)
    possible = weights > 0
    # Parallel prefix sums need not rise everywhere, so ask for the first that passes, not a count.
    passed = possible & (total > uniform * total[..., -1:])
    size = logits.shape[-1]
    first = xp.min(xp.where(passed, places, xp.full_like(places, size)), axis=-1)
    last = xp.max(xp.where(possible, places, xp.full_like(places, -1)), axis=-1)
    return xp.where(first < size, first, last)


def draw_1d(logits: Array, uniform: float) -> tuple[int, float]:
    """Return the index drawn from one NumPy row (n,) and its log-probability.

    The same as :func:`categorical`, at the cost of one pass and two short searches.
    """
    weights = logits - logits.max()
    np.exp(weights, out=weights)
    size = len(weights)
    if size <= 2 * _BLOCK:
        totals = weights.cumsum(dtype=np.float64)
        total = float(totals[-1])
        index = int(totals.searchsorted(uniform * total, side="right"))
    else:
        even = size - size % _BLOCK
        sums = weights[:even].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
        blocks = np.cumsum(np.append(sums, weights[even:].sum(dtype=np.float64)))
        total = float(blocks[-1])
        goal = uniform * total
        block = min(int(np.searchsorted(blocks, goal, side="right")), len(blocks) - 1)
        within = weights[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64)
        within[0] += blocks[block - 1] if block else 0.0
        index = block * _BLOCK + int(np.searchsorted(np.cumsum(within), goal, side="right"))
    if index >= size or not weights[index] > 0:
        # Rounding at the end of a block, or a uniform of 1: the nearest entry that can be drawn.
        possible = np.flatnonzero(weights)
        index = int(possible[max(int(np.searchsorted(possible, index, side="right")) - 1, 0)])
    return index, math.log(float(weights[index]) / total)


@categorical.twin("numpy")
def _categorical_numpy(logits: Array, uniform: Array) -> Array:
    size = logits.shape[-1]
    flat = logits.reshape(-1, size)
    draws = np.broadcast_to(np.asarray(uniform, np.float64), logits.shape[:-1]).reshape(-1)
    out = np.empty(len(flat), np.int64)
    for row, values in enumerate(flat):
        out[row] = -1 if values.max() == -np.inf else draw_1d(values, draws[row])[0]
    return out.reshape(logits.shape[:-1])
