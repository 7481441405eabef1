"""Elementwise functions that the array standard lacks."""

from __future__ import annotations

import math

import numpy as np

from ..array import Array, array_namespace, asarray_like, library_module, to_numpy
from .native import native


@native
def erf(x: Array) -> Array:
    """Return the error function of every entry.

    Libraries without one of their own go through the host, so this is for small arrays.
    """
    host = np.asarray(to_numpy(x), np.float64)
    values = np.asarray(np.frompyfunc(math.erf, 1, 1)(host), np.float64)
    return asarray_like(values, x, dtype=x.dtype)


@erf.twin("torch")
def _erf_torch(x: Array) -> Array:
    return library_module(x).erf(x)


@erf.twin("mlx")
def _erf_mlx(x: Array) -> Array:
    return library_module(x).erf(x)


def gelu(x: Array) -> Array:
    """Return ``x * Phi(x)`` with the exact normal distribution function ``Phi``.

    References
    ----------
    Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
    """
    return x * (0.5 + 0.5 * erf(x / math.sqrt(2)))


def softplus(x: Array) -> Array:
    """Return ``log(1 + exp(x))`` without overflow."""
    xp = array_namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-5) -> Array:
    """Return ``x`` (..., D) with mean 0 and variance 1 along the last axis, scaled and shifted."""
    xp = array_namespace(x)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return centred / xp.sqrt(variance + eps) * weight + bias
