"""Losses of classifiers."""

from __future__ import annotations

from ..array import Array, array_namespace
from ..ops import softplus


def binary_cross_entropy(logits: Array, labels: Array, *, positive_weight: float = 1.0) -> Array:
    """Return the mean cross-entropy of binary labels, in nats.

    Parameters
    ----------
    logits : float array (...)
        Log-odds of label 1.
    labels : float array (...)
        0 to 1.
    positive_weight : float > 0
        Factor of the positive terms; the mean is taken over the number of labels all the same.
    """
    xp = array_namespace(logits, labels)
    terms = positive_weight * labels * softplus(-logits) + (1 - labels) * softplus(logits)
    return xp.mean(terms)
