"""Log-probabilities of given tokens."""

from __future__ import annotations

from ..array import Array, array_namespace, asarray_like, is_mlx
from .softmax import logsumexp


def target_logprobs(logits: Array, targets: Array) -> Array:
    """Return ``log softmax(logits)[targets]`` (...), both already aligned.

    Parameters
    ----------
    logits : float array (..., V)
    targets : int array (...), of any library
        Negative entries are padding; their result is 0, so that sums pass over them.
    """
    xp = array_namespace(logits)
    if type(targets) is not type(logits):
        targets = asarray_like(targets, logits)
    targets = xp.astype(targets, xp.int32 if is_mlx(logits) else xp.int64)
    valid = targets >= 0
    index = xp.where(valid, targets, xp.zeros_like(targets))[..., None]
    chosen = xp.squeeze(xp.take_along_axis(logits, index, axis=-1), axis=-1)
    result = chosen - logsumexp(logits)
    return xp.where(valid, result, xp.zeros_like(result))


def token_logprobs(logits: Array, tokens: Array) -> Array:
    """Return the log-probability of each token but the first, given those before it.

    Logits are never shifted: those *of* position ``t`` predict the token *at* ``t + 1``. So entry
    ``i`` of the result belongs to ``tokens[..., i + 1]`` and comes from ``logits[..., i, :]``; the
    last position's logits are not used.

    Parameters
    ----------
    logits : float array (..., T, V)
    tokens : int array (..., T)
        Right-padded with -1; padding gives 0.

    Returns
    -------
    float array (..., T - 1)
        Natural log.
    """
    return target_logprobs(logits[..., :-1, :], tokens[..., 1:])
