"""How sure a masked position is, and which positions a pass fixes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ...array import Array, array_namespace
from ...ops import entropy, logsumexp, target_logprobs, top_k

Algorithm = Literal["confidence_threshold", "origin", "entropy", "topk_margin"]


def confidences(logits: Array, tokens: Array, algorithm: Algorithm) -> Array:
    """Return one confidence per row; only their order and the threshold give it meaning.

    Parameters
    ----------
    logits : float array (m, V)
    tokens : int array (m,)
        The token each row would be fixed to.
    algorithm : str
        "origin" and "confidence_threshold": probability of that token, 0..1. "entropy": negative
        entropy in nats, at most 0. "topk_margin": probability of the likeliest token less that of
        the second, 0..1.
    """
    xp = array_namespace(logits)
    if algorithm == "entropy":
        return -entropy(logits)
    if algorithm == "topk_margin":
        values, _ = top_k(logits, 2)
        probs = xp.exp(values - logsumexp(logits, keepdims=True))
        return probs[:, 0] if probs.shape[-1] == 1 else probs[:, 0] - probs[:, 1]
    return xp.exp(target_logprobs(logits, tokens))


def to_fix(
    confidence: npt.NDArray[np.floating], threshold: float | None, near: float = 0.0
) -> npt.NDArray[np.bool_]:
    """Return which of the masked positions (m,) to fix now; at least one.

    Parameters
    ----------
    confidence : float (m,)
    threshold : float or None
        Fix all above it, and the best one in any case (the first of equals). None: the best only.
    near : float
        With a threshold, also fix all that come this near to the best. 0 is NBDiff's rule, strictly
        above; 1e-5 is CreditDecoding's, at least ``min(threshold, best - near)``.
    """
    best = np.arange(len(confidence)) == int(np.argmax(confidence))
    if threshold is None:
        return best
    if near > 0:
        return best | (confidence >= min(threshold, float(confidence.max()) - near))
    return best | (confidence > threshold)
