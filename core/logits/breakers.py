"""Texts as every token sequence that may contain them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from ..model import Tokenizer

Breakers = Mapping[int, frozenset[tuple[int, ...]]]
"""First token, to the tuples of tokens after it that complete the text; () if none is needed."""

MAX_TAIL = 20  # tokens

_VOCABULARIES: weakref.WeakKeyDictionary[Any, list[bytes]] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of every token, read once per tokenizer."""
    try:
        return _VOCABULARIES[tokenizer]
    except (KeyError, TypeError):
        pass
    texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    try:
        _VOCABULARIES[tokenizer] = texts
    except TypeError:  # cannot be referred to weakly: read again next time
        pass
    return texts


def breaker_tokens(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Breakers:
    """Return the token sequences in which any of ``texts`` may appear.

    A token that contains a text is a breaker alone. A token that ends in the beginning of a text
    is one together with the tokens of the remainder, at most 20 of them.

    Parameters
    ----------
    tokenizer : Tokenizer
    texts : tuple of str
        Not empty ones.
    """
    found: dict[int, set[tuple[int, ...]]] = {}
    vocabulary = _vocabulary(tokenizer)
    for text in texts:
        data = text.encode()
        cuts = range(1, len(data))
        tails: dict[int, tuple[int, ...]] = {}
        for token, piece in enumerate(vocabulary):
            if data in piece:
                found.setdefault(token, set()).add(())
                continue
            for cut in cuts:
                if not piece.endswith(data[:cut]):
                    continue
                if cut not in tails:
                    rest = data[cut:].decode(errors="ignore")
                    tails[cut] = tuple(tokenizer.encode(rest)[:MAX_TAIL])
                if tails[cut]:
                    found.setdefault(token, set()).add(tails[cut])
    return {token: frozenset(tails) for token, tails in found.items()}
