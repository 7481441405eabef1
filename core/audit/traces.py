"""Reasoning traces with their answers, and what a dishonest provider may add to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput, UsageError
from ..model import Tokenizer
from ..strict_json import check_text, parse_json
from ..text_lines import Report, read_records
from .embedding import Embedder, Fingerprints, Floats, fingerprints
from .protocol import Challenge, Sampled

Inflation = Literal["random", "repeat", "foreign", "topic"]
INFLATIONS: tuple[Inflation, ...] = ("random", "repeat", "foreign", "topic")


@dataclass(frozen=True, kw_only=True)
class AuditTrace:
    """A hidden reasoning and the visible answer.

    Attributes
    ----------
    reasoning, answer : str
    question : str
        Traces with the same one belong together when sets are split.
    """

    reasoning: str
    answer: str
    question: str


def parse_trace(value: Any, where: str, *, default_question: str = "") -> AuditTrace:
    """Check one trace: ``{"reasoning", "answer", "question"}``, the question may be missing.

    Raises
    ------
    InvalidInput
        Naming ``where`` and the key.
    """
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: must be an object")
    texts = {}
    for key in ("reasoning", "answer", "question"):
        text = value.get(key, default_question if key == "question" else None)
        if not isinstance(text, str):
            raise InvalidInput(f"{where}: {key}: must be text")
        check_text(text, f"{where}: {key}")
        texts[key] = text
    return AuditTrace(**texts)


def read_traces(
    lines: Iterable[bytes], name: str, *, report: Report | None = None
) -> Iterator[AuditTrace]:
    """Read traces, one JSON object per line; see :func:`parse_trace`."""

    def parse(text: str, where: str) -> AuditTrace:
        return parse_trace(parse_json(text, where), where, default_question=where)

    return read_records(lines, name, parse, report=report)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A trace as tokens and vectors.

    Attributes
    ----------
    ids : tuple of int
        Of the reasoning.
    prints : Fingerprints
    answer : float32 (d,)
    answer_tokens : int
    question : str
    """

    ids: tuple[int, ...] = field(repr=False)
    prints: Fingerprints
    answer: Floats = field(repr=False)
    answer_tokens: int
    question: str


def prepare(embedder: Embedder, tokenizer: Tokenizer, trace: AuditTrace, *, block: int) -> Prepared:
    """Return a trace's tokens, fingerprints and the vector of its answer."""
    ids = tokenizer.encode(trace.reasoning)
    answer = tokenizer.encode(trace.answer)
    return Prepared(
        ids=tuple(ids),
        prints=fingerprints(embedder, ids, block=block),
        answer=embedder.text(answer),
        answer_tokens=len(answer),
        question=trace.question,
    )


def inflated_ids(
    kind: Inflation,
    rate: float,
    own: Sequence[int],
    others: Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
) -> list[int]:
    """Return a trace with ``rate`` times its length of tokens added behind it.

    Parameters
    ----------
    kind : str
        "random": any tokens of the vocabulary; "repeat": its own, over again; "foreign" and
        "topic": those of ``others``, one after the other.
    rate : float
        Added tokens over true ones.
    own : sequence of int
    others : sequence of sequence of int
        Reasoning about other questions; for "topic" the likeliest to pass come first.
    """
    wanted = round(rate * len(own))
    if kind == "random":
        plain = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(tokenizer.special_ids))
        return [*own, *(int(i) for i in rng.choice(plain, wanted))]
    pool = list(own) if kind == "repeat" else [i for ids in others for i in ids]
    if not pool and wanted:
        raise UsageError(f"inflation {kind}: there are no tokens to add")
    return [*own, *(pool[i % len(pool)] for i in range(wanted))]


def seen_blocks(prints: Fingerprints, challenge: Challenge) -> list[Sampled]:
    """Return what an auditor would see of the blocks that a challenge asks for, without hashes."""
    indices = np.asarray(challenge.indices, np.int64)
    numbers = indices // prints.block
    return [
        Sampled(
            number=int(n),
            vector=prints.block_vectors[n],
            tokens=prints.token_vectors[indices[numbers == n]],
        )
        for n in np.unique(numbers)
    ]


# -- training pairs -------------------------------------------------------------------------------

Pairs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def noise_blocks(embedder: Embedder, count: int, *, block: int, rng: np.random.Generator) -> Floats:
    """Return vectors (count, d) of blocks of random tokens."""
    tokenizer = embedder.model.tokenizer
    ids = [inflated_ids("random", block, [0], [], tokenizer=tokenizer, rng=rng)[1:]
           for _ in range(count)]  # fmt: skip
    return np.stack([embedder.text(one) for one in ids])


def head_pairs(
    traces: Sequence[Prepared],
    head: Literal["tokens", "answer"],
    *,
    seed: int = 0,
    sample: int = 16,
    noise: Floats | None = None,
) -> Pairs:
    """Return vectors that match and as many that do not, half of those by chance, half near ones.

    Parameters
    ----------
    traces : sequence of Prepared
        Of two questions at least.
    head : {"tokens", "answer"}
        Mean of sampled tokens against block, or block against answer.
    sample : int
        Tokens sampled of a block.
    noise : float32 (k, d), optional
        Blocks of random tokens: for head "answer" they stand in a third of what does not match.
        Without them a head has never seen a block that is about nothing.

    Returns
    -------
    left, right : float32 (n, d)
    labels : float32 (n,)
    """
    rng = np.random.default_rng(seed)
    owners = np.array([i for i, t in enumerate(traces) for _ in t.prints.block_vectors])
    questions = np.array([traces[i].question for i in owners])
    if len(set(questions.tolist())) < 2:
        raise InvalidInput("coin: needs traces of two questions at least")
    blocks = np.concatenate([t.prints.block_vectors for t in traces])
    if head == "tokens":
        left = np.stack([
            _token_mean(t.prints, n, sample, rng)
            for t in traces for n in range(len(t.prints.block_vectors))
        ])  # fmt: skip
        right = blocks
    else:
        left, right = blocks, np.stack([traces[i].answer for i in owners])
    near = right @ right.T
    near[questions[:, None] == questions[None, :]] = -np.inf
    hard = np.argmax(near, axis=1)
    wrong = np.empty(len(right), np.int64)
    for i in range(len(right)):
        if rng.random() < 0.5:
            wrong[i] = hard[i]
        else:
            wrong[i] = rng.choice(np.flatnonzero(questions != questions[i]))
    other = left.copy()
    if noise is not None and head == "answer":
        places = np.flatnonzero(rng.random(len(left)) < 1 / 3)
        other[places] = noise[rng.integers(0, len(noise), len(places))]
    return (
        np.concatenate([left, other]),
        np.concatenate([right, right[wrong]]),
        np.repeat([1, 0], len(left)).astype(np.float32),
    )


def _token_mean(prints: Fingerprints, number: int, sample: int, rng: np.random.Generator) -> Floats:
    tokens = prints.token_vectors[number * prints.block : (number + 1) * prints.block]
    chosen = rng.permutation(len(tokens))[:sample]
    return tokens[chosen].mean(axis=0)


def neighbours(traces: Sequence[Prepared], place: int, count: int) -> list[int]:
    """Return the ``count`` traces on other questions whose answers are nearest to that of one."""
    whole = np.stack([t.answer for t in traces])
    near = whole @ traces[place].answer
    order = np.argsort(-near, kind="stable")
    return [int(i) for i in order if traces[i].question != traces[place].question][:count]


def inflate(
    kind: Inflation,
    rate: float,
    traces: Sequence[Prepared],
    place: int,
    *,
    embedder: Embedder,
    rng: np.random.Generator,
) -> Fingerprints:
    """Return the fingerprints of one trace inflated by tokens of the others."""
    own = traces[place]
    if kind == "topic":
        chosen = neighbours(traces, place, 8)
    else:
        far = [i for i, t in enumerate(traces) if t.question != own.question]
        chosen = [int(i) for i in rng.permutation(far)[:8]]
    ids = inflated_ids(
        kind, rate, own.ids, [traces[i].ids for i in chosen],
        tokenizer=embedder.model.tokenizer, rng=rng,
    )  # fmt: skip
    return fingerprints(embedder, ids, block=own.prints.block)
