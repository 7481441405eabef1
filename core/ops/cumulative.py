"""Running sums along the last axis, in the widest float type the library accumulates in."""

from __future__ import annotations

from ..array import Array, array_namespace, wide_dtype


def cumulative_sum(x: Array) -> Array:
    """Return the running sum (..., n) of ``x``, this entry included, as float64 where there is one.

    On mlx, and on torch with an Apple GPU, sums stay float32.
    """
    xp = array_namespace(x)
    return xp.cumulative_sum(xp.astype(x, wide_dtype(x)), axis=-1)


def sum_before(x: Array) -> Array:
    """Return the running sum (..., n) of the entries *before* each one; the first is 0."""
    xp = array_namespace(x)
    total = cumulative_sum(x)
    return xp.concat([xp.zeros_like(total[..., :1]), total[..., :-1]], axis=-1)
