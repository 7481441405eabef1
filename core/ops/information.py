"""Entropy and divergences of distributions given as logits, in nats."""

from __future__ import annotations

import math

import numpy as np

from ..array import Array, array_namespace
from .native import native
from .softmax import log_softmax


def _expected(probs: Array, terms: Array) -> Array:
    """Return ``sum(probs * terms)`` over the last axis, with 0 wherever ``probs`` is 0."""
    xp = array_namespace(probs)
    zero = xp.zeros_like(probs)
    some = probs > 0
    return xp.sum(xp.where(some, probs * xp.where(some, terms, zero), zero), axis=-1)


@native
def entropy(logits: Array) -> Array:
    """Return the Shannon entropy (...) of ``softmax(logits)``, in nats.

    0 for a row with one possible entry, and for a row of only -inf.
    """
    xp = array_namespace(logits)
    logprobs = log_softmax(logits)
    return -_expected(xp.exp(logprobs), logprobs)


@entropy.twin("numpy")
def _entropy_numpy(logits: Array) -> Array:
    logprobs = log_softmax(logits)
    probs = np.exp(logprobs)
    # 0 times a large number instead of 0 times inf.
    return -np.einsum("...v,...v->...", probs, np.maximum(logprobs, -1e30, out=logprobs))


def kl_divergence(logits: Array, other: Array) -> Array:
    """Return ``KL(softmax(logits) || softmax(other))`` (...), in nats.

    Parameters
    ----------
    logits, other : float array (..., V)
        Shapes broadcast. inf where ``other`` excludes (-inf) what ``logits`` allows.
    """
    xp = array_namespace(logits, other)
    p, q = xp.broadcast_arrays(log_softmax(logits), log_softmax(other))
    some = p > -xp.inf
    zero = xp.zeros_like(p)
    gap = xp.where(some, p, zero) - xp.where(some, q, zero)
    return _expected(xp.exp(p), gap)


def js_divergence(logits: Array, other: Array) -> Array:
    """Return the Jensen-Shannon divergence (...) of two softmaxes, in nats: 0 to log 2.

    The mean divergence of both distributions from their even mixture.
    """
    xp = array_namespace(logits, other)
    p, q = xp.broadcast_arrays(log_softmax(logits), log_softmax(other))
    # log(mixture) without logaddexp, whose -inf - -inf is NaN in gradients.
    mixture = (xp.exp(p) + xp.exp(q)) / 2
    some = mixture > 0
    log_mixture = xp.log(xp.where(some, mixture, xp.ones_like(mixture)))
    zero = xp.zeros_like(p)

    def against_mixture(logprobs: Array) -> Array:
        able = logprobs > -xp.inf
        gap = xp.where(able, logprobs, zero) - xp.where(able, log_mixture, zero)
        return _expected(xp.exp(logprobs), gap)

    both = (against_mixture(p) + against_mixture(q)) / 2
    return xp.clip(both, 0.0, math.log(2.0))
