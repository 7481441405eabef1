"""Which token a model emits for the letter in ``[A]``, directly after the bracket."""

from __future__ import annotations

import string
from dataclasses import dataclass

from ..errors import InvalidInput
from ..model import Tokenizer

LETTERS = string.ascii_uppercase


@dataclass(frozen=True, kw_only=True)
class Identifiers:
    """Token ids of the identifiers A..Z.

    Attributes
    ----------
    opening : tuple of int
        Ids of ``"["`` and of what stands before it in the answer; a prompt that ends in them is
        followed by a letter.
    letters : tuple of int (26,)
        Distinct; ``letters[j]`` is the id of ``chr(65 + j)`` after ``opening``.
    forced : bool
        True when the tokenizer itself would merge a bracket with a letter, so that prompts hold a
        split it would not make.
    """

    opening: tuple[int, ...]
    letters: tuple[int, ...]
    forced: bool = False


def find_identifiers(tokenizer: Tokenizer, before: str = "") -> Identifiers:
    """Find the identifiers' tokens from the tokenizer, not from a guess about its vocabulary.

    Many vocabularies hold both ``A`` and `` A``. The one that follows a bracket is the last token
    of ``"[A"``, if the rest of it is ``"["``. Where the tokenizer merges the two (``[A`` is one
    token), the prompt still ends in ``"["`` and the bare letter's token is read: a forced split.

    Parameters
    ----------
    tokenizer : Tokenizer
    before : str
        What stands in front of the bracket.

    Raises
    ------
    InvalidInput
        The vocabulary has no separate token for some letter.
    """
    opening = tokenizer.encode(before + "[")
    if not opening:
        raise InvalidInput("tokenizer: '[' encodes to nothing; choose another model")
    letters: list[int] = []
    for letter in LETTERS:
        ids = tokenizer.encode(before + "[" + letter)
        if ids[:-1] != opening or tokenizer.token_bytes(ids[-1]).strip() != letter.encode():
            return _forced_split(tokenizer, opening)
        letters.append(ids[-1])
    if len(set(letters)) != len(letters):
        return _forced_split(tokenizer, opening)
    return Identifiers(opening=tuple(opening), letters=tuple(letters))


def _forced_split(tokenizer: Tokenizer, opening: list[int]) -> Identifiers:
    wanted = {letter.encode(): letter for letter in LETTERS}
    found: dict[str, int] = {}
    for token in range(tokenizer.vocab_size):
        letter = wanted.get(tokenizer.token_bytes(token))
        if letter is not None and token not in tokenizer.special_ids:
            found.setdefault(letter, token)
    missing = [letter for letter in LETTERS if letter not in found]
    if missing:
        raise InvalidInput(
            f"tokenizer: no single token for the identifier {missing[0]!r}; choose another model"
        )
    return Identifiers(
        opening=tuple(opening), letters=tuple(found[x] for x in LETTERS), forced=True
    )
