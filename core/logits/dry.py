"""DRY (don't repeat yourself): penalise tokens that would prolong a verbatim repetition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..array import Array, asarray_like
from ..errors import UsageError
from ..model import IntArray, Tokenizer
from ..ops.scatter import put_at, take_at
from .breakers import MAX_TAIL, Breakers, breaker_tokens
from .stage import Context, Stage, check_integer, check_number, hidden

_CHUNK = 64
_MAX_LOG = math.log(float(np.finfo(np.float32).max))


def since_breaker(tokens: IntArray, breakers: Breakers) -> int:
    """Return how many of the last tokens follow the last sequence breaker.

    Parameters
    ----------
    tokens : int64 (n,)
    breakers : mapping of first token to the tuples of tokens that may follow it
        As made by :func:`~steersman.core.logits.breakers.breaker_tokens`.
    """
    n = len(tokens)
    if not breakers:
        return n
    for stop in range(n, 0, -_CHUNK):  # a breaker is rarely far back
        start = max(stop - _CHUNK, 0)
        for place, token in zip(range(stop - 1, start - 1, -1), tokens[start:stop].tolist()[::-1]):
            if token not in breakers:
                continue
            rest = tuple(tokens[place + 1 : place + 1 + MAX_TAIL].tolist())
            fits = [len(tail) for tail in breakers[token] if rest[: len(tail)] == tail]
            if fits:
                return n - 1 - place - max(fits)
    return n


def repetitions(
    tokens: IntArray, *, allowed_length: int, limit: int, cap: int
) -> tuple[IntArray, IntArray]:
    """Return the tokens that would prolong a repetition, and how long it is already.

    Wherever the last ``length`` tokens occurred before, the token that followed there would prolong
    it. ``length`` is at most ``limit``; what exceeds ``cap`` is not told apart.

    Parameters
    ----------
    tokens : int64 (n,)
    allowed_length : int >= 1
        Shorter repetitions are not reported.

    Returns
    -------
    ids : int64 (m,)
        Each token once.
    lengths : int64 (m,)
        Its longest repetition.
    """
    none = np.empty(0, np.int64)
    n = len(tokens)
    limit = min(limit, cap, n - 1)
    if limit < allowed_length:
        return none, none
    # ends: where an earlier copy of the last `length` tokens ends (the place after it).
    ends = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1
    length, found, lengths = 1, [], []
    while len(ends):
        longer = np.zeros(len(ends), np.bool_)
        if length < limit:
            before = ends - 1 - length
            longer = (before >= 0) & (tokens[before] == tokens[n - 1 - length])
        if length >= allowed_length and not longer.all():
            found.append(tokens[ends[~longer]])
            lengths.append(np.full(len(found[-1]), length))
        ends = ends[longer]
        length += 1
    if not found:
        return none, none
    # Lengths rise, so the last occurrence of a token has its longest repetition.
    followers, grown = np.concatenate(found)[::-1], np.concatenate(lengths)[::-1]
    ids, first = np.unique(followers, return_index=True)
    return ids, grown[first]


def dry_penalties(
    tokens: IntArray,
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
    penalty_last_n: int = -1,
    breakers: Breakers | None = None,
) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Return the penalised ids (m,) of one row and what is subtracted from their logits (m,).

    See :class:`Dry` for the parameters.
    """
    breakers = breakers or {}
    tokens = np.asarray(tokens, np.int64)
    if penalty_last_n >= 0:
        tokens = tokens[max(len(tokens) - penalty_last_n, 0) :]
    cap = len(tokens)
    if base > 1.000001:  # float32 holds no larger power
        cap = min(cap, allowed_length + int(_MAX_LOG / math.log(base)))
    ids, lengths = repetitions(
        tokens,
        allowed_length=allowed_length,
        limit=since_breaker(tokens, breakers),
        cap=max(cap, allowed_length),
    )
    free = np.array([() in breakers.get(int(i), ()) for i in ids], np.bool_)
    if free.any():  # a breaker that is one token may always come
        ids, lengths = ids[~free], lengths[~free]
    grown = multiplier * np.power(float(base), lengths - allowed_length)
    return ids, np.minimum(grown, float(np.finfo(np.float32).max)).astype(np.float32)


def apply_dry(
    logits: Array,
    history: Sequence[IntArray],
    *,
    multiplier: float,
    base: float = 1.75,
    allowed_length: int = 2,
    penalty_last_n: int = -1,
    breakers: Breakers | None = None,
) -> Array:
    """Subtract ``multiplier * base ** (length - allowed_length)`` from tokens that repeat.

    ``length`` is the longest sequence at the end of the history that occurred before and was then
    followed by the token. See :class:`Dry` for the parameters.

    Parameters
    ----------
    logits : float array (B, V)
    history : sequence of B int64 arrays
        Prompt and generated tokens of each row.
    """
    size = logits.shape[-1]
    rows, columns, costs = [], [], []
    for row, tokens in enumerate(history):
        ids, cost = dry_penalties(
            tokens,
            multiplier=multiplier,
            base=base,
            allowed_length=allowed_length,
            penalty_last_n=penalty_last_n,
            breakers=breakers,
        )
        known = (ids >= 0) & (ids < size)
        rows.append(np.full(int(known.sum()), row))
        columns.append(ids[known])
        costs.append(cost[known])
    lines, places = np.concatenate(rows), np.concatenate(columns)
    if len(lines) == 0:
        return logits
    cost = asarray_like(np.concatenate(costs), logits, dtype=logits.dtype)
    return put_at(logits, lines, places, take_at(logits, lines, places) - cost)


@dataclass(frozen=True, kw_only=True)
class Dry(Stage):
    """Penalise tokens that would prolong a verbatim repetition; multiplier 0 is off.

    Parameters
    ----------
    multiplier : float in [0, 100]
        Penalty of a repetition of exactly ``allowed_length``.
    base : float in [1, 100]
        Factor for each token beyond that.
    allowed_length : int >= 1
        Shorter repetitions are free.
    penalty_last_n : int >= -1
        How many of the last tokens are searched; -1 all, 0 none.
    sequence_breakers : sequence of str
        A repetition is not followed across these texts (turns and list marks repeat by nature),
        and a token that contains one is never penalised. They are turned into tokens when the
        stage is bound.

    Notes
    -----
    As in llama.cpp; the penalty grows until float32 ends. There the window -1 is the context size,
    here everything.

    References
    ----------
    p-e-w, "DRY: A modern repetition penalty", oobabooga/text-generation-webui pull request 5677.
    """

    name: ClassVar[str] = "dry"
    changes_argmax: ClassVar[bool] = True
    by_id: ClassVar[bool] = True
    needs_history: ClassVar[bool] = True
    multiplier: float = 0.0
    base: float = 1.75
    allowed_length: int = 2
    penalty_last_n: int = -1
    sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    breakers: Mapping[int, frozenset[tuple[int, ...]]] | None = hidden()

    def __post_init__(self) -> None:
        check_number(self.name, "multiplier", self.multiplier, 0, 100)
        check_number(self.name, "base", self.base, 1, 100)
        check_integer(self.name, "allowed_length", self.allowed_length, 1)
        check_integer(self.name, "penalty_last_n", self.penalty_last_n, -1)
        texts = self.sequence_breakers
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise UsageError(
                f"{self.name}: sequence_breakers must be a list of texts, got {texts!r}"
            )
        for text in texts:
            if not isinstance(text, str) or not text:
                raise UsageError(
                    f"{self.name}: sequence_breakers must be texts that are not empty, got {text!r}"
                )
        object.__setattr__(self, "sequence_breakers", tuple(texts))

    @property
    def off(self) -> bool:
        return self.multiplier == 0 or self.penalty_last_n == 0

    @property
    def needs_tokenizer(self) -> bool:
        return bool(self.sequence_breakers) and self.breakers is None

    def bind(self, tokenizer: Tokenizer) -> Dry:
        """Return the stage with its sequence breakers as tokens of ``tokenizer``."""
        if self.off:
            return self
        return replace(self, breakers=breaker_tokens(tokenizer, tuple(self.sequence_breakers)))

    def __call__(self, logits: Array, context: Context) -> Array:
        if self.needs_tokenizer:
            raise UsageError(
                f"{self.name}: sequence_breakers are not turned into tokens yet; "
                "call bind(tokenizer), or leave them empty"
            )
        return apply_dry(
            logits,
            context.history,
            multiplier=self.multiplier,
            base=self.base,
            allowed_length=self.allowed_length,
            penalty_last_n=self.penalty_last_n,
            breakers=self.breakers,
        )
