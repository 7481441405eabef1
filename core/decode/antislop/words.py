"""Words of a text for n-gram rules: lower-cased, alphabetic, stopwords dropped."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any

STOPWORDS = frozenset(
    """
    a about above after again against ai all am an and any are as at be because been before being
    below between both but by ca can did do does doing down during each few for from further had has
    have having he her here hers herself him himself his how i if in into is it its itself just me
    more most my myself no nor not now o of off on once only or other our ours ourselves out over
    own same she should so some such than that the their theirs them themselves then there these
    they this those through to too under until up very was we were what when where which while who
    whom why will with wo you your yours yourself yourselves
    """.split()  # noqa: SIM905
)
_ENDINGS = ("n't", "'s", "'re", "'ve", "'ll", "'d", "'m")
APOSTROPHES = "'\u2019"


def is_word_char(char: str) -> bool:
    """Return whether a character is a letter, a mark or a number."""
    return unicodedata.category(char)[0] in "LMN"


@cache
def _pattern() -> Any:
    import regex

    return regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['\u2019][\p{L}\p{M}\p{N}]+)*")


def words(
    text: str, begin: int = 0, *, stopwords: bool, final: bool
) -> Iterator[tuple[str, int, int]]:
    """Yield (word, first character, end) of the words of ``text`` from ``begin`` on.

    Left out are words that are not alphabetic once a contraction's ending is off, stopwords unless
    ``stopwords`` says to keep them, a word that ``begin`` cuts, and, unless ``final``, one that may
    still grow.
    """
    for match in _pattern().finditer(text, begin):
        start, end = match.span()
        if start == begin > 0 and is_word_char(text[begin - 1]):
            continue
        left = len(text) - end
        if not final and (not left or (left == 1 and text[end] in APOSTROPHES)):
            continue
        word = match.group().casefold().replace("\u2019", "'")
        for ending in _ENDINGS:
            word = word.removesuffix(ending)
        if word.isalpha() and (stopwords or word not in STOPWORDS):
            yield word, start, end
