"""The generated text of which some tokens may have to go, and which token made which character."""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from ...model import Tokenizer
from ..text import token_piece
from ..types import Token


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """Generated tokens with their text; a value, so going back is keeping an older one or a cut.

    Bytes that do not form a character yet wait for the next token, as on screen.

    Attributes
    ----------
    tokens : tuple of Token
    text : str
        The characters that are complete.
    rest : bytes
        Bytes of the character that has begun; at most 3.
    marks : tuple of (int, bytes)
        Per token: complete characters after it, and the ``rest`` after it.
    """

    tokens: tuple[Token, ...] = ()
    text: str = ""
    rest: bytes = b""
    marks: tuple[tuple[int, bytes], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: Token, tokenizer: Tokenizer) -> Transcript:
        """Return the transcript with one more token."""
        data = self.rest + token_piece(token, tokenizer)
        fresh, used = codecs.utf_8_decode(data, "replace", False)
        text, rest = self.text + fresh, data[used:]
        return Transcript(
            tokens=(*self.tokens, token),
            text=text,
            rest=rest,
            marks=(*self.marks, (len(text), rest)),
        )

    def extend(self, tokens: Iterable[Token], tokenizer: Tokenizer) -> Transcript:
        """Return the transcript with more tokens."""
        grown = self
        for token in tokens:
            grown = grown.append(token, tokenizer)
        return grown

    def cut(self, tokens: int) -> Transcript:
        """Return the first ``tokens`` tokens."""
        if tokens >= len(self.tokens):
            return self
        length, rest = self.marks[tokens - 1] if tokens else (0, b"")
        return Transcript(
            tokens=self.tokens[:tokens],
            text=self.text[:length],
            rest=rest,
            marks=self.marks[:tokens],
        )

    def final_text(self) -> str:
        """Return the text as it stands when nothing follows."""
        return self.text + codecs.utf_8_decode(self.rest, "replace", True)[0]

    def token_at(self, char: int) -> int:
        """Return the token that holds the first byte of a character."""
        return bisect_right(self.marks, char, key=_begun)

    def settled(self, chars: int) -> int:
        """Return how many tokens lie wholly within the first ``chars`` characters."""
        return bisect_right(self.marks, chars, key=_begun) if chars > 0 else 0


def _begun(mark: tuple[int, bytes]) -> int:
    """Return how many characters have begun after a token."""
    return mark[0] + bool(mark[1])
