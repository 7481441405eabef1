"""Over-trust from attention: how much a text leans on one of its own tokens.

When most new tokens attend to the same earlier token, that token's column of the attention matrix
is a vertical stripe. Its score is the product of the column's entries, scaled; here it is a running
sum of logarithms, so that a text's state is one number per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace

FLOOR = 1e-30  # stands for no attention, whose logarithm would be -inf
CEILING = math.log(65504.0)  # the released code holds scores as float16

FloatRow = npt.NDArray[np.float64]


def strongest_heads(attention: Array) -> Array:
    """Return the newest position's attention (B, S): the largest over heads, summing to 1.

    Parameters
    ----------
    attention : float array (B, H, n, S)
    """
    xp = array_namespace(attention)
    strongest = xp.max(attention[:, :, -1, :], axis=1)
    return strongest / xp.sum(strongest, axis=-1, keepdims=True)


def grown_columns(columns: FloatRow, row: FloatRow, sigma: float) -> FloatRow:
    """Return the log column scores (n,) after one more token.

    Column ``j`` holds ``sum_{i >= j} log(sigma * W[i, j])``, its own diagonal entry included.

    Parameters
    ----------
    columns : float64 (n - 1,)
        Scores so far.
    row : float64 (n,)
        Attention of the new token to the response's tokens, itself the last.
    sigma : float > 0
        Scale of an entry; 1 / sigma is the attention that leaves a score as it is.
    """
    gained = np.log(np.maximum(sigma * row, FLOOR))
    gained[:-1] += columns
    return gained


def overtrust(columns: FloatRow, *, window: int, scale: float) -> tuple[float, int]:
    """Return the penalty and the column that stands out most.

    Parameters
    ----------
    columns : float64 (n,)
        Log column scores.
    window : int
        Only the last so many columns count.
    scale : float > 0
        Factor of the score (1e-7 in the released code).

    Returns
    -------
    penalty : float
        ``scale * exp(max(columns))``, at most 65504.
    column : int
        Its place in the response; the first among equals.
    """
    begin = max(0, len(columns) - window)
    column = begin + int(np.argmax(columns[begin:]))
    return math.exp(min(columns[column] + math.log(scale), CEILING)), column


def most_frequent(values: Sequence[int]) -> int:
    """Return the mode, the smallest among equals."""
    return int(np.bincount(np.asarray(values)).argmax())
