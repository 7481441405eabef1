"""Which tokens may stand in a text's bag of words: those of its own words, stop words left out."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

from ..errors import UsageError, did_you_mean
from ..model import Tokenizer

_WORD = re.compile(r"\w+")
_REMEMBERED = 1 << 16  # words

# English function words: articles, pronouns, prepositions, conjunctions, auxiliaries, particles,
# and the pieces that contractions fall into.
_ENGLISH = """
    a about above across after afterwards again against ain all almost along already also
    although always am among an and another any anyone anything are aren around as at be became
    because become becomes been before being below between both but by can cannot could couldn d
    did didn do does doesn doing don done down during each either else ever every few for from
    further had hadn has hasn have haven having he hence her here hers herself him himself his
    how however i if in into is isn it its itself just ll m ma may me might mightn mine more
    most much must mustn my myself needn neither no nor not now o of off on once one only onto
    or other others otherwise our ours ourselves out over own per perhaps rather re s same shall
    shan she should shouldn since so some such t than that the their theirs them themselves then
    there therefore these they this those through thus to too toward towards under until up upon
    us ve very was wasn we were weren what whatever when whenever where whether which while who
    whom whose why will with within without won would wouldn y yet you your yours yourself
    yourselves
"""
ENGLISH = frozenset(_ENGLISH.split())

STOP_WORDS: dict[str, frozenset[str]] = {"english": ENGLISH, "none": frozenset()}
# Names what the words of an index were made with; change it when pattern or list change.
WORDS_VERSION = "words-1"


def words_of(text: str, stop_words: frozenset[str] = ENGLISH) -> list[str]:
    r"""Return the distinct lower-case words (``\w+``) of a text, in order, stop words left out."""
    found = dict.fromkeys(_WORD.findall(text.lower()))
    return [word for word in found if word not in stop_words and word != "_"]


class TokensOfWords:
    """Ids of the tokens that spell the words of a text.

    Each word is encoded on its own, without a blank in front of it, as it would follow the opening
    quote of the prompt. A word of several tokens adds each of them; a token counts once.

    Parameters
    ----------
    tokenizer : Tokenizer
    stop_words : {"english", "none"}
    """

    def __init__(self, tokenizer: Tokenizer, stop_words: str = "english") -> None:
        if stop_words not in STOP_WORDS:
            raise UsageError(f"stop words: {stop_words!r}{did_you_mean(stop_words, STOP_WORDS)}")
        self._encode: Callable[[str], list[int]] = tokenizer.encode
        self._stop_words = STOP_WORDS[stop_words]
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def __call__(self, text: str) -> list[int]:
        """Return the sorted distinct ids for a text."""
        found: set[int] = set()
        for word in words_of(text, self._stop_words):
            found.update(self._ids(word))
        return sorted(found)

    def _ids(self, word: str) -> tuple[int, ...]:
        known = self._known.get(word)
        if known is None:
            known = tuple(int(i) for i in self._encode(word))
            self._known[word] = known
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return known
