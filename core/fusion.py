"""Several rankings of one query as one: by their scores, or by their ranks alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import UsageError

Run = Mapping[str, float]  # docid -> score, larger is better
RANK_OFFSET = 60  # of reciprocal rank fusion, as its authors fixed it


def min_max(run: Run) -> dict[str, float]:
    """Map the scores of one ranked list to 0..1 by its own smallest and largest.

    Notes
    -----
    A list whose scores are all equal (a single hit, say) becomes 1; published code makes it 0, as
    if the only hit were the worst.
    """
    if not run:
        return {}
    low, high = min(run.values()), max(run.values())
    if high == low:
        return dict.fromkeys(run, 1.0)
    width = max(high - low, 1e-9)
    return {docid: (score - low) / width for docid, score in run.items()}


def fuse(runs: Sequence[Run], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Return ``(docid, score)``, best first.

    A document that a run lacks counts 0 there, like the run's worst hit; a run without hits
    contributes nothing. Of equal sums, the document that runs of more weight hold comes first, so
    that what a run lacks stands behind what it found last; then the document id decides.

    Parameters
    ----------
    runs : sequence of mapping of docid to score
        Each is normalised by :func:`min_max`: rescaling ``a * s + b`` with ``a > 0`` changes
        nothing.
    weights : sequence of float
        One per run, at least 0.
    """
    if len(runs) != len(weights) or any(not weight >= 0 for weight in weights):
        raise UsageError(f"fuse: {len(runs)} runs need as many weights of at least 0")
    total: dict[str, float] = {}
    held: dict[str, float] = {}
    for run, weight in zip(runs, weights):
        for docid, score in min_max(run).items():
            total[docid] = total.get(docid, 0.0) + weight * score
            held[docid] = held.get(docid, 0.0) + weight
    return sorted(total.items(), key=lambda item: (-item[1], -held[item[0]], item[0]))


def fuse_hybrid(dense: Run, sparse: Run, alpha: float = 0.5) -> list[tuple[str, float]]:
    """Return ``alpha * dense + (1 - alpha) * sparse`` of the normalised runs, best first.

    Parameters
    ----------
    alpha : float in 0..1
        1 orders the dense list as dense does, 0 the sparse list as sparse does; what the list
        lacks comes last.

    References
    ----------
    Zhuang et al., "PromptReps", arXiv:2404.18424.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha: must be in 0..1, got {alpha}")
    return fuse([dense, sparse], [alpha, 1 - alpha])


def reciprocal_ranks(
    orders: Sequence[Sequence[int]], weights: Sequence[float], offset: int = RANK_OFFSET
) -> list[int]:
    """Return one order of the same items: by the weighted sum of ``1 / (offset + rank)``.

    Parameters
    ----------
    orders : sequence of sequence of int (n,)
        Permutations of the same items, best first. Of equal sums, the item that stands first in
        the first order comes first.
    weights : sequence of float
        One per order, at least 0 and not all 0.
    offset : int
        Added to the rank, which counts from 1. The larger, the less the front places stand out.

    References
    ----------
    Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual
    Rank Learning Methods", SIGIR 2009.
    """
    if len(orders) != len(weights) or any(not w >= 0 for w in weights) or not any(weights):
        raise UsageError(f"fusion: {len(orders)} orders need as many weights of at least 0")
    if any(sorted(order) != sorted(orders[0]) for order in orders):
        raise UsageError("fusion: the orders are not of the same items")
    total = dict.fromkeys(orders[0], 0.0)
    for order, weight in zip(orders, weights):
        for rank, item in enumerate(order, start=1):
            total[item] += weight / (offset + rank)
    return sorted(total, key=lambda item: -total[item])


def ranked(run: Run) -> list[tuple[str, float]]:
    """Return a run as a list, best first, ties by document id."""
    return sorted(run.items(), key=lambda item: (-item[1], item[0]))
