"""How often people use words and n-grams: from a table, a published profile, or texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, MissingDependency, MissingFile
from .count import Counts, Ngram, count_texts

MOST_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Human:
    """Frequencies in texts that people wrote.

    Attributes
    ----------
    source : str
        What they come from, for reports.
    word_frequency : callable of str to float
        Share of all words, 0 for unknown ones.
    ngrams : mapping of tuple of str to float
        Occurrences per 100,000 characters; n-grams that are not in it were not counted.
    """

    source: str
    word_frequency: Callable[[str], float]
    ngrams: Mapping[Ngram, float] = field(default_factory=dict)


def human_of_texts(texts: Iterable[str], *, source: str) -> Human:
    """Return the frequencies in ``texts``."""
    return human_of_counts(count_texts(texts), source=source)


def human_of_counts(counts: Counts, *, source: str) -> Human:
    """Return the frequencies that ``counts`` hold."""
    total = max(counts.words_total, 1)
    grams = {g: counts.per_100k(g) for counter in counts.ngrams.values() for g in counter}
    return Human(
        source=source, word_frequency=lambda word: counts.words[word] / total, ngrams=grams
    )


def word_table() -> Callable[[str], float]:
    """Return frequencies of English words (the ``wordfreq`` package).

    Raises
    ------
    MissingDependency
    """
    try:
        from wordfreq import word_frequency
    except ImportError:
        raise MissingDependency(
            "wordfreq: not installed, and no human texts were given to count instead; "
            'run: pip install "steersman[slop]", or name some with --human-text'
        ) from None
    return lambda word: float(word_frequency(word, "en"))


def read_human(path: Path) -> Human:
    """Read a published profile of human writing; words come from :func:`word_table`.

    The file is that of slop-forensics: ``{name: {num_texts_analyzed, avg_length (characters),
    top_bigrams: [{ngram, frequency}], top_trigrams: [...]}}``.

    Raises
    ------
    MissingFile, InvalidInput
        One line with file and key.
    MissingDependency
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InvalidInput(f"{path}: larger than {MOST_BYTES // 1_000_000} MB")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidInput(f"{path}: not a JSON file of n-grams: {exc}") from None
    entries = list(data.values()) if isinstance(data, dict) else []
    if len(entries) != 1 or not isinstance(entries[0], dict):
        raise InvalidInput(f"{path}: expected one named profile, such as {{name: {{...}}}}")
    entry = entries[0]
    chars = _number(path, entry, "num_texts_analyzed") * _number(path, entry, "avg_length")
    grams: dict[Ngram, float] = {}
    for n, key in ((2, "top_bigrams"), (3, "top_trigrams")):
        listed = entry.get(key)
        if not isinstance(listed, list):
            raise InvalidInput(f"{path}: {key}: expected a list")
        for item in listed:
            text = item.get("ngram") if isinstance(item, dict) else None
            if not isinstance(text, str):
                raise InvalidInput(f"{path}: {key}: expected {{ngram: text, frequency: number}}")
            gram = tuple(text.casefold().split())
            if len(gram) == n:
                grams[gram] = 1e5 * _number(path, item, "frequency") / chars
    return Human(source=str(path), word_frequency=word_table(), ngrams=grams)


def _number(path: Path, entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise InvalidInput(f"{path}: {key}: expected a number above 0, got {value!r}")
    return float(value)
