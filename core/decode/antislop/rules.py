"""Rules of a ban: what must not be written, and how strictly; also from files."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import InvalidInput, MissingFile, UsageError, did_you_mean
from ...logits.stage import check_number
from ...model import Tokenizer
from ...read_file import decoded, read_bytes
from ...strict_json import parse_json

MAX_FILE_BYTES = 8 << 20
MAX_PHRASES = 100_000
MAX_PATTERNS = 256  # regexes; each is searched on its own
MAX_LENGTH = 256  # characters of a phrase
MAX_REGEX = 1000  # characters of a regex

KINDS = ("phrase", "regex", "ngram")  # in the order in which they win at the same token


@dataclass(frozen=True)
class Rule:
    """Something banned.

    Attributes
    ----------
    kind : int
        Place in :data:`KINDS`.
    text : str
        As it was written.
    factor : float in [0, 1)
        What the probability of the token that begins it is multiplied by; 0 bans it.
    """

    kind: int
    text: str
    factor: float

    @property
    def hard(self) -> bool:
        """Whether it may never stand in the text."""
        return self.factor == 0


def make_rules(
    *,
    phrases: Sequence[str],
    listed: Sequence[tuple[str, float | None]],
    regexes: Sequence[str],
    ngrams: Sequence[str],
    factor: float,
    factors: Mapping[str, float],
    strength: float,
) -> tuple[Rule, ...]:
    """Return the rules that change anything, each with its factor to the power of ``strength``.

    Parameters
    ----------
    phrases, regexes, ngrams : sequence of str
    listed : sequence of (phrase, factor or None)
        From a file.
    factor : float
        For every rule that has none of its own.
    factors : mapping of rule text to float
        Own factors; they override the file's.
    strength : float
    """
    own = {text: value for text, value in listed if value is not None} | dict(factors)
    texts = [(0, text) for text in phrases] + [(0, text) for text, _ in listed]
    texts += [(1, text) for text in regexes] + [(2, text) for text in ngrams]
    found: dict[tuple[int, str], Rule] = {}
    for kind, text in texts:
        final = own.get(text, factor) ** strength
        if final < 1:
            found[kind, text] = Rule(kind, text, final)
    return tuple(found.values())


def check_lists(
    name: str,
    *,
    phrases: Sequence[str],
    regexes: Sequence[str],
    ngrams: Sequence[str],
    listed: Sequence[tuple[str, float | None]],
    factors: Mapping[str, float],
) -> None:
    """Raise UsageError for the first rule that cannot be used as it is written."""
    for key, values, longest, most in (
        ("phrases", phrases, MAX_LENGTH, MAX_PHRASES),
        ("regexes", regexes, MAX_REGEX, MAX_PATTERNS),
        ("ngrams", ngrams, MAX_LENGTH, MAX_PHRASES),
    ):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UsageError(f"{name}: {key} must be a list of texts, got {values!r}")
        if len(values) > most:
            raise UsageError(f"{name}: {key} may hold {most} texts, got {len(values)}")
        for number, text in enumerate(values, 1):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"{name}: {key} item {number}: expected some text, got {text!r}")
            if len(text) > longest:
                raise UsageError(
                    f"{name}: {key} item {number}: at most {longest} characters, got {len(text)}"
                )
    known = {*phrases, *regexes, *ngrams, *(text for text, _ in listed)}
    for text, value in factors.items():
        if text not in known:
            near = did_you_mean(text, known) if len(known) < 1000 else ""
            raise UsageError(f"{name}: factors names {text!r}, which no list holds{near}")
        check_number(name, f"factors {text!r}", value, 0, 1)


def read_phrases(path: str | Path) -> tuple[tuple[str, float | None], ...]:
    """Return the phrases of a file, each with its factor if the file has one.

    The file is UTF-8: one phrase per line (empty lines and lines that begin with "# " are left
    out), or a JSON list of phrases or of [phrase] or [phrase, number]. If all numbers lie in
    [0, 1] they are factors; otherwise they are counts, which are not used.

    Raises
    ------
    MissingFile, InvalidInput
        With the line or item that cannot be used.
    """
    try:
        facts = Path(path).stat()
    except OSError:
        raise MissingFile(f"{path}: no such file") from None
    if not stat.S_ISREG(facts.st_mode):
        raise InvalidInput(f"{path}: not a file")
    if facts.st_size > MAX_FILE_BYTES:
        raise InvalidInput(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB")
    return _read(str(path), facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=4)
def _read(path: str, _changed: int, size: int) -> tuple[tuple[str, float | None], ...]:
    text = decoded(read_bytes(path, MAX_FILE_BYTES), path).removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        return _from_json(path, text)
    found: list[tuple[str, float | None]] = []
    for number, written in enumerate(text.split("\n"), 1):
        phrase = written.strip()
        if phrase and not phrase.startswith("# "):
            found.append((_checked(f"{path}:{number}", phrase, len(found)), None))
    return tuple(found)


def _from_json(path: str, text: str) -> tuple[tuple[str, float | None], ...]:
    items = parse_json(text, path)
    found: list[tuple[str, float | None]] = []
    for number, item in enumerate(items, 1):
        where = f"{path}: item {number}"
        pair: list[Any] = item if isinstance(item, list) else [item]
        value = pair[1] if len(pair) == 2 else None
        wrong = isinstance(value, bool) or not isinstance(value, int | float | None)
        if not 1 <= len(pair) <= 2 or not isinstance(pair[0], str) or wrong:
            raise InvalidInput(f'{where}: expected "phrase", ["phrase"] or ["phrase", number]')
        if value is not None and not 0 <= value < float("inf"):
            raise InvalidInput(f"{where}: the number must be 0 or more, got {value}")
        found.append((_checked(where, pair[0], len(found)), value))
    if any(value is not None and value > 1 for _, value in found):
        return tuple((phrase, None) for phrase, _ in found)
    return tuple((p, None if value is None else float(value)) for p, value in found)


def _checked(where: str, phrase: str, before: int) -> str:
    if not phrase.strip():
        raise InvalidInput(f"{where}: empty; write a phrase or leave it out")
    if len(phrase) > MAX_LENGTH:
        raise InvalidInput(f"{where}: at most {MAX_LENGTH} characters, got {len(phrase)}")
    if before >= MAX_PHRASES:
        raise InvalidInput(f"{where}: at most {MAX_PHRASES} phrases")
    return phrase


def openings(phrase: str, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that may begin ``phrase``.

    These are the first tokens of it in lower case, capitalised and in upper case, each with and
    without a space before it, and the first tokens of what those tokens' texts begin with: if
    " tapestry" begins with the token " tape", then also " tap", " ta", " t" and " ".
    """

    def first(text: str) -> list[int]:
        try:
            return tokenizer.encode(text)[:1]
        except InvalidInput:  # a vocabulary that cannot write it
            return []

    forms = {phrase.lower(), phrase.capitalize(), phrase.upper()}
    found = {token for form in forms for text in (form, " " + form) for token in first(text)}
    for token in tuple(found):
        text = tokenizer.token_bytes(token).decode("utf-8", "ignore")
        found.update(begin for end in range(1, len(text)) for begin in first(text[:end]))
    return frozenset(found)
