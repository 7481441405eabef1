"""Counting words and n-grams of many texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..decode.antislop.words import words

Ngram = tuple[str, ...]
MOST = 2_000_000  # n-grams of one length held at once; the rarest are dropped beyond


@dataclass(kw_only=True)
class Counts:
    """How often words and n-grams occur.

    Attributes
    ----------
    texts, chars, words_total : int
    words : Counter of str
        Four letters and more, or with an apostrophe; stopwords left out, possessives merged.
    ngrams : dict of n to Counter of tuple of str
        Consecutive words of three letters and more once stopwords are left out; n is 2 or 3.
    spread : Counter of str or tuple of str
        Number of texts that a word or n-gram occurs in.
    """

    texts: int = 0
    chars: int = 0
    words_total: int = 0
    words: Counter[str] = field(default_factory=Counter)
    ngrams: dict[int, Counter[Ngram]] = field(default_factory=lambda: {2: Counter(), 3: Counter()})
    spread: Counter[str | Ngram] = field(default_factory=Counter)

    def add(self, text: str) -> None:
        """Count one more text."""
        found = [word for word, _, _ in words(text, stopwords=False, final=True)]
        self.texts += 1
        self.chars += len(text)
        self.words_total += sum(1 for _ in words(text, stopwords=True, final=True))
        kept = [word for word in found if len(word) >= 4]
        self.words.update(kept)
        long = [word for word in found if len(word) >= 3]
        seen: set[str | Ngram] = set(kept)
        for n, counter in self.ngrams.items():
            grams = [tuple(long[i : i + n]) for i in range(len(long) - n + 1)]
            counter.update(grams)
            seen.update(grams)
            if len(counter) > MOST:
                self.ngrams[n] = Counter(dict(counter.most_common(MOST // 2)))
        self.spread.update(seen)
        if len(self.spread) > 3 * MOST:
            self.spread = Counter(dict(self.spread.most_common(MOST)))

    def per_100k(self, gram: Ngram) -> float:
        """Return occurrences of an n-gram per 100,000 characters."""
        return 1e5 * self.ngrams[len(gram)][gram] / max(self.chars, 1)


def count_texts(texts: Iterable[str], *, progress: Callable[[int], None] | None = None) -> Counts:
    """Count the words and n-grams of ``texts``.

    Parameters
    ----------
    texts : iterable of str
    progress : callable, optional
        Called with 1 after every text.
    """
    counts = Counts()
    for text in texts:
        counts.add(text)
        if progress is not None:
            progress(1)
    return counts


def exact_phrases(texts: Iterable[str], grams: Iterable[Ngram]) -> dict[Ngram, tuple[str, int]]:
    """Return, for each trigram, the commonest stretch of text that it stands for, and its count.

    The stretch runs from the first word to the last, with the stopwords between them. Stretches
    with a full stop, question or exclamation mark inside cross sentences and are passed over.
    """
    wanted = set(grams)
    found: dict[Ngram, Counter[str]] = {}
    for text in texts:
        long = [w for w in words(text, stopwords=False, final=True) if len(w[0]) >= 3]
        for i in range(len(long) - 2):
            gram = tuple(word for word, _, _ in long[i : i + 3])
            if gram not in wanted:
                continue
            stretch = " ".join(text[long[i][1] : long[i + 2][2]].split())
            if not any(mark in stretch for mark in ".?!") and len(stretch) <= 100:
                found.setdefault(gram, Counter())[stretch.casefold()] += 1
    return {gram: counter.most_common(1)[0] for gram, counter in found.items()}
