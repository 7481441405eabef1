"""FIRST: read the order of a whole window from the logits of its first identifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..model import Capability
from ..ops import log_softmax
from .reader import Comparison, Steps, WindowReader

Floats = npt.NDArray[np.float64]


def order_by_score(scores: Sequence[float] | Floats) -> tuple[int, ...]:
    """Return places by falling score; ties keep their order.

    Adding a constant to all scores, or turning them into log-probabilities, changes nothing.

    Parameters
    ----------
    scores : sequence of float (w,)
    """
    return tuple(int(i) for i in np.argsort(-np.asarray(scores, np.float64), kind="stable"))


@dataclass(frozen=True, kw_only=True)
class First:
    """Single-token listwise reranking.

    The prompt ends in ``[`` inside the model's own turn. The logit of each passage's letter at
    that one position is its score; no token is generated.

    Parameters
    ----------
    permutations : int
        Average the score over that many presentations, the passages rotated against the letters
        each time (at most one per place of the window). 1 is the published method; more cost that
        many prompts and cancel part of a model's liking for certain letters and places.
    content_free : bool
        Subtract the scores of the same prompt with the text of every passage replaced by "N/A",
        which estimates that liking from a short extra prompt per window size.

    Notes
    -----
    Both options are this project's, off by default; the second transfers contextual calibration
    (Zhao et al., arXiv:2102.09690). The released code reads the top 30 or 120 log-probabilities
    and keeps letters outside them in their old order; here all letters are read.

    References
    ----------
    Reddy et al., "FIRST: Faster Improved Listwise Reranking with Single Token Decoding",
    arXiv:2406.15657; Chen et al., "An Early FIRST Reproduction and Improvements to Single-Token
    Decoding for Fast Listwise Reranking", arXiv:2411.05508.
    """

    permutations: int = 1
    content_free: bool = False
    requires: Mapping[str, Capability] = field(
        default_factory=lambda: {"target": Capability.LAST_LOGITS}, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if not 1 <= self.permutations <= 26:
            raise UsageError(f"permutations: must be in 1..26, got {self.permutations}")

    @property
    def logit_kind(self) -> str:
        """Name of the scores: "logit", or "calibrated_logit" once an option changes them."""
        return "logit" if self.permutations == 1 and not self.content_free else "calibrated_logit"

    def compare(self, reader: WindowReader, query: str, passages: Sequence[str]) -> Comparison:
        """Order one window.

        Parameters
        ----------
        reader : WindowReader
        query : str
        passages : sequence of str (w,)
            2 <= w <= 26, in their present order.
        """
        return reader.drive(self.steps(reader, query, passages))

    def steps(self, reader: WindowReader, query: str, passages: Sequence[str]) -> Steps[Comparison]:
        """Order one window, asking for logits instead of calling the model."""
        size = len(passages)
        if self.logit_kind == "logit":
            scores = yield from self._scores(reader, query, passages)
        else:
            prior = np.zeros(size)
            if self.content_free:
                prior = log_softmax((yield from self._scores(reader, query, ["N/A"] * size)))
            total = np.zeros(size)
            turns = min(self.permutations, size)
            for turn in range(turns):
                # Letter j stands for the passage at place shown[j].
                start = turn * size // turns
                shown = [*range(start, size), *range(start)]
                row = yield from self._scores(reader, query, [passages[i] for i in shown])
                total[shown] += log_softmax(row) - prior
            scores = total / turns
        return Comparison(order=order_by_score(scores), scores=tuple(scores.tolist()))

    @staticmethod
    def _scores(reader: WindowReader, query: str, passages: Sequence[str]) -> Steps[Floats]:
        logits = yield reader.fit(query, passages, reserve=0)
        return reader.letter_logits(logits, len(passages))
