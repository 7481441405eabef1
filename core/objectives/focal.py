"""Focal loss: cross-entropy that cares less about what is easy."""

from __future__ import annotations

from ..array import Array, array_namespace
from ..ops import softplus


def focal_loss(logits: Array, labels: Array, *, gamma: float = 2.0) -> Array:
    """Return the mean of ``-(1 - p_t)^gamma ln p_t``, in nats.

    Parameters
    ----------
    logits : float array (...)
        Log-odds of label 1.
    labels : float array (...)
        0 or 1; ``p_t`` is the probability of the right one.
    gamma : float
        0 or more; 0 is binary cross-entropy.

    References
    ----------
    Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002.
    """
    xp = array_namespace(logits, labels)
    toward = (2 * labels - 1) * logits
    return xp.mean(xp.exp(-gamma * softplus(toward)) * softplus(-toward))
