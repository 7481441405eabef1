"""What a reranker returns: the new order, and scores that say what they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a ranking cost.

    Attributes
    ----------
    windows : int
        Windows compared; windows of one passage need no model and are not counted.
    prompt_tokens : int
        Prompt tokens over all windows, those served from the cache included.
    cached_tokens : int
        Prompt tokens that were in the cache already.
    generated_tokens : int
        Tokens generated one by one (0 for ``first``).
    malformed : int
        Windows whose generated answer was not a permutation of the identifiers.
    word_limit : int or None
        Smallest per-passage limit that was needed to fit the context; None if none was cut for it.
    seconds : float
        Wall time.
    """

    windows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    malformed: int = 0
    word_limit: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One passage of a :class:`Ranking`.

    Attributes
    ----------
    rank : int
        From 1, best first.
    index : int
        Place in the list that was given.
    docid : str or None
    score : float
        Slot score; see :class:`Ranking`.
    logit : float or None
        The comparison score of the last window that held the passage; see :class:`Ranking`.
    """

    rank: int
    index: int
    docid: str | None
    score: float
    logit: float | None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Passages in their new order, best first.

    Iterating and indexing go by rank: ``ranking[0]`` is the best passage.

    Attributes
    ----------
    indices : tuple of int
        Places in the list that was given.
    scores : tuple of float
        Slot scores, strictly falling: the score of whichever passage the retriever had put there,
        or n, n - 1, ..., 1 if none were given. They express the order and nothing else.
    kind : "slot"
        What ``scores`` are.
    logits : tuple of float or None
        What the model gave each passage in the last window that compared it; None where no window
        did, and for methods that have no such number. **Not comparable between windows.**
    logit_kind : {"logit", "calibrated_logit", "none"}
        "logit": the untouched logit of the passage's identifier. "calibrated_logit": log-softmax
        over the window's identifiers, averaged over presentations and less the content-free prior,
        as asked for.
    docids : tuple of str, or None
    method : str
    usage : Usage
    """

    indices: tuple[int, ...]
    scores: tuple[float, ...]
    logits: tuple[float | None, ...]
    logit_kind: str
    method: str
    docids: tuple[str, ...] | None = None
    usage: Usage = Usage()
    kind: str = "slot"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Ranked:
        place = range(len(self.indices))[place]
        return Ranked(
            rank=place + 1,
            index=self.indices[place],
            docid=None if self.docids is None else self.docids[place],
            score=self.scores[place],
            logit=self.logits[place],
        )

    def __iter__(self) -> Iterator[Ranked]:
        return (self[place] for place in range(len(self.indices)))

    def top_k(self, k: int) -> Ranking:
        """Return the best ``k`` (0 <= k; all of them if there are fewer)."""
        if k < 0:
            raise UsageError(f"top_k: must be at least 0, got {k}")
        return Ranking(
            indices=self.indices[:k],
            scores=self.scores[:k],
            logits=self.logits[:k],
            logit_kind=self.logit_kind,
            method=self.method,
            docids=None if self.docids is None else self.docids[:k],
            usage=self.usage,
            kind=self.kind,
        )


def strictly_falling(scores: Sequence[float]) -> list[float]:
    """Lower scores by as little as it takes to make them fall strictly, also in single precision.

    trec_eval and what is built on it read scores into a C ``float``; two float64 scores that
    round to the same float32 are a tie to them, and they reorder ties by document id.

    Parameters
    ----------
    scores : sequence of float (n,)
        Finite, and not rising beyond what ties and rounding explain: an entry above its
        predecessor is brought just below it.

    Returns
    -------
    list of float (n,)
        float64; entries that need no change are bit-identical.
    """
    fallen: list[float] = []
    before = np.float32(np.inf)
    for score in scores:
        if not math.isfinite(score) or abs(score) > 1e38:
            raise UsageError(f"scores: {score} is not a finite single-precision number")
        single = np.float32(score)
        if single >= before:
            single = np.nextafter(before, np.float32(-np.inf))
            score = float(single)
        fallen.append(float(score))
        before = single
    return fallen


def slot_scores(scores: Sequence[float] | None, n: int) -> list[float]:
    """Return the strictly falling score of each of ``n`` places.

    Retriever scores are kept if they fall from front to back (ties are taken apart). Scores that
    rise somewhere, such as distances, cannot be slot scores; then n, n - 1, ..., 1 are used.
    """
    if scores is None or any(b > a for a, b in pairwise(scores)):
        return [float(n - place) for place in range(n)]
    return strictly_falling(scores)
