"""Softmax and its logarithm, safe for rows that hold -inf only."""

from __future__ import annotations

import math

import numpy as np

from ..array import Array, array_namespace, library_module
from .native import native


def _peak(logits: Array) -> Array:
    """Return the largest entry (..., 1), or 0 where it is infinite, to be subtracted safely."""
    xp = array_namespace(logits)
    top = xp.max(logits, axis=-1, keepdims=True)
    return xp.where(xp.isfinite(top), top, xp.zeros_like(top))


@native
def relative_probs(logits: Array) -> Array:
    """Return ``exp(logits - max(logits))`` (..., V): probabilities as multiples of the largest.

    A row of only -inf gives 0 everywhere.
    """
    return array_namespace(logits).exp(logits - _peak(logits))


@relative_probs.twin("numpy")
def _relative_probs_numpy(logits: Array) -> Array:
    top = logits.max(axis=-1, keepdims=True)
    if not math.isfinite(top.min()):
        top = np.where(np.isfinite(top), top, np.zeros_like(top))
    weights = logits - top
    return np.exp(weights, out=weights)


@native
def logsumexp(logits: Array, *, keepdims: bool = False) -> Array:
    """Return ``log(sum(exp(logits)))`` over the last axis, in the dtype of ``logits``.

    Parameters
    ----------
    logits : float array (..., V)
        -inf entries count as nothing.
    keepdims : bool
        Keep the last axis with length 1.

    Returns
    -------
    float array (...) or (..., 1)
        -inf for a row of only -inf.
    """
    xp = array_namespace(logits)
    top = _peak(logits)
    total = xp.sum(xp.exp(logits - top), axis=-1, keepdims=True)
    some = total > 0
    # log(1) stands in where nothing was summed, so that no library warns about log(0).
    result = xp.where(some, xp.log(xp.where(some, total, xp.ones_like(total))) + top, -xp.inf)
    return result if keepdims else xp.squeeze(result, axis=-1)


@logsumexp.twin("numpy")
def _logsumexp_numpy(logits: Array, *, keepdims: bool = False) -> Array:
    top = logits.max(axis=-1, keepdims=True)
    if not math.isfinite(top.min()):
        return logsumexp.portable(logits, keepdims=keepdims)
    weights = logits - top
    np.exp(weights, out=weights)
    result = np.log(weights.sum(axis=-1, keepdims=True)) + top
    return result if keepdims else result[..., 0]


@logsumexp.twin("torch")
def _logsumexp_torch(logits: Array, *, keepdims: bool = False) -> Array:
    return library_module(logits).logsumexp(logits, dim=-1, keepdim=keepdims)


def log_softmax(logits: Array) -> Array:
    """Return ``logits - logsumexp(logits)`` (..., V): natural-log probabilities, same dtype.

    A row of only -inf stays -inf everywhere.
    """
    xp = array_namespace(logits)
    total = logsumexp(logits, keepdims=True)
    return logits - xp.where(xp.isfinite(total), total, xp.zeros_like(total))


def softmax(logits: Array) -> Array:
    """Return probabilities (..., V) in the dtype of ``logits``.

    A row of only -inf, which has no distribution, gives 0 everywhere.
    """
    xp = array_namespace(logits)
    weights = relative_probs(logits)
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total > 0, total, xp.ones_like(total))
