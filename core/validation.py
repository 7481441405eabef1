"""Holding out part of a training set, and how well scores tell its labels apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput


def hold_out(
    groups: npt.NDArray[Any], share: float, *, seed: int, too_few: str
) -> npt.NDArray[np.bool_]:
    """Return which rows (N,) are held out: whole groups, at least one, never all.

    Parameters
    ----------
    groups : (N,)
        What each row belongs to.
    share : float in [0, 1]
        Of the groups.
    seed : int
    too_few : str
        Message where there are fewer than two groups.

    Raises
    ------
    InvalidInput
    """
    names = np.unique(groups)
    if len(names) < 2:
        raise InvalidInput(too_few)
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = np.random.Generator(np.random.Philox(key=seed)).permutation(names)[:count]
    return np.isin(groups, chosen)


def area_under_curve(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Return the chance that a row of label 1 scores above one of label 0; ties count half.

    nan where one of the labels is missing.
    """
    positive = labels == 1
    count = int(positive.sum())
    if count in (0, len(labels)):
        return float("nan")
    _, where, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[where]
    total = float(ranks[positive].sum()) - count * (count + 1) / 2
    return float(total / (count * (len(labels) - count)))
