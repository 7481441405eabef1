"""Training examples for listwise reranking: a query, its candidates, and their right order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInput, MissingFile
from ..objectives import ranks_of
from .encoding import PromptEncoder
from .identifiers import LETTERS

MAX_LINE = 16 << 20  # bytes
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class RankingExample:
    """A window with its right order.

    Attributes
    ----------
    query : str
    passages : tuple of str (n,)
        In the order they are shown; 2 to 26.
    ranking : tuple of int (n,)
        Places of the passages, best first.
    ranks : tuple of int (n,), optional
        Rank of each passage, 1 is best; passages of the same rank are not compared. Those of
        ``ranking`` if None.
    """

    query: str
    passages: tuple[str, ...]
    ranking: tuple[int, ...]
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.passages)
        if not 2 <= n <= len(LETTERS):
            raise InvalidInput(f"passages: expected 2 to {len(LETTERS)}, got {n}")
        if sorted(self.ranking) != list(range(n)):
            raise InvalidInput(f"ranking: must hold each of 0..{n - 1} once, best first")
        if self.ranks is not None and len(self.ranks) != n:
            raise InvalidInput(f"ranks: expected {n}, got {len(self.ranks)}")


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """An example as token ids.

    Attributes
    ----------
    ids : tuple of int (T,)
        Prompt, the opening bracket, and the ranking as text, ended by an end token.
    labels : tuple of int (T,)
        ``ids`` where the ranking stands, -100 before.
    place : int
        Position of the opening bracket's last token: its logits are the scores.
    letters : tuple of int (n,)
        Token of each passage's letter.
    ranks : tuple of int (n,)
        1 is best; equal ones are not compared.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    place: int
    letters: tuple[int, ...]
    ranks: tuple[int, ...]


def read_examples(path: Path) -> Iterator[RankingExample]:
    """Yield the examples of a JSONL file.

    A line is ``{"query": text, "passages": [text, ...], "ranking": [places, best first]}``;
    instead of ``ranking``, ``"relevance": [numbers]`` ranks by falling relevance: equal ones are
    not compared by the ranking loss, and are written in the order shown.

    Raises
    ------
    MissingFile, InvalidInput
        One line with file and line number.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                if len(raw) > MAX_LINE:
                    raise InvalidInput(f"longer than {MAX_LINE >> 20} MiB")
                if raw.strip():
                    yield _example(json.loads(raw.decode("utf-8")))
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except (InvalidInput, ValueError, RecursionError) as exc:
        raise InvalidInput(f"{path}:{number}: {exc}") from None
    except OSError as exc:
        raise InvalidInput(f"{path}: cannot be read: {exc.strerror}") from None


def _example(data: Any) -> RankingExample:
    if not isinstance(data, dict):
        raise InvalidInput(f"must be a JSON object, got {type(data).__name__}")
    query, passages = data.get("query"), data.get("passages")
    if not isinstance(query, str) or not query.strip():
        raise InvalidInput("query: expected some text")
    if not isinstance(passages, list) or not all(isinstance(p, str) for p in passages):
        raise InvalidInput("passages: expected a list of texts")
    if ("ranking" in data) == ("relevance" in data):
        raise InvalidInput("expected either 'ranking' or 'relevance'")
    ranks = None
    if "ranking" in data:
        ranking = data["ranking"]
        if not isinstance(ranking, list) or not all(type(i) is int for i in ranking):
            raise InvalidInput("ranking: expected a list of whole numbers")
    else:
        values = data["relevance"]
        if (
            not isinstance(values, list)
            or len(values) != len(passages)
            or not all(isinstance(v, int | float) and v == v for v in values)
        ):
            raise InvalidInput("relevance: expected one number per passage")
        ranking = sorted(range(len(values)), key=lambda i: -values[i])
        ranks = tuple(1 + sum(other > value for other in values) for value in values)
    return RankingExample(
        query=query, passages=tuple(passages), ranking=tuple(ranking), ranks=ranks
    )


def encode_example(
    encoder: PromptEncoder, example: RankingExample, *, max_words: int, max_tokens: int
) -> EncodedExample:
    """Return an example as token ids, with fewer words per passage where it would be too long.

    Parameters
    ----------
    encoder : PromptEncoder
    example : RankingExample
    max_words : int
        Most words of a passage.
    max_tokens : int
        Most tokens in all.

    Raises
    ------
    InvalidInput
        It does not fit even without the passages' text.
    """
    target = _target(encoder, example.ranking)
    limit = max_words
    while True:
        prompt = encoder.encode(example.query, example.passages, max_words=limit)
        overflow = len(prompt) + len(target) - max_tokens
        if overflow <= 0:
            break
        if limit == 0:
            raise InvalidInput(
                f"{len(example.passages)} passages need {len(prompt) + len(target)} tokens without "
                f"their text, and {max_tokens} are allowed"
            )
        limit = max(0, limit - max(1, overflow // (4 * len(example.passages))))
    ranks = example.ranks or tuple(ranks_of(list(example.ranking), like=np.empty(0)).tolist())
    return EncodedExample(
        ids=(*prompt, *target),
        labels=(*[IGNORE] * len(prompt), *target),
        place=len(prompt) - 1,
        letters=encoder.identifiers.letters[: len(ranks)],
        ranks=ranks,
    )


def _target(encoder: PromptEncoder, ranking: Sequence[int]) -> list[int]:
    """Return the ids of ``C] > [A] > [B]`` and an end token: what follows the opening bracket."""
    tokenizer = encoder.tokenizer
    text = " > ".join(f"[{LETTERS[place]}]" for place in ranking)
    whole = tokenizer.encode(encoder.prompt.answer + text)
    opening = list(encoder.identifiers.opening)
    if whole[: len(opening)] == opening:
        ids = whole[len(opening) :]
    else:  # a tokenizer that merges bracket and letter: keep the split that prompts have
        first = encoder.identifiers.letters[ranking[0]]
        ids = [first, *tokenizer.encode(text[2:])]
    return [*ids, min(tokenizer.eos_ids)] if tokenizer.eos_ids else ids
