"""Read and replace a few entries of a matrix, without a dense mask where the library allows it."""

from __future__ import annotations

import numpy as np

from ..array import Array, array_namespace, asarray_like, library_module
from ..model import IntArray
from .native import native


def take_at(x: Array, rows: IntArray, columns: IntArray) -> Array:
    """Return ``x[rows[i], columns[i]]`` (m,) of ``x`` (B, V) for host indices (m,)."""
    if isinstance(x, np.ndarray):
        return x[rows, columns]
    xp = array_namespace(x)
    flat = asarray_like(rows * x.shape[1] + columns, x)
    return xp.take(xp.reshape(x, (-1,)), flat, axis=0)


@native
def put_at(x: Array, rows: IntArray, columns: IntArray, values: Array) -> Array:
    """Return a copy of ``x`` (B, V) with ``values`` (m,) at host indices ``rows``, ``columns``.

    Parameters
    ----------
    x : array (B, V)
    rows, columns : int64 (m,)
        No pair twice.
    values : array (m,)
        Of the library and dtype of ``x``.
    """
    xp = array_namespace(x)
    if len(rows) == 0:
        return x
    # The standard has no scatter: look every entry up in a table of the new values instead.
    slots = np.full(x.shape, -1, np.int64)
    slots[rows, columns] = np.arange(len(rows))
    slot = asarray_like(slots, x)
    table = xp.take(values, xp.reshape(xp.where(slot < 0, 0, slot), (-1,)), axis=0)
    return xp.where(slot < 0, x, xp.reshape(table, x.shape))


@put_at.twin("numpy")
def _put_at_numpy(x: Array, rows: IntArray, columns: IntArray, values: Array) -> Array:
    out = x.copy()
    out[rows, columns] = values
    return out


@put_at.twin("torch")
def _put_at_torch(x: Array, rows: IntArray, columns: IntArray, values: Array) -> Array:
    places = (asarray_like(rows, x), asarray_like(columns, x))
    return x.index_put(places, values)


@put_at.twin("mlx")
def _put_at_mlx(x: Array, rows: IntArray, columns: IntArray, values: Array) -> Array:
    out = library_module(x).array(x)
    if len(rows):
        out[asarray_like(rows, x), asarray_like(columns, x)] = values
    return out
