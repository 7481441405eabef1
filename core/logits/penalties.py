"""Repetition, presence and frequency penalties on tokens of the recent history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace, asarray_like
from ..model import IntArray
from ..ops.scatter import put_at, take_at
from .stage import Context, Stage, check_integer, check_number

_WINDOW = 128  # tokens up to which a dictionary counts faster than arrays


def recent_counts(
    history: Sequence[IntArray], last_n: int, vocab_size: int
) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
    """Return which tokens each row's last ``last_n`` tokens hold, and how often.

    Parameters
    ----------
    history : sequence of B int64 arrays
    last_n : int
        -1 counts everything, 0 nothing.
    vocab_size : int
        Ids outside 0..vocab_size-1 are passed over.

    Returns
    -------
    rows, ids : int64 (m,)
    counts : float32 (m,)
    """
    rows, ids, counts = [], [], []
    for row, tokens in enumerate(history):
        recent = np.asarray(tokens, np.int64)
        recent = recent if last_n < 0 else recent[max(len(recent) - last_n, 0) :]
        if len(recent) <= _WINDOW:
            found: dict[int, int] = {}
            for token in recent.tolist():
                if 0 <= token < vocab_size:
                    found[token] = found.get(token, 0) + 1
            ids.append(np.array(list(found), np.int64))
            counts.append(np.array(list(found.values()), np.int64))
            rows.append(np.full(len(found), row))
            continue
        recent = np.sort(recent)
        first, end = recent.searchsorted((0, vocab_size))
        recent = recent[first:end]
        starts = np.ones(len(recent) + 1, np.bool_)
        np.not_equal(recent[1:], recent[:-1], out=starts[1:-1])
        places = starts.nonzero()[0]
        ids.append(recent[places[:-1]])
        counts.append(places[1:] - places[:-1])
        rows.append(np.full(len(places) - 1, row))
    if len(rows) == 1:
        return rows[0], ids[0], counts[0].astype(np.float32)
    return np.concatenate(rows), np.concatenate(ids), np.concatenate(counts).astype(np.float32)


def apply_penalties(
    logits: Array,
    history: Sequence[IntArray],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    last_n: int = 64,
) -> Array:
    """Lower the logits of tokens that occur in the recent history.

    A token seen ``count > 0`` times gets ``logit / repetition`` if its logit is positive, else
    ``logit * repetition``; then ``count * frequency + presence`` is subtracted.

    Parameters
    ----------
    logits : float array (B, V)
    history : sequence of B int64 arrays
        Prompt and generated tokens of each row.
    repetition : float > 0
        1 is neutral, above 1 discourages.
    presence, frequency : float
        0 is neutral, above 0 discourages.
    last_n : int
        How many of the last tokens count; -1 all, 0 none.

    References
    ----------
    Keskar et al., "CTRL", arXiv:1909.05858 (repetition; the split by sign is common practice
    since, as dividing a negative logit would reward it).
    """
    rows, ids, counts = recent_counts(history, last_n, logits.shape[-1])
    if len(rows) == 0:
        return logits
    xp = array_namespace(logits)
    values = take_at(logits, rows, ids)
    if repetition != 1:
        values = xp.where(values > 0, values / repetition, values * repetition)
    if presence != 0 or frequency != 0:
        cost = counts * np.float32(frequency) + np.float32(presence)
        values = values - asarray_like(cost, logits, dtype=logits.dtype)
    return put_at(logits, rows, ids, values)


@dataclass(frozen=True, kw_only=True)
class Penalties(Stage):
    """Penalise tokens of the last ``last_n``; repetition 1, presence 0 and frequency 0 are off.

    Parameters
    ----------
    repetition : float in (0, 100]
        Divides positive logits and multiplies negative ones.
    presence, frequency : float in [-100, 100]
        Subtracted once, and per occurrence.
    last_n : int >= -1
        Window over prompt and answer; -1 is everything, 0 nothing.
    """

    name: ClassVar[str] = "penalties"
    changes_argmax: ClassVar[bool] = True
    by_id: ClassVar[bool] = True
    needs_history: ClassVar[bool] = True
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    last_n: int = 64

    def __post_init__(self) -> None:
        check_number(self.name, "repetition", self.repetition, 0, 100, low_open=True)
        check_number(self.name, "presence", self.presence, -100, 100)
        check_number(self.name, "frequency", self.frequency, -100, 100)
        check_integer(self.name, "last_n", self.last_n, -1)

    @property
    def off(self) -> bool:
        neutral = self.repetition == 1 and self.presence == 0 and self.frequency == 0
        return neutral or self.last_n == 0

    def __call__(self, logits: Array, context: Context) -> Array:
        return apply_penalties(
            logits,
            context.history,
            repetition=self.repetition,
            presence=self.presence,
            frequency=self.frequency,
            last_n=self.last_n,
        )
