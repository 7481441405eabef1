"""Finding banned phrases, regexes and n-grams at the end of a text that grows.

All phrases are one automaton (Aho-Corasick), and every search looks at the last few characters
only, so a token costs the same however many phrases there are and however long the text is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...errors import MissingDependency, UsageError
from .rules import KINDS, Rule
from .transcript import Transcript
from .words import is_word_char, words


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A rule that the text breaks.

    Attributes
    ----------
    token : int
        The token that holds the first byte of what is banned.
    rule : Rule
    start, end : int
        Characters.
    """

    token: int
    rule: Rule
    start: int
    end: int


def fold(text: str) -> str:
    """Return ``text`` for comparison: case-folded, with one kind of apostrophe."""
    return text.casefold().replace("\u2019", "'")


def fold_window(text: str) -> tuple[str, Sequence[int]]:
    """Return the folded text, and for each of its characters the one of ``text`` it comes from.

    A last entry holds the length of ``text``. Folding may lengthen text ("ß" is "ss").
    """
    folded = fold(text)
    if len(folded) == len(text):
        return folded, range(len(text) + 1)
    origin = [i for i, char in enumerate(text) for _ in fold(char)]
    return folded, [*origin, len(text)]


class Phrases:
    """An automaton for all phrases.

    A phrase that begins or ends with a letter, mark or number is a hit only where no such character
    precedes or follows; whether one follows is known with the next character only.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.longest = 0
        best: dict[str, Rule] = {}
        for rule in rules:
            folded = fold(rule.text)
            # Two spellings of one phrase: the stricter one counts.
            if folded not in best or rule.factor < best[folded].factor:
                best[folded] = rule
        self._automaton: Any = None
        if not best:
            return
        automaton = _ahocorasick().Automaton()
        for folded, rule in best.items():
            bounds = is_word_char(folded[0]), is_word_char(folded[-1])
            automaton.add_word(folded, (len(folded), *bounds, rule))
            self.longest = max(self.longest, len(folded))
        automaton.make_automaton()
        self._automaton = automaton

    def find(self, text: str, since: int, final: bool) -> Iterator[tuple[int, int, Rule]]:
        """Yield (start, end, rule) of what came after the first ``since`` characters."""
        if self._automaton is None:
            return
        begin = max(0, since - self.longest - 1)  # one more, to see what precedes
        window, origin = fold_window(text[begin:])
        for last, (length, left, right, rule) in self._automaton.iter(window):
            end, start = last + 1, last + 1 - length
            if begin + origin[end] < since:
                continue
            if (start and origin[start] == origin[start - 1]) or origin[end] == origin[last]:
                continue  # begins or ends within a character that folds to several
            if left and start and is_word_char(window[start - 1]):
                continue
            if right and (is_word_char(window[end]) if end < len(window) else not final):
                continue
            yield begin + origin[start], begin + origin[end], rule


class Regexes:
    """Patterns, each searched on its own so that the rule behind a match is known.

    A match that touches the end of an unfinished text waits, since it may not be one for long.
    """

    def __init__(self, rules: Sequence[Rule], span: int, timeout: float) -> None:
        self._patterns = [(compile_regex(rule.text), rule) for rule in rules]
        self._span, self._timeout = span, timeout

    def find(
        self, text: str, since: int, final: bool, slow: Collection[Rule]
    ) -> Iterator[tuple[int, int, Rule]]:
        """Yield (start, end, rule); (-1, -1, rule) for one that takes too long.

        Rules in ``slow`` are left out.
        """
        for pattern, rule in self._patterns:
            if rule in slow:
                continue
            at = max(0, since - self._span)
            try:
                while (match := pattern.search(text, at, timeout=self._timeout)) is not None:
                    start, end = match.span()
                    if end > start and (end < len(text) or final):
                        yield start, end, rule
                    at = start + 1
            except TimeoutError:
                yield -1, -1, rule


class NGrams:
    """Consecutive words, after stopwords and words that are not alphabetic were dropped."""

    def __init__(self, rules: Sequence[Rule], span: int, stopwords: bool) -> None:
        self._span, self._stopwords = span, stopwords
        self._by_last: dict[str, list[tuple[tuple[str, ...], Rule]]] = {}
        for rule in rules:
            gram = ngram_words(rule.text, stopwords)
            self._by_last.setdefault(gram[-1], []).append((gram, rule))

    def find(self, text: str, since: int, final: bool) -> Iterator[tuple[int, int, Rule]]:
        """Yield (start, end, rule) of n-grams whose last word has ended after ``since`` chars."""
        if not self._by_last:
            return
        begin = max(0, since - self._span)
        seen = list(words(text, begin, stopwords=self._stopwords, final=final))
        for place in range(len(seen) - 1, -1, -1):
            word, _, end = seen[place]
            if end < since - 1:  # an apostrophe may have kept a word open for one character
                return
            for gram, rule in self._by_last.get(word, ()):
                first = place - len(gram) + 1
                if first >= 0 and all(seen[first + i][0] == w for i, w in enumerate(gram)):
                    yield seen[first][1], end, rule


class Matcher:
    """All rules of a ban. Not changed by use, so one may serve many texts.

    Parameters
    ----------
    rules : sequence of Rule
    stopwords : bool
        Whether n-grams count stopwords.
    span : int
        Characters that regexes and n-grams look back.
    timeout : float
        Seconds after which a regex is given up.
    """

    def __init__(
        self, rules: Sequence[Rule], *, stopwords: bool, span: int, timeout: float
    ) -> None:
        by_kind = [[rule for rule in rules if rule.kind == kind] for kind in range(len(KINDS))]
        self._phrases = Phrases(by_kind[0])
        self._regexes = Regexes(by_kind[1], span, timeout)
        self._ngrams = NGrams(by_kind[2], span, stopwords)
        self.empty = not rules
        # How far back from the end of the text a match of the future may begin, in characters.
        self.reach = max(
            self._phrases.longest,
            span if by_kind[1] or by_kind[2] else 0,
        )

    def find(
        self,
        transcript: Transcript,
        since: int,
        *,
        final: bool = False,
        allowed: Collection[tuple[int, Rule]] = (),
        slow: Collection[Rule] = (),
    ) -> tuple[Hit | None, list[Rule]]:
        """Return what to go back for first, and the regexes that took too long.

        The lowest token wins, then the order of kinds, then the earliest start, then the longest.

        Parameters
        ----------
        transcript : Transcript
        since : int
            Characters that were searched before, with the same ``allowed``.
        final : bool
            Nothing follows the text.
        allowed : collection of (token, rule)
            Hits that have been decided on and stay.
        slow : collection of Rule
            Regexes not to search for.
        """
        text = transcript.final_text() if final else transcript.text
        best: Hit | None = None
        late: list[Rule] = []
        for found in (
            self._phrases.find(text, since, final),
            self._regexes.find(text, since, final, slow),
            self._ngrams.find(text, since, final),
        ):
            for start, end, rule in found:
                if start < 0:
                    late.append(rule)
                    continue
                token = transcript.token_at(start)
                if (token, rule) in allowed:
                    continue
                hit = Hit(token=token, rule=rule, start=start, end=end)
                if best is None or _order(hit) < _order(best):
                    best = hit
        return best, late


def _order(hit: Hit) -> tuple[int, int, int, int]:
    return hit.token, hit.rule.kind, hit.start, -hit.end


@lru_cache(maxsize=4)
def matcher(rules: tuple[Rule, ...], *, stopwords: bool, span: int, timeout: float) -> Matcher:
    """Return the matcher of ``rules``, kept for the next text."""
    return Matcher(rules, stopwords=stopwords, span=span, timeout=timeout)


@lru_cache(maxsize=512)
def compile_regex(pattern: str) -> Any:
    """Return the compiled pattern.

    Raises
    ------
    UsageError
        It does not compile, or matches the empty text. The message lacks the place.
    """
    import regex

    try:
        made = regex.compile(pattern, regex.IGNORECASE | regex.MULTILINE | regex.DOTALL)
    except (regex.error, ValueError, RecursionError, OverflowError) as exc:
        raise UsageError(f"{pattern!r}: {exc}") from None
    if made.search("") is not None:
        raise UsageError(f"{pattern!r}: matches the empty text, so it would ban everything")
    return made


def ngram_words(text: str, stopwords: bool) -> tuple[str, ...]:
    """Return the words of an n-gram rule.

    Raises
    ------
    UsageError
        No words are left. The message lacks the place.
    """
    gram = tuple(word for word, _, _ in words(text, stopwords=stopwords, final=True))
    if not gram:
        raise UsageError(f"{text!r}: holds stopwords only, or no words; nothing to compare")
    return gram


def _ahocorasick() -> Any:
    try:
        import ahocorasick
    except ImportError:
        raise MissingDependency(
            "phrases: pyahocorasick is not installed; run: pip install pyahocorasick"
        ) from None
    return ahocorasick
