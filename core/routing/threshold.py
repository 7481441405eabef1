"""Where to put the router's threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold and what it does on the labels it was chosen on.

    Attributes
    ----------
    value : float
    recall : float
        Share of divergent tokens that are routed to the large model.
    positive_rate : float
        Share of all tokens that are.
    """

    value: float
    recall: float
    positive_rate: float


def choose_threshold(
    probs: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], *, recall: float = 0.95
) -> Threshold:
    """Return the threshold with the fewest routed tokens among those of enough recall.

    Parameters
    ----------
    probs : float (N,)
        The router's probabilities; a token is routed if its own is at least the threshold.
    labels : int (N,)
        1: divergent.
    recall : float in (0, 1]
        Without any threshold that reaches it, the one of highest recall is taken.

    Notes
    -----
    As in the released code, 100 values between 0.01 and 0.99 are tried and the first of equals
    wins. Without a divergent token recall counts as 1.
    """
    grid = np.linspace(0.01, 0.99, 100)
    routed = np.asarray(probs, np.float64)[None, :] >= grid[:, None]
    divergent = np.asarray(labels) == 1
    found = (routed & divergent).sum(axis=1) / max(int(divergent.sum()), 1)
    if not divergent.any():
        found = np.ones(len(grid))
    rate = routed.mean(axis=1)
    enough = found >= recall
    best = int(np.argmin(np.where(enough, rate, np.inf)) if enough.any() else np.argmax(found))
    return Threshold(
        value=float(grid[best]), recall=float(found[best]), positive_rate=float(rate[best])
    )
