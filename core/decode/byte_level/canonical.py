"""Which token sequences a tokenizer produces, and where no token can cross."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from ...errors import SteersmanError
from ...model import Tokenizer
from .vocabulary import PerTokenizer, Vocabulary, continuations, unfinished

Tokens = tuple[int, ...]
WHITE = frozenset(b" \t\n\r\x0b\x0c")
# What may follow, for pre-tokenizers that look ahead: after white space they ask whether a word
# begins, after digits how many more there are.
_AFTERWHITE = (b"a", b"0", b".", b" a", b"\n")
_AFTER_DIGIT = (b"0", b"00")
_REMEMBERED = 1 << 14
_SAMPLES = 32  # known characters tried as ends of an unfinished one


class Canonical:
    """Canonical sequences of one tokenizer: those that it produces itself, or begins with.

    A sequence is *canonical* when some text that begins with its bytes is encoded to tokens that
    begin with it. For plain byte-pair encoding this is to say that it re-encodes to itself. For
    pre-tokenizers that look ahead it is more: SmolLM2 writes two line breaks at the end of a text
    as one token, and as two when a word follows. What may follow is tried by a few probes.

    All methods are pure; answers of the tokenizer are remembered (a bounded number).

    Parameters
    ----------
    tokenizer : Tokenizer
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self._known: dict[tuple[bytes, bool], Tokens | None] = {}
        # Whether a token stands for its own bytes behind a boundary: 0 not yet asked, 1 yes, 2 no.
        self.alone = np.zeros(len(self.vocabulary.ids), np.int8)
        self._crossing = self._crossing_tokens()
        self.clean_white = frozenset(WHITE) - {
            right[0] for rights in self._crossing.values() for right in rights
        }
        adds = self.tokenizer.encode("a")
        self._adds_space = self.vocabulary.bytes_of(tuple(adds)) == b" a"

    # -- encoding --------------------------------------------------------------------------------

    def encode(self, data: bytes, start: bool) -> Tokens | None:
        """Return the tokens of ``data``; None where it is no UTF-8 or has no tokens.

        Parameters
        ----------
        data : bytes
        start : bool
            True: ``data`` begins the text or follows a control token, so that its first space is
            the one that some tokenizers put there. False: it follows a safe boundary.
        """
        key = (data, start)
        if key in self._known:
            return self._known[key]
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        found = self._known[key] = self._encode(data, start)
        return found

    def _encode(self, data: bytes, start: bool) -> Tokens | None:
        if not data:
            return ()
        try:
            text = data.decode("utf-8")
            if not self._adds_space:
                ids = tuple(self.tokenizer.encode(text))
            elif start and text[0] == " ":
                ids = tuple(self.tokenizer.encode(text[1:]))
            else:
                lead = self.tokenizer.encode("\n")
                whole = self.tokenizer.encode("\n" + text)
                if whole[: len(lead)] != lead:
                    return None
                ids = tuple(whole[len(lead) :])
        except (UnicodeDecodeError, SteersmanError):
            return None
        return ids if self.vocabulary.bytes_of(ids) == data else None

    def probes(self, data: bytes) -> Iterator[bytes]:
        """Yield what may follow ``data``: nothing, and what a pre-tokenizer may look ahead for."""
        partial = unfinished(data)
        if partial:
            yield from self._completions(partial)
            return
        yield b""
        if data and data[-1] in WHITE:
            yield from _AFTERWHITE
        elif data and 0x30 <= data[-1] <= 0x39:
            yield from _AFTER_DIGIT

    def ends(self, data: bytes, start: bool) -> frozenset[Tokens]:
        """Return every canonical sequence whose bytes are exactly ``data``; usually one."""
        found: set[Tokens] = set()
        for probe in self.probes(data):
            ids = self.encode(data + probe, start)
            if ids is not None and (head := self._head(ids, len(data))) is not None:
                found.add(head)
        return frozenset(found)

    def _head(self, ids: Tokens, size: int) -> Tokens | None:
        """Return the first tokens that have exactly ``size`` bytes together."""
        pieces, at = self.vocabulary.pieces, 0
        for count, token in enumerate(ids):
            if at == size:
                return ids[:count]
            at += len(pieces[token])
            if at > size:
                return None
        return ids if at == size else None

    def is_canonical(self, tokens: Tokens, data: bytes, start: bool) -> bool:
        """Return whether ``tokens``, whose bytes are ``data``, is a canonical sequence."""
        for probe in self.probes(data):
            ids = self.encode(data + probe, start)
            if ids is not None and ids[: len(tokens)] == tokens:
                return True
        return False

    def stays(self, tokens: Tokens, data: bytes, more: bytes, start: bool) -> bool:
        """Return whether ``data`` still reads as ``tokens`` when ``more`` follows."""
        ids = self.encode(data + more, start)
        return ids is not None and self._head(ids, len(data)) == tokens

    def is_alone(self, place: int) -> bool:
        """Return whether the token at ``place`` is what its bytes encode to behind a boundary."""
        if self.alone[place] == 0:
            token = int(self.vocabulary.ids[place])
            good = self.is_canonical((token,), self.vocabulary.pieces[token], False)
            self.alone[place] = 1 if good else 2
        return bool(self.alone[place] == 1)

    # -- characters that are not complete --------------------------------------------------------

    @cached_property
    def _characters(self) -> frozenset[bytes]:
        """Characters of more than one byte that occur in tokens."""
        found: set[bytes] = set()
        for piece in self.vocabulary.pieces:
            if not piece.isascii():
                found.update(c.encode() for c in piece.decode("utf-8", "ignore") if c > "\x7f")
        return frozenset(found)

    @cached_property
    def _characters_from(self) -> dict[bytes, list[bytes]]:
        table: dict[bytes, list[bytes]] = {}
        for character in sorted(self._characters):
            for size in range(1, len(character)):
                some = table.setdefault(character[:size], [])
                if len(some) < _SAMPLES:
                    some.append(character[size:])
        return table

    @cached_property
    def _rests(self) -> dict[int, list[bytes]]:
        """Tokens that are nothing but the end of a character, by their length."""
        table: dict[int, list[bytes]] = {}
        for piece in sorted(set(self.vocabulary.pieces)):
            if piece and len(piece) < 4 and all(0x80 <= b < 0xC0 for b in piece):
                some = table.setdefault(len(piece), [])
                if len(some) < _SAMPLES:
                    some.append(piece)
        return table

    def _completions(self, partial: bytes) -> Iterator[bytes]:
        """Yield ends of an unfinished character: for each next byte one that no token holds.

        Then some that tokens do hold, and some that a token completes. At most 64 + 2 * 32.
        """
        first, last = continuations(partial)
        need = 2 if partial[0] < 0xE0 else 3 if partial[0] < 0xF0 else 4
        for byte in range(first, last + 1):
            more = need - len(partial) - 1
            for fill in range(0x80, 0xC0):
                tail = bytes([byte]) + (bytes([fill]) * more if more else b"")
                if partial + tail not in self._characters:
                    yield tail
                    break
                if not more:
                    break
        yield from self._characters_from.get(partial, ())
        yield from self._rests.get(need - len(partial), ())

    # -- boundaries ------------------------------------------------------------------------------

    def _crossing_tokens(self) -> dict[bytes, list[bytes]]:
        """Return tokens that hold white space after something else, cut there: left to rights."""
        found: dict[bytes, list[bytes]] = {}
        for piece in self.vocabulary.pieces:
            for at in range(1, len(piece)):
                if piece[at] in WHITE and piece[at - 1] not in WHITE:
                    found.setdefault(piece[:at], []).append(piece[at:])
        return found

    def is_safe(self, data: bytes, at: int) -> bool:
        """Return whether no token of any text that begins with ``data`` crosses offset ``at``.

        Such places are between something and the white space that follows it, unless a token is
        known that could stand across.
        """
        if not 0 < at < len(data) or data[at] not in WHITE or data[at - 1] in WHITE:
            return False
        before, after = data[:at], data[at:]
        if before[-1] >= 0x80:  # white space beyond ASCII joins the run that follows
            last = before.decode("utf-8", "replace")[-1:]
            if last.isspace() or last == "\ufffd":
                return False
        if after[0] in self.clean_white:
            return True
        longest = max(map(len, self._crossing), default=0)
        for size in range(1, min(longest, at) + 1):
            for right in self._crossing.get(before[at - size :], ()):
                if after.startswith(right) or right.startswith(after):
                    return False
        return True

    def last_cut(self, data: bytes, *, reach: int = 512) -> int:
        """Return the last safe offset within the last ``reach`` bytes of ``data``; 0 if none."""
        for at in range(len(data) - 1, max(0, len(data) - reach), -1):
            if self.is_safe(data, at):
                return at
        return 0


canonical_of = PerTokenizer(Canonical)
