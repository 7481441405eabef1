"""Bookkeeping of texts kept side by side: which go on, which have ended, what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..model import IntArray
from .types import Edit, Request, Token

Candidate = tuple[int, int, float]
"""A continuation: the text it continues, the token, and the total log-probability."""


@dataclass(frozen=True, kw_only=True)
class Beam:
    """A text under construction: its tokens and the sum of their log-probabilities."""

    tokens: tuple[Token, ...] = ()
    logprob: float = 0.0

    def normalised(self, length_penalty: float, ended: bool) -> float:
        """Return the score that finished texts are compared by; the end token counts as one."""
        length = len(self.tokens) + ended
        return self.logprob / max(length, 1) ** length_penalty

    def text(self, request: Request) -> IntArray:
        """Return prompt and tokens (T,)."""
        fresh = np.array([token.id for token in self.tokens], np.int64)
        return np.concatenate([request.prompt, fresh])


def candidates_needed(beams: int, eos_ids: Set[int]) -> int:
    """Return how many continuations to look at so that ``beams`` go on whatever ends."""
    return max(2, 1 + len(eos_ids)) * beams


@dataclass(frozen=True, kw_only=True)
class Beams:
    """The live texts, best first, and the ended ones with their scores, best first."""

    live: tuple[Beam, ...] = (Beam(),)
    done: tuple[tuple[float, Beam], ...] = ()

    @property
    def length(self) -> int:
        """Tokens of each live text; 0 when none is left."""
        return len(self.live[0].tokens) if self.live else 0

    def grow(
        self,
        candidates: Sequence[Candidate],
        token: Callable[[Candidate, float], Token],
        *,
        width: int,
        eos_ids: Set[int],
        length_penalty: float,
    ) -> tuple[Beams, list[Candidate]]:
        """Return the texts one token later, and the candidates that the live ones are.

        Parameters
        ----------
        candidates : sequence of Candidate
            Best first.
        token : callable
            Makes the Token of a candidate that goes on from it and its gain in log-probability.
        width : int
            Texts to keep.
        """
        live: list[Beam] = []
        chosen: list[Candidate] = []
        done = list(self.done)
        for rank, candidate in enumerate(candidates):
            row, end, total = candidate
            parent = self.live[row]
            if end in eos_ids:
                # An end that is not among the best few would not have been kept as a text either.
                if rank < width:
                    ended = Beam(tokens=parent.tokens, logprob=total)
                    done.append((ended.normalised(length_penalty, True), ended))
                continue
            if len(live) < width:
                piece = token(candidate, total - parent.logprob)
                live.append(Beam(tokens=(*parent.tokens, piece), logprob=total))
                chosen.append(candidate)
        done = sorted(done, key=lambda pair: -pair[0])[:width]
        return Beams(live=tuple(live), done=tuple(done)), chosen

    def with_traces(self, traces: Sequence[Mapping[str, Any]]) -> Beams:
        """Return the same texts; the last token of each live one carries its trace."""
        live = tuple(
            replace(b, tokens=(*b.tokens[:-1], replace(b.tokens[-1], trace=trace)))
            for b, trace in zip(self.live, traces, strict=True)
        )
        return replace(self, live=live)

    def settled(self, width: int, length_penalty: float, *, early_stopping: bool) -> bool:
        """Return whether no live text can still win, or ``width`` ended ones are enough."""
        if len(self.done) < width:
            return False
        if early_stopping:
            return True
        best_live = max(b.normalised(length_penalty, False) for b in self.live)
        return self.done[-1][0] >= best_live

    def best(self, length_penalty: float, *, cut: bool) -> tuple[str, Beam]:
        """Return why the best text ended ("eos" or "length") and the text.

        ``cut``: the live texts are at the limit and compete as they are.
        """
        ends = [(score, "eos", beam) for score, beam in self.done]
        if cut:
            ends += [(b.normalised(length_penalty, False), "length", b) for b in self.live]
        _, reason, best = max(ends, key=lambda end: end[0])
        return reason, best

    def shared(self) -> tuple[Token, ...]:
        """Return the beginning that all live and ended texts have in common."""
        first = self.live[0].tokens
        length = len(first)
        for other in [b.tokens for b in self.live[1:]] + [b.tokens for _, b in self.done]:
            length = common(first[:length], other)
        return first[:length]


def common(first: Sequence[Token], second: Sequence[Token]) -> int:
    """Return how many leading tokens two texts share."""
    pairs = zip(first, second, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a.id != b.id), None)
    return min(len(first), len(second)) if same is None else same


def edit_to(shown: Sequence[Token], wanted: Sequence[Token]) -> Edit | None:
    """Return the edit that turns what is shown into ``wanted``; None when nothing changes."""
    keep = common(shown, wanted)
    if keep == len(shown) == len(wanted):
        return None
    return Edit(keep=keep, tokens=tuple(wanted[keep:]))
