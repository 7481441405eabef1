"""The largest entries of a row, the same ones on every library.

Everywhere here, entries that are equal rank by index, the lower one first.
"""

from __future__ import annotations

import numpy as np

from ..array import Array, array_namespace, device_of, is_mlx, wide_dtype
from .native import native


def positions_like(x: Array) -> Array:
    """Return 0..n-1 for the last axis of ``x``, in the library and on the device of ``x``."""
    xp = array_namespace(x)
    if is_mlx(x):
        return xp.arange(x.shape[-1])
    return xp.arange(x.shape[-1], device=device_of(x))


_FEW = 256  # entries that usually hold nearly all the probability


@native
def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Return the ``k`` largest entries of each row and where they are, largest first.

    Parameters
    ----------
    x : float array (..., V)
        No NaN.
    k : int
        1 or more; at most V are returned.

    Returns
    -------
    values : float array (..., k)
    indices : signed integer array (..., k)
        Of equal entries the one with the lower index is taken and stands first, on every library.
    """
    xp = array_namespace(x)
    order = xp.argsort(x, axis=-1, descending=True, stable=True)[..., : min(k, x.shape[-1])]
    return xp.take_along_axis(x, order, axis=-1), order


def _top_indices_1d(x: Array, k: int) -> Array:
    """Return the sorted-by-rank indices of the ``k`` largest entries of one NumPy row.

    The ``k``-th largest of many column maxima is a lower bound of the ``k``-th largest entry, so
    a few hundred entries remain after one SIMD pass instead of V.
    """
    size = x.shape[0]
    width = 4 * max(k, 64)
    if size >= 8 * width:
        rows = size // width
        peaks = x[: rows * width].reshape(rows, width).max(axis=0)
        peaks.partition(width - k)
        near = (x >= peaks[width - k]).nonzero()[0]
    else:
        near = np.arange(size)
    values = x[near]
    if len(near) > 4 * k + 64:  # many entries above the bound (ties, or a skewed order)
        cut = np.partition(values, len(near) - k)[len(near) - k]
        above = np.flatnonzero(values > cut)
        level = np.flatnonzero(values == cut)[: k - len(above)]
        chosen = np.sort(np.concatenate([above, level]))
        near, values = near[chosen], values[chosen]
    # ``near`` rises, so a stable sort of the negated values keeps ties in order of index.
    return near[(-values).argsort(kind="stable")[:k]]


@top_k.twin("numpy")
def _top_k_numpy(x: Array, k: int) -> tuple[Array, Array]:
    size = x.shape[-1]
    k = min(k, size)
    if x.ndim == 1:
        indices = _top_indices_1d(x, k)
        return x[indices], indices
    flat = x.reshape(-1, size)
    indices = np.empty((len(flat), k), np.int64)
    for row, out in zip(flat, indices):
        out[:] = _top_indices_1d(row, k)
    indices = indices.reshape(*x.shape[:-1], k)
    return np.take_along_axis(x, indices, axis=-1), indices


def _rank_ties(x: Array, indices: Array) -> tuple[Array, Array]:
    """Sort chosen ``indices`` (..., k), given in rising order, by falling value of ``x``."""
    xp = array_namespace(x)
    values = xp.take_along_axis(x, indices, axis=-1)
    order = xp.argsort(values, axis=-1, descending=True, stable=True)
    return (
        xp.take_along_axis(values, order, axis=-1),
        xp.take_along_axis(indices, order, axis=-1),
    )


def _tie_keys(x: Array, cut: Array) -> Array:
    """Return integer keys whose ``k`` smallest belong to the top ``k``: lower index wins ties."""
    xp = array_namespace(x)
    size = x.shape[-1]
    places = positions_like(x)
    return xp.where(x > cut, places - size, xp.where(x == cut, places, places + size))


@top_k.twin("torch")
def _top_k_torch(x: Array, k: int) -> tuple[Array, Array]:
    xp = array_namespace(x)
    k = min(k, x.shape[-1])
    # torch.topk leaves open which of several equal entries it takes; a second pass on integer keys
    # settles it without asking the device how many there were.
    values, _ = xp.topk(x, k, dim=-1)
    keys, indices = xp.topk(_tie_keys(x, values[..., -1:]), k, dim=-1, largest=False, sorted=True)
    del keys
    indices = xp.sort(indices, axis=-1)
    return _rank_ties(x, indices)


@top_k.twin("mlx")
def _top_k_mlx(x: Array, k: int) -> tuple[Array, Array]:
    xp = array_namespace(x)
    k = min(k, x.shape[-1])
    cut = xp.min(xp.topk(x, k, axis=-1), axis=-1, keepdims=True)
    keys = xp.sort(xp.topk(-_tie_keys(x, cut), k, axis=-1), axis=-1)
    indices = -keys
    indices = xp.where(indices < 0, indices + x.shape[-1], indices)
    return _rank_ties(x, xp.sort(indices, axis=-1))


def mask_out(logits: Array, keep: Array) -> Array:
    """Return ``logits`` (..., V) with -inf wherever ``keep`` (..., V) is False."""
    if isinstance(logits, np.ndarray):  # half the time of np.where
        out = np.full_like(logits, -np.inf)
        np.copyto(out, logits, where=keep)
        return out
    xp = array_namespace(logits)
    return xp.where(keep, logits, -xp.inf)


@native
def smallest_set(key: Array, weights: Array, share: float, *, ordered: bool = False) -> Array:
    """Mark the fewest entries, by falling ``key``, that hold ``share`` of the weight.

    Parameters
    ----------
    key : float array (..., V)
        Rank of the entries; equal keys rank by index.
    weights : float array (..., V)
        Non-negative; need not sum to 1.
    share : float in (0, 1]
    ordered : bool
        ``key`` already falls along the last axis.

    Returns
    -------
    bool array (..., V)
        At least one entry of each row is marked. Sums are float64 where the library has it.
    """
    xp = array_namespace(key)
    if not ordered:
        order = xp.argsort(key, axis=-1, descending=True, stable=True)
        weights = xp.take_along_axis(weights, order, axis=-1)
    total = xp.cumulative_sum(xp.astype(weights, wide_dtype(weights)), axis=-1)
    # An entry is kept as long as those before it fall short of the share.
    short = total[..., :-1] < share * total[..., -1:]
    first = total[..., :1] == total[..., :1]
    if ordered:
        return xp.concat([first, short], axis=-1)
    last = xp.sum(xp.astype(short, order.dtype), axis=-1, keepdims=True)
    last_place = xp.take_along_axis(order, last, axis=-1)
    last_key = xp.take_along_axis(key, last_place, axis=-1)
    return (key > last_key) | ((key == last_key) & (positions_like(key) <= last_place))


@smallest_set.twin("numpy")
def _smallest_set_numpy(
    key: Array, weights: Array, share: float, *, ordered: bool = False
) -> Array:
    if ordered:
        total = weights.cumsum(axis=-1, dtype=np.float64)
        keep = np.empty(key.shape, np.bool_)
        keep[..., 0] = True
        np.less(total[..., :-1], share * total[..., -1:], out=keep[..., 1:])
        return keep
    size = key.shape[-1]
    flat_key, flat_weights = key.reshape(-1, size), weights.reshape(-1, size)
    keep = np.zeros(flat_key.shape, np.bool_)
    for row, (k, w) in enumerate(zip(flat_key, flat_weights)):
        keep[row, _smallest_set_1d(k, w, share)] = True
    return keep.reshape(key.shape)


def _smallest_set_1d(key: Array, weights: Array, share: float) -> Array:
    """Return the indices of the smallest set of one NumPy row without sorting all of it.

    Mostly a few hundred entries hold the share. Otherwise a search like quickselect, which halves
    the undecided part until it is short, finds where to stop.
    """
    goal = share * weights.sum(dtype=np.float64)
    best = _top_indices_1d(key, min(_FEW, len(key)))
    total = np.cumsum(weights[best], dtype=np.float64)
    if len(best) == len(key) or total[-1] >= goal:
        return best[: np.searchsorted(total[:-1], goal) + 1]
    undecided, taken, sure = np.arange(len(key)), 0.0, []
    while len(undecided) > 4 * _FEW:
        keys = key[undecided]
        # The median of a sample; "above" is neither empty nor everything unless all are equal.
        sample = np.sort(keys[:: len(keys) // 127])
        pivot = sample[len(sample) // 2]
        above = keys > pivot
        if not above.any():
            above = keys >= pivot
            if above.all():
                break
        inside = undecided[np.flatnonzero(above)]
        mass = weights[inside].sum(dtype=np.float64)
        if taken + mass >= goal:
            undecided = inside
        else:
            sure.append(inside)
            taken += mass
            undecided = undecided[np.flatnonzero(~above)]
    order = undecided[np.argsort(-key[undecided], kind="stable")]
    total = taken + np.cumsum(weights[order], dtype=np.float64)
    sure.append(order[: np.searchsorted(total[:-1], goal) + 1])
    return np.concatenate(sure)
