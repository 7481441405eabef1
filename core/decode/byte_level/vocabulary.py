"""A vocabulary sorted by bytes: which tokens begin with given bytes, and which byte comes next."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ...model import IntArray, Tokenizer

FloatArray = npt.NDArray[np.float64]
# Of the columns' own type, or numpy would copy a whole column to compare it.
_EVERY_BYTE = np.arange(256, dtype=np.uint8)


class Vocabulary:
    """Ordinary tokens in the order of their bytes; control tokens stand apart.

    Tokens that begin with the same bytes are neighbours, so a set of them is a range
    ``low..high``, and the next byte splits a range into 256 consecutive parts: no step ever walks
    over the vocabulary in Python.

    Parameters
    ----------
    tokenizer : Tokenizer
        Read once, token by token.

    Attributes
    ----------
    ids : int64 (N,)
        Ids of the tokens that have bytes, in the order of their bytes, then of their ids.
    lengths : int64 (N,)
    columns : uint8 (longest, N)
        ``columns[d]`` holds byte ``d`` of every token, 0 beyond its end.
    place : int64 (V,)
        Where an id stands in ``ids``; -1 for control tokens and tokens without bytes.
    adjacent : bool (256, 256)
        Whether some token holds the two bytes next to each other.
    specials : int64 (S,)
        Control tokens, ascending.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special_ids
        size = tokenizer.vocab_size
        pieces = [b"" if i in special else tokenizer.token_bytes(i) for i in range(size)]
        order = sorted((i for i in range(size) if pieces[i]), key=lambda i: (pieces[i], i))
        self.pieces = tuple(pieces)
        self.ids: IntArray = np.array(order, np.int64)
        self.lengths: IntArray = np.array([len(pieces[i]) for i in order], np.int64)
        self.longest = int(self.lengths.max(initial=0))
        table = np.zeros((len(order), self.longest), np.uint8)
        for row, i in enumerate(order):
            table[row, : len(pieces[i])] = np.frombuffer(pieces[i], np.uint8)
        self.columns = np.ascontiguousarray(table.T)
        self.place: IntArray = np.full(size, -1, np.int64)
        self.place[self.ids] = np.arange(len(order))
        self.specials: IntArray = np.array(sorted(special), np.int64)
        self.adjacent = np.zeros((256, 256), np.bool_)
        for d in range(self.longest - 1):
            here = self.lengths > d + 1
            self.adjacent[self.columns[d, here], self.columns[d + 1, here]] = True
        self._first = np.append(self._split(0, len(order), 0), len(order))
        self.single = self._single_bytes()

    def _single_bytes(self) -> IntArray:
        """Return for each byte its own token, else one that begins with it, else token ``ids[0]``.

        These ids only name emitted bytes; which bytes they stand for is told beside them.
        """
        found = np.full(256, self.ids[0] if len(self.ids) else 0, np.int64)
        starts = self._first[:-1]
        some = self._first[1:] > starts
        found[some] = self.ids[starts[some]]  # the shortest comes first
        return found

    def _split(self, low: int, high: int, depth: int) -> IntArray:
        column = self.columns[depth, low:high]
        return low + np.searchsorted(column, _EVERY_BYTE, side="left").astype(np.int64)

    def bounds(self, low: int, high: int, depth: int) -> IntArray:
        """Return where each next byte begins in a range of tokens that share ``depth`` bytes.

        Returns
        -------
        int64 (257,)
            Tokens whose byte ``depth`` is ``b`` stand at ``bounds[b]..bounds[b + 1]``. Tokens that
            end at ``depth`` stand before ``bounds[0]``.
        """
        if depth == 0 and low == 0 and high == len(self.ids):
            return self._first
        begin = low
        while begin < high and self.lengths[begin] == depth:
            begin += 1
        if begin == high:
            return np.full(257, high, np.int64)
        return np.append(self._split(begin, high, depth), high)

    def within(self, low: int, high: int, depth: int, byte: int) -> tuple[int, int]:
        """Return the part of a range (see :meth:`bounds`) whose byte ``depth`` is ``byte``."""
        while low < high and self.lengths[low] == depth:
            low += 1
        if low == high:
            return low, low
        column = self.columns[depth, low:high]
        left = int(np.searchsorted(column, np.uint8(byte), side="left"))
        right = int(np.searchsorted(column, np.uint8(byte), side="right"))
        return low + left, low + right

    def starting_with(self, data: bytes) -> tuple[int, int]:
        """Return the range of tokens whose bytes begin with ``data``."""
        low, high = 0, len(self.ids)
        for depth, byte in enumerate(data):
            if depth >= self.longest or low == high:
                return low, low
            low, high = self.within(low, high, depth, byte)
        return low, high

    def longest_match(self, data: bytes) -> tuple[int, ...]:
        """Return tokens for bytes that no text has, longest first; unknown bytes are left out."""
        found, at = [], 0
        while at < len(data):
            low, high, best = 0, len(self.ids), -1
            for depth, byte in enumerate(data[at : at + self.longest]):
                low, high = self.within(low, high, depth, byte)
                if low == high:
                    break
                if self.lengths[low] == depth + 1:
                    best = low
            found += [int(self.ids[best])] if best >= 0 else []
            at += int(self.lengths[best]) if best >= 0 else 1
        return tuple(found)

    def bytes_of(self, tokens: tuple[int, ...]) -> bytes:
        """Return the bytes of a sequence of ordinary tokens."""
        return b"".join(self.pieces[t] for t in tokens)


def sums(values: FloatArray, edges: IntArray, low: int) -> FloatArray:
    """Return the sums (256,) of ``values`` (of tokens from ``low`` on) between ``edges`` (257,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    picked: FloatArray = np.diff(total[edges - low])
    return picked


class PerTokenizer:
    """Remembers what was built for the last few tokenizers, for all threads.

    Parameters
    ----------
    build : callable
        From a tokenizer to the value; the value may hold the tokenizer.
    most : int
        How many are kept; the one not asked for the longest goes first.
    """

    def __init__(self, build: Any, most: int = 4) -> None:
        self._build = build
        self._most = most
        self._held: list[tuple[Tokenizer, Any]] = []
        self._lock = threading.Lock()

    def __call__(self, tokenizer: Tokenizer) -> Any:
        with self._lock:
            at = next((i for i, (t, _) in enumerate(self._held) if t is tokenizer), None)
            entry = (tokenizer, self._build(tokenizer)) if at is None else self._held.pop(at)
            self._held = [entry, *self._held[: self._most - 1]]
            return entry[1]


@lru_cache(maxsize=1024)
def continuations(partial: bytes) -> tuple[int, int]:
    """Return the range ``first..last`` of bytes that may follow an unfinished UTF-8 character.

    For ``b""`` it is 0..255, of which :func:`utf8_mask` knows better.
    """
    if not partial:
        return 0, 255
    if len(partial) == 1:
        special = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
        return special.get(partial[0], (0x80, 0xBF))
    return 0x80, 0xBF


def unfinished(data: bytes) -> bytes:
    """Return the bytes at the end of ``data`` that begin a UTF-8 character without ending it."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return b""
        if byte >= 0xC0:
            need = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[-back:] if need > back else b""
    return b""


def utf8_mask(partial: bytes) -> npt.NDArray[np.bool_]:
    """Return which of the 256 bytes may follow text that ends in the unfinished ``partial``."""
    allowed = np.zeros(256, np.bool_)
    if partial:
        first, last = continuations(partial)
        allowed[first : last + 1] = True
    else:
        allowed[:0x80] = allowed[0xC2:0xF5] = True
    return allowed
