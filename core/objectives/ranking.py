"""Losses that teach scores an order; written once, with gradients on torch.

All take scores ``s`` (..., n), larger is better, and ranks ``r`` (..., n), 1 is best. The pairwise
losses do not compare items of equal rank.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..array import Array, array_namespace, asarray_like
from ..ops import log_softmax, softmax, softplus

Aggregate = Literal["mean", "sum"]


def _pairs(scores: Array, ranks: Array) -> tuple[Array, Array, Array, Array]:
    """Return for all (i, j): s_i - s_j, r_i, r_j, and 1 where i should stand before j."""
    xp = array_namespace(scores, ranks)
    r = xp.astype(ranks, scores.dtype)
    gap = scores[..., :, None] - scores[..., None, :]
    first, second = r[..., :, None], r[..., None, :]
    return gap, first, second, xp.astype(first < second, scores.dtype)


def _aggregated(terms: Array, n: int, aggregate: Aggregate) -> Array:
    xp = array_namespace(terms)
    total = xp.sum(xp.sum(terms, axis=-1), axis=-1)
    return total if aggregate == "sum" else total / max(n * (n - 1) / 2, 1)


def ranknet(
    scores: Array, ranks: Array, *, weighted: bool = True, aggregate: Aggregate = "mean"
) -> Array:
    """Return the pairwise logistic loss (...), by default weighted towards the head of the list.

    ``agg over r_i < r_j of w_ij * log(1 + exp(s_j - s_i))`` with ``w_ij = 1 / (r_i + r_j)`` or 1.

    Parameters
    ----------
    scores : float array (..., n)
    ranks : array (..., n)
    weighted : bool
    aggregate : {"mean", "sum"}
        Over the n (n - 1) / 2 pairs; weights are not renormalised. The released code of FIRST takes
        the mean, its paper the sum.

    References
    ----------
    Burges et al., "Learning to Rank using Gradient Descent", ICML 2005; Reddy et al., "FIRST:
    Faster Improved Listwise Reranking with Single Token Decoding", arXiv:2406.15657.
    """
    gap, first, second, before = _pairs(scores, ranks)
    terms = before * softplus(-gap)
    if weighted:
        terms = terms / (first + second)
    return _aggregated(terms, int(scores.shape[-1]), aggregate)


def lambdarank(scores: Array, ranks: Array, *, aggregate: Aggregate = "mean") -> Array:
    """Return the pairwise logistic loss (...), weighted by what a swap would change in nDCG.

    ``w_ij = |G_i - G_j| * |1 / D_i - 1 / D_j|`` with gains ``G_i = 2**-r_i`` normalised to an ideal
    DCG of 1 and ``D_i = log2(1 + position of i in the order of the scores)``; weights carry no
    gradient.

    References
    ----------
    Burges, "From RankNet to LambdaRank to LambdaMART", MSR-TR-2010-82; Wang et al., "The LambdaLoss
    Framework", CIKM 2018.
    """
    xp = array_namespace(scores, ranks)
    n = int(scores.shape[-1])
    gap, first, second, before = _pairs(scores, ranks)
    # Positions by counting, so that no library needs a scatter; of equal scores the first leads.
    index = xp.arange(n, device=getattr(scores, "device", None))
    earlier = xp.astype(index[None, :] < index[:, None], scores.dtype)
    ahead = xp.astype(gap < 0, scores.dtype) + xp.astype(gap == 0, scores.dtype) * earlier
    position = 1 + xp.sum(ahead, axis=-1)
    discount = math.log(2) / xp.log(1 + position)
    ideal = sum(2.0**-k / math.log2(1 + k) for k in range(1, n + 1))
    gain = (2.0**-first - 2.0**-second) / ideal
    swap = discount[..., :, None] - discount[..., None, :]
    return _aggregated(before * xp.abs(gain * swap) * softplus(-gap), n, aggregate)


def listnet(scores: Array, ranks: Array) -> Array:
    """Return the cross-entropy (...) of the scores' softmax from that of the negated ranks.

    References
    ----------
    Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007.
    """
    xp = array_namespace(scores, ranks)
    truth = softmax(-xp.astype(ranks, scores.dtype))
    return -xp.sum(truth * log_softmax(scores), axis=-1)


def ranks_of(order: list[int], *, like: Array) -> Array:
    """Return ranks (n,) of items that ``order`` lists from best to worst."""
    ranks = np.empty(len(order), np.int64)
    ranks[np.asarray(order)] = np.arange(1, len(order) + 1)
    return asarray_like(ranks, like)
