"""All ways in which a model may write given bytes: search, next-byte law, one byte further.

The text is cut where no token can cross (:class:`.canonical.Canonical`). Of the bytes behind the
cut, the *tail*, a *cover* is a canonical token sequence whose last token reaches or passes the
tail's end and whose other tokens do not. The probability of the bytes is the sum over covers.

Covers are grouped by all but their last token, the *left* part. One answer of the model after a
left part gives the probability of all its covers; those tokens stand next to each other in the
sorted vocabulary, so a left part is a range, and a further byte narrows the range.

A left part of which next to nothing can follow is not worth a call: it stays *pending* until its
share matters. Within a word that is most of them, which is why a byte costs less than a call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...array import to_numpy
from ...model import PAD, Array, Forward, IntArray
from .canonical import Canonical, Tokens
from .checks import checked
from .cuts import moved
from .parts import Law, Left, Pending, Settings
from .vocabulary import FloatArray, sums, unfinished, utf8_mask


@dataclass(frozen=True, kw_only=True, eq=False)
class Covers:
    """The covers of one text under one model: an immutable value.

    Attributes
    ----------
    text : Canonical
    settings : Settings
    history : int64 (T,)
        Tokens up to the cut.
    start : bool
        Whether nothing but a control token stands before the tail.
    tail : bytes
    ends : tuple of sets
        Canonical sequences that end at each offset of the tail, 0 included.
    lefts : tuple of Left
    pending : tuple of Pending
    cached : tuple of int64 arrays
        What the rows of the cache hold.
    scale : float
        Log-probability of what the cut has passed since the start.
    fixed : int
        Bytes of the tail that the first token must hold all of (token healing); 0: none.
    fallbacks : int
        How often the bytes had no cover, and the text went on from one encoding of them.
    """

    text: Canonical
    settings: Settings
    history: IntArray
    start: bool
    tail: bytes
    ends: tuple[frozenset[Tokens], ...]
    lefts: tuple[Left, ...] = ()
    pending: tuple[Pending, ...] = ()
    cached: tuple[IntArray, ...] = ()
    scale: float = 0.0
    fixed: int = 0
    fallbacks: int = 0
    counts: Mapping[str, int] = field(default_factory=lambda: {"calls": 0, "rows": 0, "tokens": 0})

    # -- what is known -----------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Left | Pending, ...]:
        """All left parts, evaluated or not."""
        return (*self.lefts, *self.pending)

    @property
    def reference(self) -> float:
        """Log-probability that weights are scaled by."""
        return max((part.weight for part in self.parts), default=0.0)

    def share(self, part: Left | Pending, reference: float) -> float:
        return math.exp(part.weight - reference)

    def beyond(self, left: Left) -> int:
        """Return how many tokens of a left part's range end exactly at the tail's end."""
        vocabulary, size = self.text.vocabulary, len(self.tail) - left.begin
        if size == 0:
            return 0
        at = left.low
        while at < left.high and vocabulary.lengths[at] == size:
            at += 1
        return at - left.low

    def _mass(self) -> tuple[float, float]:
        """Return the probability of the covers that are known, and of the pending left parts."""
        reference, end = self.reference, len(self.tail)
        known = 0.0
        for left in self.lefts:
            share = self.share(left, reference)
            known += share * (1.0 if left.begin == end else left.probs[self.beyond(left) :].sum())
        return known, sum(self.share(part, reference) for part in self.pending)

    @property
    def logprob(self) -> float:
        """Natural log of the probability of all bytes since the first cut."""
        known, _ = self._mass()
        reference, end = self.reference, len(self.tail)
        known += sum(self.share(p, reference) for p in self.pending if p.begin == end)
        return self.scale + reference + (math.log(known) if known > 0 else -math.inf)

    def covers(self) -> dict[Tokens, float]:
        """Return the log-probability of every cover after the cut, for inspection and tests."""
        found: dict[Tokens, float] = {}
        end = len(self.tail)
        for part in self.parts:
            if part.begin == end:
                found[part.tokens] = part.weight
        for left in self.lefts:
            if left.begin < end:
                for at in np.flatnonzero(left.probs[(skip := self.beyond(left)) :]) + skip:
                    token = int(self.text.vocabulary.ids[left.low + at])
                    found[(*left.tokens, token)] = left.weight + math.log(left.probs[at])
        return found

    def ends_of(self, data: bytes) -> frozenset[Tokens]:
        """Return the sequences after the cut that end exactly with ``data``.

        Under token healing that is any token which holds the fixed bytes, and then what the rest
        is encoded to.
        """
        if not self.fixed:
            return self.text.ends(data, self.start)
        found = set()
        for size in range(self.fixed, len(data) + 1):
            low, high = self.text.vocabulary.starting_with(data[:size])
            while low < high and self.text.vocabulary.lengths[low] == size:
                rest = self.text.encode(data[size:], False)
                if rest is not None:
                    found.add((int(self.text.vocabulary.ids[low]), *rest))
                low += 1
        return frozenset(found)

    # -- calls -------------------------------------------------------------------------------

    def missing(self, *, law: bool = True, whole: bool = False) -> tuple[Tokens, ...]:
        """Return the left parts to evaluate next, in one call; none when enough is known.

        Parameters
        ----------
        law : bool
            True: for the next byte. False: for drawing a cover, which needs nothing of what
            follows the tail's end.
        whole : bool
            Leave nothing out, however little it holds.
        """
        end = len(self.tail)
        waiting = [p for p in self.pending if law or p.begin < end]
        if not waiting:
            return ()
        reference = self.reference
        known, _ = self._mass()
        waiting.sort(key=lambda part: -part.weight)
        rest = sum(self.share(part, reference) for part in waiting)
        allowed = 0.0 if whole else self.settings.negligible * (known + rest)
        chosen: list[Pending] = []
        for part in waiting:
            if rest <= allowed or len(chosen) == self.settings.rows:
                break
            chosen.append(part)
            rest -= self.share(part, reference)
        found = [part.tokens for part in chosen]
        if not self.cached:  # the prompt is one row; nothing can fork from it yet
            return tuple(found[:1])
        # What can only be known after these goes along: a call costs more than a row.
        held = {part.tokens for part in self.parts}
        last = end if law else end - 1
        for part in chosen:
            for sequences in self.ends[part.begin + 1 : last + 1]:
                for tokens in sequences:
                    if len(found) < self.settings.rows and tokens not in held:
                        parent = tokens[:-1]
                        if parent in found and tokens[: len(part.tokens)] == part.tokens:
                            found.append(tokens)
                            held.add(tokens)
        return tuple(found)

    def ask(self, sequences: Sequence[Tokens]) -> tuple[Covers, Forward]:
        """Return the one call that evaluates left parts, ragged rows on what the cache holds."""
        wanted = [np.concatenate([self.history, np.array(s, np.int64)]) for s in sequences]
        rows, keeps, fed = [], [], []
        for full in wanted:
            held = [common_prefix(row, full) for row in self.cached]
            row = int(np.argmax(held)) if held else 0
            keep = min(held[row], len(full) - 1) if held else 0
            rows.append(row)
            keeps.append(keep)
            fed.append(full[keep:])
        counts = dict(self.counts)
        if self.cached:
            counts["calls"] += 1
            counts["rows"] += len(fed)
            counts["tokens"] += sum(map(len, fed))
        after = replace(self, cached=tuple(wanted), counts=counts)
        if len(fed) == 1 and len(self.cached) <= 1:
            return after, Forward(keep=keeps[0], tokens=fed[0][None])
        width = max(map(len, fed))
        tokens = np.full((len(fed), width), PAD, np.int64)
        for i, ids in enumerate(fed):
            tokens[i, : len(ids)] = ids
        return after, Forward(keep=np.array(keeps), tokens=tokens, rows=np.array(rows))

    def answered(self, sequences: Sequence[Tokens], logits: Array) -> Covers:
        """Return the covers once the model has answered for ``sequences`` (B, V)."""
        host = np.asarray(to_numpy(logits))
        waiting = {part.tokens: part for part in self.pending}
        full: dict[Tokens, FloatArray] = {}
        specials: dict[Tokens, FloatArray] = {}
        order = self.text.vocabulary.ids
        for row, tokens in enumerate(sequences):
            probs = np.exp(host[row] - host[row].max())
            total = probs.sum(dtype=np.float64)
            full[tokens] = probs[order].astype(np.float64) / total
            specials[tokens] = probs[self.text.vocabulary.specials].astype(np.float64) / total
        lefts = list(self.lefts)
        for tokens in sorted(sequences, key=len):
            part = waiting.pop(tokens, None)
            if part is None:  # its parent gave it no probability
                continue
            self._register(part, full[tokens], waiting)
            left = self._narrowed(part, full[tokens], specials[tokens])
            if left is not None:
                lefts.append(left)
        after = replace(self, lefts=tuple(lefts), pending=tuple(waiting.values()))
        return moved(after)

    def _register(self, part: Pending, probs: FloatArray, waiting: dict[Tokens, Pending]) -> None:
        """Add the canonical sequences that are ``part`` and one more token within the tail."""
        vocabulary, size = self.text.vocabulary, len(part.tokens)
        for end in range(part.begin + 1, len(self.tail) + 1):
            for tokens in self.ends[end]:
                if len(tokens) == size + 1 and tokens[:size] == part.tokens:
                    chance = float(probs[vocabulary.place[tokens[-1]]])
                    if chance > 0:
                        weight = part.weight + math.log(chance)
                        waiting[tokens] = Pending(tokens=tokens, begin=end, weight=weight)

    def _narrowed(self, part: Pending, probs: FloatArray, specials: FloatArray) -> Left | None:
        vocabulary = self.text.vocabulary
        low, high = vocabulary.starting_with(self.tail[part.begin :])
        if low == high and part.begin < len(self.tail):
            return None
        probs = probs[low:high].copy()
        known = np.zeros(high - low, np.bool_)
        if not self.settings.exact:
            known[:] = True
        return Left(
            tokens=part.tokens,
            begin=part.begin,
            weight=part.weight,
            low=low,
            high=high,
            probs=probs,
            known=known,
            specials=specials,
        )

    # -- the law of the next byte ----------------------------------------------------------------

    def law(self) -> tuple[Law, Covers]:
        """Return what may come next, and the covers with what was found out on the way.

        To be called when :meth:`missing` names nothing.
        """
        covers, unchecked, leaked = checked(self)
        reference, end = covers.reference, len(covers.tail)
        found = np.zeros(256)
        specials = np.zeros(len(covers.text.vocabulary.specials))
        plain = covers.text.encode(covers.tail, covers.start)
        for left in covers.lefts:
            share = covers.share(left, reference)
            edges = covers.text.vocabulary.bounds(left.low, left.high, end - left.begin)
            found += share * sums(left.probs, edges, left.low)
            # The text may only end where it reads as a whole text would.
            if left.begin == end and left.tokens == plain:
                specials += share * left.specials
        mask = utf8_mask(unfinished(covers.tail))
        if covers.settings.exact and found[mask].sum() > 0:
            found = np.where(mask, found, 0.0)
        total = float(found.sum() + specials.sum())
        _, waiting = covers._mass()
        if total <= 0:
            return Law(
                bytes=found, specials=specials, left_out=1.0, unchecked=0.0, leaked=1.0
            ), covers
        law = Law(
            bytes=found / total,
            specials=specials / total,
            left_out=waiting / (total + waiting),
            unchecked=unchecked / total,
            leaked=leaked / (total + leaked),
        )
        return law, covers

    # -- one byte further ------------------------------------------------------------------------

    def append(self, byte: int) -> Covers:
        """Return the covers of the text and one more byte."""
        vocabulary, old = self.text.vocabulary, len(self.tail)
        tail = self.tail + bytes([byte])
        fresh = self.ends_of(tail)
        lefts, pending = [], list(self.pending)
        for left in self.lefts:
            low, high = vocabulary.within(left.low, left.high, old - left.begin, byte)
            part = slice(low - left.low, high - left.low)
            if low == high or not left.probs[part].any():
                continue
            left = replace(left, low=low, high=high, probs=left.probs[part], known=left.known[part])
            size = len(left.tokens)
            for tokens in fresh:
                if len(tokens) == size + 1 and tokens[:size] == left.tokens:
                    chance = float(left.probs[vocabulary.place[tokens[-1]] - low])
                    if chance > 0:
                        weight = left.weight + math.log(chance)
                        pending.append(Pending(tokens=tokens, begin=old + 1, weight=weight))
            lefts.append(left)
        after = replace(
            self,
            tail=tail,
            ends=(*self.ends, fresh),
            lefts=tuple(lefts),
            pending=tuple(pending),
        )
        longer = tuple(left for left in after.lefts if after.beyond(left) < len(left.probs))
        return moved(replace(after, lefts=longer))

    def append_special(self, token: int) -> Covers:
        """Return the covers of the text and one control token, which nothing crosses."""
        written = self.text.encode(self.tail, self.start)
        if written is None:
            written = min(self.ends[-1], default=self._by_bytes(self.tail))
        history = np.concatenate([self.history, np.array([*written, token], np.int64)])
        return self._afresh(history, start=True)

    def _afresh(self, history: IntArray, *, start: bool, fallbacks: int = 0) -> Covers:
        return replace(
            self,
            history=history,
            start=start,
            fixed=0,
            tail=b"",
            ends=(frozenset({()}),),
            lefts=(),
            pending=(Pending(tokens=(), begin=0, weight=0.0),),
            fallbacks=self.fallbacks + fallbacks,
        )

    def fallback(self) -> Covers:
        """Return covers that go on from one encoding of the tail, whatever else might fit."""
        written = self.text.encode(self.tail, self.start)
        if written is None:
            written = min(self.ends[-1], default=self._by_bytes(self.tail))
        history = np.concatenate([self.history, np.array(written, np.int64)])
        return self._afresh(history, start=False, fallbacks=1)

    def _by_bytes(self, data: bytes) -> Tokens:
        """Return tokens of bytes that are no text: what is text encoded, then piece by piece."""
        for size in range(len(data), -1, -1):
            ids = self.text.encode(data[:size], self.start)
            if ids is not None:
                return (*ids, *self.text.vocabulary.longest_match(data[size:]))
        return ()


def common_prefix(row: IntArray, full: IntArray) -> int:
    """Return how many first tokens two sequences share."""
    size = min(len(row), len(full))
    differ = np.flatnonzero(row[:size] != full[:size])
    return int(differ[0]) if len(differ) else size
