"""From token bytes to text: incremental UTF-8, stop strings, and taking text back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..model import Tokenizer
from .types import Token


def token_piece(token: Token, tokenizer: Tokenizer) -> bytes:
    """Return the bytes that a generated token shows."""
    if token.piece is not None:
        return token.piece
    # Control tokens have a name but no text of their own.
    return b"" if token.id in tokenizer.special_ids else tokenizer.token_bytes(token.id)


class TextAssembler:
    """Turns tokens into the text that may be shown so far.

    Bytes that do not yet form a whole character wait for the next token. A tail that may become a
    stop string waits too, so that no part of a stop string is ever shown.

    Parameters
    ----------
    stop : sequence of str
        Strings that end the text; they are not part of it. Empty strings are ignored.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(s for s in stop if s)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._pieces: list[bytes] = []
        self._reset()

    def _reset(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        self._shown = 0
        self.stopped_by: str | None = None

    @property
    def shown(self) -> str:
        """Text shown so far."""
        return self._text[: self._shown]

    def append(self, piece: bytes) -> str:
        """Add one token's bytes; return the text that may be shown now.

        Once a stop string is complete, ``stopped_by`` names it and nothing after it is shown.
        """
        self._pieces.append(piece)
        return self._extend(self._decoder.decode(piece))

    def _extend(self, fresh: str) -> str:
        if self.stopped_by is not None:
            return ""
        searched_from = max(0, len(self._text) - self._longest + 1)
        self._text += fresh
        # The string that is complete first wins, however the tokens cut the text.
        found = [
            (at + len(s), at, s)
            for s in self._stop
            if (at := self._text.find(s, searched_from)) >= 0
        ]
        if found:
            _, at, self.stopped_by = min(found)
            self._text = self._text[:at]
            safe = at
        else:
            safe = len(self._text) - self._held()
        before, self._shown = self._shown, max(self._shown, safe)
        return self._text[before : self._shown]

    def _held(self) -> int:
        """Length of the longest tail that is a proper beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self._text)), 0, -1):
            tail = self._text[-length:]
            if any(len(s) > length and s.startswith(tail) for s in self._stop):
                return length
        return 0

    def keep(self, tokens: int) -> str:
        """Keep the first ``tokens`` tokens; return the shown text that is withdrawn."""
        was_shown = self.shown
        pieces, self._pieces = self._pieces[:tokens], []
        self._reset()
        for piece in pieces:
            self.append(piece)
        return was_shown[self._shown :]

    def finish(self) -> str:
        """No more tokens will come: return what was held back."""
        if self.stopped_by is None:
            self._text += self._decoder.decode(b"", final=True)
        before, self._shown = self._shown, len(self._text)
        return self._text[before:]
