"""Moving the cut: behind what no cover crosses any more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .canonical import Tokens
from .parts import Left, Pending

if TYPE_CHECKING:
    from .covers import Covers

SOFT_TAIL = 96  # bytes without a safe boundary after which the cut moves to where all covers agree
SOFT_REST = 48  # bytes that stay behind such a cut
HARD_TAIL = 256  # bytes after which it moves anyway

Part = TypeVar("Part", Left, Pending)


def moved(covers: Covers) -> Covers:
    """Move the cut behind what no cover crosses any more."""
    at = covers.text.last_cut(covers.tail) if len(covers.tail) > 1 else 0
    if at:
        passed = covers.text.encode(covers.tail[:at], covers.start)
        if covers.fixed:
            passed = next(iter(covers.ends[at]), None) if len(covers.ends[at]) == 1 else None
        if passed is not None and passed in covers.ends[at]:
            return _cut(covers, passed, at)
    if len(covers.tail) > SOFT_TAIL:
        return _soft_cut(covers)
    return covers


def _soft_cut(covers: Covers) -> Covers:
    """Cut a long run without boundaries where all that matters agrees on the tokens."""
    written = covers.text.encode(covers.tail, covers.start)
    parts = covers.parts
    if written is not None and covers.settings.negligible:
        floor = covers.reference + math.log(covers.settings.negligible) - 7
        parts = tuple(p for p in parts if p.weight > floor)
    best, at = (0, 0), 0
    for count, token in enumerate(written or (), 1):
        at += len(covers.text.vocabulary.pieces[token])
        if len(covers.tail) - at < SOFT_REST or written is None:
            break
        if not all(p.tokens[:count] == written[:count] for p in parts):
            break
        if covers.text.encode(covers.tail[at:], False) == written[count:]:
            best = count, at
    if best[0] and written is not None:
        return _cut(covers, written[: best[0]], best[1], sure=True)
    return covers.fallback() if len(covers.tail) > HARD_TAIL else covers


def _cut(covers: Covers, passed: Tokens, at: int, *, sure: bool = False) -> Covers:
    """Return the same covers with ``passed``, the tail's first ``at`` bytes, made history.

    Unless ``sure``, nothing changes while it is not known how likely ``passed`` is.
    """
    size = len(passed)
    parts = covers.parts
    here = next((p.weight for p in parts if p.tokens == passed), None)
    if here is None:
        inside = [p for p in parts if p.tokens[:size] == passed and p.begin > at]
        if not inside or (not sure and any(p.begin < at for p in covers.pending)):
            return covers
        here = max(p.weight for p in inside)

    base = here

    def behind(part: Part) -> Part:
        return replace(
            part,
            tokens=part.tokens[size:],
            begin=part.begin - at,
            weight=part.weight - base,
        )

    ends = tuple(
        frozenset(tokens[size:] for tokens in some if tokens[:size] == passed)
        for some in covers.ends[at:]
    )
    return replace(
        covers,
        history=np.concatenate([covers.history, np.array(passed, np.int64)]),
        start=False,
        fixed=0,
        tail=covers.tail[at:],
        ends=ends,
        lefts=tuple(behind(p) for p in covers.lefts if p.tokens[:size] == passed),
        pending=tuple(behind(p) for p in covers.pending if p.tokens[:size] == passed),
        scale=covers.scale + here,
    )
