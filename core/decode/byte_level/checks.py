"""Which tokens may follow: lazy checks, so that no step asks the tokenizer about all of them.

What the tokenizer would make of a text is asked for the tokens that carry the probability, and
only where no rule tells. Two rules tell much. No token holds the two bytes on either side of a
boundary: then every text has a boundary there, and what follows depends only on the token itself
(asked once) and on whether the text before still reads the same (asked per kind of byte). Behind
the cut, where the text before is settled, only the token itself matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...model import IntArray
from .canonical import WHITE
from .parts import Left
from .vocabulary import FloatArray, unfinished

if TYPE_CHECKING:
    from .covers import Covers

_BY_RULE = 32  # tokens of one left part that are judged where a rule makes them independent
_AT_ONCE = 16  # tokens of one left part that are asked about before masses are summed again


def checked(covers: Covers) -> tuple[Covers, float, float]:
    """Check the tokens that matter for the next law.

    Returns
    -------
    covers : Covers
        Tokens that cannot follow have lost their probability.
    unchecked : float
        Mass of tokens that nobody asked about; they count as canonical.
    leaked : float
        Mass found on tokens that cannot follow, now.
        Both on the scale of ``covers.reference``.
    """
    settings = covers.settings
    if not settings.exact:
        return covers, 0.0, 0.0
    reference, end = covers.reference, len(covers.tail)
    shares = [covers.share(left, reference) for left in covers.lefts]
    whole = sum(share * _mass(covers, left) for share, left in zip(shares, covers.lefts))
    lefts = [
        _by_rule(covers, left, settings.negligible * whole / max(share, 1e-300))
        for share, left in zip(shares, covers.lefts, strict=True)
    ]
    leaked = sum(
        share * float(old.probs.sum() - new.probs.sum())
        for share, old, new in zip(shares, covers.lefts, lefts, strict=True)
    )
    budget = settings.checks
    while True:
        masses, total = [], 0.0
        for left, share in zip(lefts, shares, strict=True):
            mass = left.probs * share
            if left.begin < end:
                mass[: covers.beyond(left)] = 0.0
            total += float(mass.sum())
            mass[left.known] = 0.0
            masses.append(mass)
        unchecked = float(sum(mass.sum() for mass in masses))
        allowed = settings.negligible * total
        if unchecked <= allowed or budget <= 0:
            break
        best = sorted(
            (float(mass[place]), at, int(place))
            for at, mass in enumerate(masses)
            for place in _largest(mass, _AT_ONCE)
            if mass[place] > 0
        )
        good: dict[int, list[int]] = {}
        bad: dict[int, list[int]] = {}
        rest = unchecked
        while best and rest > allowed and budget > 0:
            mass_of, at, place = best.pop()
            budget -= settings.negligible > 0  # without it everything is asked about
            rest -= mass_of
            fine = follows(covers, lefts[at], place)
            (good if fine else bad).setdefault(at, []).append(place)
            leaked += 0.0 if fine else mass_of
        for at in good.keys() | bad.keys():
            lefts[at] = _marked(lefts[at], good.get(at, []), bad.get(at, []))
    return replace(covers, lefts=tuple(lefts)), unchecked, leaked


def follows(covers: Covers, left: Left, at: int) -> bool:
    """Return whether the token at place ``at`` of its range may follow ``left``."""
    text = covers.text
    place = left.low + at
    token = int(text.vocabulary.ids[place])
    piece = text.vocabulary.pieces[token]
    if left.begin == 0 and not covers.start:
        return text.is_alone(place)
    if left.begin:
        before = covers.tail[: left.begin]
        if not (text.vocabulary.adjacent[before[-1], piece[0]] or unfinished(before)):
            return text.stays(left.tokens, before, piece, covers.start) and text.is_alone(place)
    data = covers.tail[: left.begin] + piece
    return text.is_canonical((*left.tokens, token), data, covers.start)


def _mass(covers: Covers, left: Left) -> float:
    return float(left.probs[covers.beyond(left) :].sum())


def _by_rule(covers: Covers, left: Left, allowed: float) -> Left:
    """Mark what the two rules tell without asking about single tokens.

    Of what must be asked once per token, the likeliest are, while all hold more than ``allowed``.
    """
    if left.known.all():
        return left
    text, vocabulary = covers.text, covers.text.vocabulary
    new = ~left.known
    impossible = np.zeros(len(new), np.bool_)
    if left.begin:
        before = covers.tail[: left.begin]
        if unfinished(before):
            return left
        first = vocabulary.columns[0, left.low : left.high]
        new &= ~vocabulary.adjacent[before[-1]][first]
        impossible = new & _disturbing(covers, left, before)[first]
    elif covers.start:
        return left
    if not new.any():
        return left
    seen = text.alone[left.low : left.high]
    masses = np.where(new & ~impossible, left.probs, 0.0)
    known = left.known | impossible
    if masses.sum() > allowed:
        # What was learnt before only saves time: the same tokens are judged every time, or a text
        # would depend on the texts before it.
        judged = _largest(masses, _BY_RULE if covers.settings.negligible else len(masses))
        judged = judged[masses[judged] > 0]
        for place in judged[seen[judged] == 0].tolist():
            text.is_alone(left.low + place)
        known[judged] = True
        impossible[judged[seen[judged] == 2]] = True
    return replace(
        left,
        known=known,
        probs=np.where(impossible, 0.0, left.probs) if impossible.any() else left.probs,
    )


def _disturbing(covers: Covers, left: Left, before: bytes) -> npt.NDArray[np.bool_]:
    """Return which first bytes (256,) would make the text before read otherwise."""
    text, found = covers.text, np.zeros(256, np.bool_)
    if before[-1] not in WHITE and not 0x30 <= before[-1] <= 0x39:
        if not text.stays(left.tokens, before, b"", covers.start):
            found[:] = True
        return found
    kinds = {
        b"a": range(0x80),
        b"0": range(0x30, 0x3A),
        b".": b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    }
    for example, members in kinds.items():
        found[list(members)] = not text.stays(left.tokens, before, example, covers.start)
    found[0x80:] = found[ord("a")]
    for white in WHITE:
        found[white] = not text.stays(left.tokens, before, bytes([white]), covers.start)
    return found


def _largest(values: FloatArray, count: int) -> IntArray:
    if len(values) <= count:
        return np.arange(len(values))
    if len(values) > 4096:  # a selection among all takes ten times as long as this
        some = np.flatnonzero(values > values.max() * 1e-3)
        if len(some) > count:
            return some[np.argpartition(values[some], len(some) - count)[-count:]]
    return np.argpartition(values, len(values) - count)[-count:].astype(np.int64)


def _marked(left: Left, good: Sequence[int], bad: Sequence[int]) -> Left:
    known, probs = left.known.copy(), left.probs.copy()
    known[list(good)] = True
    known[list(bad)] = True
    probs[list(bad)] = 0.0
    return replace(left, known=known, probs=probs)
