"""What each stage of a chain did to a distribution, in a few numbers per stage.

Logits come to the host once; from there every stage is run as the chain itself runs it, one at a
time, and the distributions before and after it are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..array import Array, to_numpy
from ..errors import UsageError
from ..model import IntArray
from ..ops import entropy, log_softmax, top_k
from .candidates import Active, Inputs, check_left, check_peak, run_row

MOST = 100
"""Most tokens of a distribution that :func:`explain` lists."""

DIGITS = 6  # significant ones; float32 holds seven

FloatRow = npt.NDArray[np.floating[Any]]


class _Distribution:
    """One row as the chain has it: over the vocabulary, or over candidates with their ids."""

    def __init__(self, logits: FloatRow, ids: IntArray | None, n: int) -> None:
        self.logits = logits
        self.ids = ids
        # Doubles cost nothing on a short list; over the vocabulary they would cost the most of all.
        wide = logits if ids is None else logits.astype(np.float64)
        self.logprobs: FloatRow = log_softmax(wide)
        self.probs: FloatRow = np.exp(self.logprobs)
        self.likeliest = self._likeliest(max(n, 1))

    def like(self, logits: FloatRow, ids: IntArray | None) -> bool:
        """Whether ``logits`` are the same ones, so that a stage did nothing."""
        return ids is self.ids and np.array_equal(logits, self.logits)

    def places(self, ids: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Return where each of ``ids`` stands here, and whether it does."""
        if self.ids is None:
            return ids, np.ones(len(ids), np.bool_)
        order = self.ids.argsort()
        at = order[np.minimum(self.ids.searchsorted(ids, sorter=order), len(order) - 1)]
        return at, self.ids[at] == ids

    def logprobs_of(self, ids: IntArray) -> FloatRow:
        """Return log-probabilities, -inf for tokens that are not among the candidates."""
        at, here = self.places(ids)
        return np.where(here, self.logprobs[at], -np.inf)

    def _likeliest(self, n: int) -> list[tuple[int, float]]:
        """Return the ``n`` likeliest tokens that can be drawn, as (id, probability)."""
        _, where = top_k(self.logprobs, n)
        ids = where if self.ids is None else self.ids[where]
        pairs = zip(ids.tolist(), self.probs[where].tolist())
        return [(i, p) for i, p in pairs if p > 0]


def explain(
    logits: Array,
    stages: Active,
    inputs: Inputs,
    *,
    n: int,
    tokens: IntArray | Sequence[int] | None = None,
    raw: Array | None = None,
    name: str = "strategy",
) -> tuple[Mapping[str, Any], ...]:
    """Return what every stage did; the work behind :meth:`Chain.explain`, which says what is in it.

    Parameters
    ----------
    logits : float array (B, V)
    stages : sequence of (place, stage)
        Those that act, in order.
    inputs : Inputs
    n, tokens, raw, name
        As in :meth:`Chain.explain`.
    """
    if not 0 <= n <= MOST:
        raise UsageError(f"trace: must list 0..{MOST} tokens, got {n}")
    host = np.asarray(to_numpy(logits), np.float32)
    start = host if raw is None else np.asarray(to_numpy(raw), np.float32)
    found = []
    for row, values in enumerate(host):
        check_peak(float(start[row].max()), row)
        token = None if tokens is None else int(tokens[row])
        before = _Distribution(start[row], None, n)
        entry = _figures(before, n, token)
        if token is not None:
            entry["rank"] = _rank(start[row], token)
        steps: list[Mapping[str, Any]] = []
        if raw is not None:
            after = _Distribution(values, None, n)
            steps.append({"name": name, **_step(before, after, n, token)})
            before = after
        ids: IntArray | None = None
        for place, stage in stages:
            values, ids = run_row(values, ids, [(place, stage)], inputs, row, host.shape[1])
            check_left(values, row)
            after = before if before.like(values, ids) else _Distribution(values, ids, n)
            steps.append({"name": stage.name, **_step(before, after, n, token)})
            before = after
        found.append({"raw": entry, "stages": steps})
    return tuple(found)


def _figures(distribution: _Distribution, n: int, token: int | None) -> dict[str, Any]:
    """Return the figures of one distribution."""
    logprobs = distribution.logprobs
    found: dict[str, Any] = {
        "left": int((logprobs > -np.inf).sum()),
        "entropy": _number(max(float(entropy(logprobs)), 0.0)),
        "top": [[i, _number(p)] for i, p in distribution.likeliest[:n]],
    }
    if token is not None:
        found["p"] = _number(float(np.exp(distribution.logprobs_of(np.array([token]))[0])))
    return found


def _step(before: _Distribution, after: _Distribution, n: int, token: int | None) -> dict[str, Any]:
    """Return what changed between two distributions, and the figures of the second."""
    if after is before:
        return {
            "removed": 0.0, "tv": 0.0, "kl": 0.0, "argmax_changed": False,
            **_figures(after, n, token),
        }  # fmt: skip
    possible = after.logprobs > -np.inf
    if after.ids is None and before.ids is None and possible.all():
        old, new, now, removed = before.logprobs, after.logprobs, after.probs, 0.0
        moved = float(np.abs(before.probs - now).sum())
    else:
        # All tokens that can still be drawn, and how likely each was.
        left = possible.nonzero()[0]
        new, now = after.logprobs[left], after.probs[left]
        ids = left if after.ids is None else after.ids[left]
        old = before.logprobs_of(ids)
        at, here = before.places(ids)
        gone = before.probs.copy()
        gone[at[here]] = 0
        removed = float(gone.sum())
        moved = float(np.abs(np.exp(old) - now).sum())
    return {
        "removed": _number(removed),
        "tv": _number((removed + moved) / 2),
        "kl": _number(max(float((now * (new - old)).sum()), 0.0)),
        "argmax_changed": before.likeliest[0][0] != after.likeliest[0][0],
        **_figures(after, n, token),
    }


def _rank(logits: npt.NDArray[np.float32], token: int) -> int:
    """Return the place of a token, from 1; of equals the lower id ranks first."""
    own = logits[token]
    return 1 + int((logits > own).sum()) + int((logits[:token] == own).sum())


def _number(value: float) -> float | None:
    """Return a number that is short in JSON; None for infinities, which JSON lacks."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
