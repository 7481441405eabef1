"""Byte-pair encoding with random merges, and a model that is exactly a byte source in disguise.

The byte source has texts of bounded length, so that every probability is a finite sum.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from toys import FLOOR, TABLE, TableSession, toy_info

from steersman.core.errors import InvalidInput
from steersman.core.model import Capability, Model


class BpeTokenizer:
    """Merges in order of rank, leftmost first; one end token after the pieces.

    Parameters
    ----------
    letters : bytes
        The alphabet; each byte is a token.
    merges : sequence of (bytes, bytes)
        Both sides are tokens already.
    """

    def __init__(
        self, letters: bytes, merges: Sequence[tuple[bytes, bytes]], *, bos: bool = True
    ) -> None:
        joined = [a + b for a, b in merges]
        self.pieces = tuple(dict.fromkeys([bytes([b]) for b in letters] + joined))
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        count = len(self.pieces)
        self.vocab_size = count + 2
        self.eos_ids = frozenset({count})
        self.bos_id = count + 1 if bos else None
        self.add_bos = bos
        self.special_ids = frozenset({count, count + 1})
        self.chat_template = None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        parts = [bytes([b]) for b in text.encode()]
        if any(part not in self._ids for part in parts):
            raise InvalidInput(f"text: {text!r} is not in the alphabet")
        while True:
            ranked = [
                (self.ranks[pair], at)
                for at, pair in enumerate(itertools.pairwise(parts))
                if pair in self.ranks
            ]
            if not ranked:
                return [self._ids[part] for part in parts]
            _, at = min(ranked)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token] if token < len(self.pieces) else b"<>"

    def token_name(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")


def random_bpe(rng: np.random.Generator, letters: bytes, merges: int = 4) -> BpeTokenizer:
    """Return a tokenizer with random merges; no token is longer than three letters."""
    pieces = [bytes([b]) for b in letters]
    found: list[tuple[bytes, bytes]] = []
    while len(found) < merges:
        a, b = (pieces[int(i)] for i in rng.integers(len(pieces), size=2))
        if len(a + b) <= 3 and (a, b) not in found:
            found.append((a, b))
            if a + b not in pieces:
                pieces.append(a + b)
    return BpeTokenizer(letters, found)


class ByteSource:
    """A Markov chain over letters, of texts up to ``length`` bytes.

    Parameters
    ----------
    letters : bytes
    length : int
        Every text ends there at the latest.
    stop : float
        Chance that a text ends after any byte before that.
    """

    def __init__(
        self, letters: bytes, length: int, stop: float, rng: np.random.Generator, *, iid: Any = None
    ) -> None:
        self.letters, self.length, self.stop = letters, length, stop
        table = rng.dirichlet(np.ones(len(letters)), size=len(letters) + 1)
        self.table = np.tile(iid, (len(letters) + 1, 1)) if iid is not None else table
        self.texts = dict(self._grow(b"", 1.0))
        self._prefix: Counter[bytes] = Counter()
        for text, p in self.texts.items():
            for size in range(len(text) + 1):
                self._prefix[text[:size]] += p  # type: ignore[assignment]

    def _grow(self, text: bytes, chance: float) -> Iterator[tuple[bytes, float]]:
        ends = 1.0 if len(text) == self.length else self.stop if text else 0.0
        if ends:
            yield text, chance * ends
        if ends < 1:
            row = self.table[self.letters.index(text[-1]) if text else -1]
            for letter, p in zip(self.letters, row):
                yield from self._grow(text + bytes([letter]), chance * (1 - ends) * float(p))

    def prefix(self, data: bytes) -> float:
        """Return the probability that a text begins with ``data``."""
        return float(self._prefix[data])


class InducedModel(Model):
    """The token model that follows from a byte source and a tokenizer; logits are float64."""

    def __init__(self, tokenizer: BpeTokenizer, source: ByteSource, *, leak: float = 0.0) -> None:
        self.xp = np
        self.tokenizer = tokenizer
        self.capabilities = TABLE
        self.calls: Counter[str] = Counter()
        self.info = toy_info("toy-induced", "float64", tokenizer, 64, layers=0, width=1, heads=0)
        self.source, self.leak = source, leak
        (eos,) = tokenizer.eos_ids
        self.weight: dict[tuple[int, ...], float] = {}
        for text, p in source.texts.items():
            ids = (*tokenizer.encode(text.decode()), eos)
            for size in range(len(ids) + 1):
                self.weight[ids[:size]] = self.weight.get(ids[:size], 0.0) + p
        self._laws: dict[tuple[int, ...], np.ndarray] = {}

    def probs(self, history: Sequence[int]) -> np.ndarray:
        """Return the exact law after ``history``, which begins with the BOS token."""
        tokens = tuple(int(t) for t in history if t != self.tokenizer.bos_id)
        if tokens not in self._laws:
            whole = self.weight.get(tokens, 0.0)
            size = self.tokenizer.vocab_size
            law = np.full(size, 1.0 / size)
            if whole:
                law = np.array([self.weight.get((*tokens, v), 0.0) for v in range(size)]) / whole
                law = (1 - self.leak) * law + self.leak / size
            self._laws[tokens] = law
        return self._laws[tokens]

    def session(
        self, *, max_rows: int = 1, needs: Capability = Capability.NONE, context: int | None = None
    ) -> InducedSession:
        return InducedSession(
            self, max_rows=max_rows, needs=needs, context=context or self.info.context
        )

    embed = embedding = norm = head = None  # type: ignore[assignment]


class InducedSession(TableSession):
    """As the table model's, with logits in float64 so that oracles can ask for 1e-10."""

    def _logits(self, plan: Any, answers: list[list[list[int]]]) -> Any:
        if plan.logits == "none":
            return None
        logits = np.zeros((plan.batch, plan.width, self.model.info.vocab_size))
        for b, histories in enumerate(answers):
            for i, history in enumerate(histories):
                logits[b, i] = np.log(np.maximum(self.model.probs(history), FLOOR**9))
        if plan.logits == "last":
            logits = logits[np.arange(plan.batch), np.maximum(plan.counts - 1, 0)]
        return logits


def prompts_of(source: ByteSource, longest: int) -> Iterator[bytes]:
    """Yield every text of 1 to ``longest`` letters."""
    for size in range(1, longest + 1):
        for letters in itertools.product(source.letters, repeat=size):
            yield bytes(letters)
