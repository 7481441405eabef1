"""Ranking what a model over-uses, and choosing what to ban."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from .count import Counts, Ngram, exact_phrases
from .human import Human

Kind = Literal["word", "rare word", "bigram", "trigram", "phrase"]
_TINY = 1e-12
_LISTED = 5000  # n-grams considered, the commonest
_TRIGRAMS = 1000  # trigrams of which the exact wording is sought


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A word or phrase that the model over-uses.

    Attributes
    ----------
    text : str
    kind : str
        "rare word" is one that the human table does not hold.
    count, texts : int
        Occurrences, and in how many texts.
    rate : float
        Words: share of all words. Others: per 100,000 characters.
    human : float or None
        The same among people; None where it was not counted.
    ratio : float or None
        ``rate / human``.
    score : float
        What it was ranked by, within its kind.
    """

    text: str
    kind: Kind
    count: int
    texts: int
    rate: float
    human: float | None
    ratio: float | None
    score: float


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """Most entries to ban of each kind; the paper's pipeline takes these in its first round."""

    words: int = 800
    rare_words: int = 80
    known_bigrams: int = 400
    new_bigrams: int = 800
    known_trigrams: int = 300
    new_trigrams: int = 800
    phrases: int = 600

    @classmethod
    def later(cls) -> Quotas:
        """Return the smaller quotas of later rounds."""
        return cls(
            words=200, rare_words=20, known_bigrams=70, new_bigrams=100,
            known_trigrams=50, new_trigrams=100, phrases=100,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SlopProfile:
    """What a model over-uses, most over-used first within each list.

    Attributes
    ----------
    texts, chars : int
        Size of the corpus.
    human : str
        Source of the human frequencies.
    words, ngrams, phrases : tuple of Entry
    """

    texts: int
    chars: int
    human: str
    words: tuple[Entry, ...] = field(repr=False)
    ngrams: tuple[Entry, ...] = field(repr=False)
    phrases: tuple[Entry, ...] = field(repr=False)


def slop_profile(
    texts: Sequence[str],
    counts: Counts,
    human: Human,
    *,
    quotas: Quotas | None = None,
    min_ratio: float = 2.0,
    min_texts: int = 3,
    allowed: Set[str] = frozenset(),
) -> SlopProfile:
    """Rank what ``texts`` over-use against what people write.

    Parameters
    ----------
    texts : sequence of str
    counts : Counts
        Of the same texts.
    human : Human
    quotas : Quotas, optional
    min_ratio : float
        Words and n-grams that people use more than ``1 / min_ratio`` times as often are left out.
    min_texts : int
        Least number of texts that an entry occurs in, so that the topic of one prompt is no slop.
    allowed : set of str
        Words and phrases never to be listed.

    Notes
    -----
    Formulas and quotas are the paper's: words that the human table holds are ranked by
    ``ratio * rate**0.75 / human**0.75``, other words by rate; n-grams that it holds by ratio,
    others by rate; phrases are the exact wordings of the commonest trigrams, by count.
    ``min_ratio`` and ``min_texts`` are ours: some hundred texts have too few words for the quotas.

    References
    ----------
    Paech et al., "Antislop", arXiv:2510.15061, and its released pipeline.
    """
    quotas = quotas or Quotas()
    folded = {text.casefold() for text in allowed}
    common, rare = _words(counts, human, min_ratio, min_texts, folded)
    known, new = _ngrams(counts, human, min_ratio, min_texts, folded)
    ngrams = []
    for n, some_known, some_new in (
        (2, quotas.known_bigrams, quotas.new_bigrams),
        (3, quotas.known_trigrams, quotas.new_trigrams),
    ):
        ngrams += [e for e in known if e.text.count(" ") == n - 1][:some_known]
        ngrams += [e for e in new if e.text.count(" ") == n - 1][:some_new]
    return SlopProfile(
        texts=counts.texts,
        chars=counts.chars,
        human=human.source,
        words=tuple(common[: quotas.words] + rare[: quotas.rare_words]),
        ngrams=tuple(ngrams),
        phrases=tuple(_phrases(texts, counts, human, min_ratio, min_texts, folded))[
            : quotas.phrases
        ],
    )


def _words(
    counts: Counts, human: Human, min_ratio: float, min_texts: int, allowed: Set[str]
) -> tuple[list[Entry], list[Entry]]:
    common: list[Entry] = []
    rare: list[Entry] = []
    for word, count in counts.words.items():
        if counts.spread[word] < min_texts or word in allowed:
            continue
        rate, usual = count / max(counts.words_total, 1), human.word_frequency(word)
        ratio = rate / max(usual, _TINY)
        if ratio < min_ratio:
            continue
        known = usual > 0
        entry = Entry(
            text=word,
            kind="word" if known else "rare word",
            count=count,
            texts=counts.spread[word],
            rate=rate,
            human=usual if known else None,
            ratio=ratio if known else None,
            score=ratio * (rate / usual) ** 0.75 if known else ratio,
        )
        (common if known else rare).append(entry)
    return _sorted(common), _sorted(rare)


def _ngrams(
    counts: Counts, human: Human, min_ratio: float, min_texts: int, allowed: Set[str]
) -> tuple[list[Entry], list[Entry]]:
    known, new = [], []
    for n, counter in counts.ngrams.items():
        for gram, _ in counter.most_common(_LISTED):
            entry = _ngram_entry(counts, human, gram, "bigram" if n == 2 else "trigram")
            if entry.texts < min_texts or entry.text in allowed:
                continue
            if entry.ratio is None:
                new.append(entry)
            elif entry.ratio >= min_ratio:
                known.append(entry)
    return _sorted(known), _sorted(new)


def _ngram_entry(counts: Counts, human: Human, gram: Ngram, kind: Kind) -> Entry:
    rate, usual = counts.per_100k(gram), human.ngrams.get(gram)
    ratio = None if usual is None else rate / max(usual, _TINY)
    return Entry(
        text=" ".join(gram),
        kind=kind,
        count=counts.ngrams[len(gram)][gram],
        texts=counts.spread[gram],
        rate=rate,
        human=usual,
        ratio=ratio,
        score=rate if ratio is None else ratio,
    )


def _phrases(
    texts: Sequence[str],
    counts: Counts,
    human: Human,
    min_ratio: float,
    min_texts: int,
    allowed: Set[str],
) -> list[Entry]:
    grams = [gram for gram, _ in counts.ngrams[3].most_common(_TRIGRAMS)]
    entries = []
    for gram, (text, count) in exact_phrases(texts, grams).items():
        of_gram = _ngram_entry(counts, human, gram, "phrase")
        if of_gram.texts < min_texts or count < min_texts or text in allowed:
            continue
        if of_gram.ratio is not None and of_gram.ratio < min_ratio:
            continue
        entries.append(
            Entry(
                text=text,
                kind="phrase",
                count=count,
                texts=of_gram.texts,
                rate=1e5 * count / max(counts.chars, 1),
                human=of_gram.human,
                ratio=of_gram.ratio,
                score=float(count),
            )
        )
    return _sorted(entries)


def _sorted(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (-entry.score, entry.text))
