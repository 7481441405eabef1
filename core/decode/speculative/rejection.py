"""Recursive rejection: check tokens that were drawn without replacement, exactly.

References
----------
Jeon et al., "Recursive Speculative Decoding", arXiv:2402.14160; Chen et al., "Sequoia",
arXiv:2402.12374.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ..rng import Rng

Probs = npt.NDArray[np.float64]


def recursive_rejection(
    target: Probs, draft: Probs, drawn: Sequence[int], uniforms: Iterable[float]
) -> tuple[int | None, Probs]:
    """Accept one of the drawn entries, or say what to draw from instead.

    Let ``x1, x2, ...`` be drawn from ``draft`` without replacement, in this order. Each is accepted
    with probability ``min(1, t / d)``; after a rejection ``t`` becomes ``max(t - d, 0)`` and ``d``
    loses the entry, both scaled to sum to 1. The accepted entry, or else a draw from the returned
    distribution, has exactly the law ``target``.

    Parameters
    ----------
    target, draft : float64 (n,)
        Probabilities over the same entries, each summing to 1.
    drawn : sequence of int
        Entries in the order they were drawn. How many there are may depend on the ones before, but
        not on the entry itself.
    uniforms : iterable of float in [0, 1)
        One per drawn entry; taken as they are needed.

    Returns
    -------
    place : int or None
        Place in ``drawn`` of the accepted entry.
    rest : float64 (n,)
        What is left of the target; to be drawn from when nothing was accepted.
    """
    t = np.asarray(target, np.float64)
    d = np.array(draft, np.float64)
    for place, (entry, uniform) in enumerate(zip(drawn, uniforms)):
        total = d.sum()
        if not total > 0 or not d[entry] > 0:
            break  # the draft has nothing left; what it still names was not drawn from it
        d /= total
        if uniform * d[entry] < t[entry]:
            return place, t
        rest = np.maximum(t - d, 0.0)
        total = rest.sum()
        if not total > 0:
            return place, t  # equal distributions, told apart by rounding alone
        t = rest / total
        d[entry] = 0.0
    return None, t


def gumbel_order(probs: Probs, uniforms: Probs) -> npt.NDArray[np.int64]:
    """Return the entries of ``probs`` (n,) in the order of a draw without replacement.

    Sorting ``log p - log(-log u)`` from large to small draws without replacement, one entry after
    the other, each in proportion to ``p`` among those left (the Gumbel-top-k trick, Kool et al.,
    arXiv:1903.06059). Entries of probability 0 are left out.
    """
    with np.errstate(divide="ignore"):
        keys = np.log(probs) - np.log(-np.log(uniforms))
    order = np.argsort(-keys, kind="stable")
    return order[np.asarray(probs)[order] > 0]


def draw(probs: Probs, uniform: float) -> int:
    """Return the first entry at which the running sum of ``probs`` (n,) exceeds ``uniform``."""
    totals = np.cumsum(probs)
    index = int(np.searchsorted(totals, uniform * totals[-1], side="right"))
    possible = np.flatnonzero(np.asarray(probs) > 0)
    if index >= len(totals) or not probs[index] > 0:
        index = int(possible[max(int(np.searchsorted(possible, index, side="right")) - 1, 0)])
    return index


def acceptance_uniforms(rng: Rng, row: int, position: int, count: int) -> Probs:
    """Return the random numbers that accept or reject ``count`` drafts of one position's token."""
    return np.array([rng.uniform(row, position, draw=DRAW_ACCEPT + i) for i in range(count)])


DRAW_ACCEPT = 3000
"""``draw`` key of the random numbers that accept or reject drafts of the token at a position: this
plus the place of the draft among its siblings."""

DRAW_DRAFT = 4000
"""``draw`` key of the random numbers that make drafts, at the position of the first one."""
