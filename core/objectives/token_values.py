"""Loss of a value head: squared error of every token's value."""

from __future__ import annotations

from ..array import Array, array_namespace


def token_value_loss(values: Array, labels: Array, weights: Array | None = None) -> Array:
    """Return the mean squared error of token values, a scalar.

    ``sum_i w_i (f_i - v_i)^2 / sum_i w_i``. With labels ``v`` from :func:`.token_values` and
    counts as weights, the gradient on all tokens of a question equals that with each text's own
    outcome as the label of all its tokens: the loss is quadratic in ``f`` and linear in ``v`` but
    for a constant. What the labels save is the variance of batches that hold some texts only.

    Parameters
    ----------
    values : float array (...)
        The head's raw output, not squashed.
    labels : float array (...)
        In [0, 1].
    weights : float array (...), optional
        How many tokens each entry stands for; 0 leaves one out. All 1 if None.

    References
    ----------
    Lee et al., "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving
    Capabilities of Large Language Models", arXiv:2407.12863.
    """
    xp = array_namespace(values, labels)
    errors = (values - labels) ** 2
    if weights is None:
        return xp.mean(errors)
    return xp.sum(weights * errors) / xp.sum(weights)
