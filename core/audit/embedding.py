"""Vectors of tokens and texts that provider and auditor agree on, and fingerprints of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..array import to_numpy
from ..errors import UsageError
from ..model import Capability, Forward, Model

Floats = npt.NDArray[np.float32]
STEP = 2.0**-12  # grid of the rounding; vectors have unit length


def on_grid(vector: npt.NDArray[Any]) -> Floats:
    """Return vectors (..., d) at unit length, rounded to multiples of 1/4096.

    Rounding makes most differences between engines, batches and thread counts vanish, though not
    one that straddles the middle between two steps. Zero vectors stay; there is no -0.
    """
    wide = np.asarray(vector, np.float64)
    norm = np.sqrt((wide * wide).sum(axis=-1, keepdims=True))
    unit = wide / np.where(norm > 0, norm, 1)
    return (np.rint(unit / STEP) * STEP + 0.0).astype(np.float32)


def serialise(vector: npt.NDArray[Any]) -> bytes:
    """Return the bytes of a vector: float32, little endian, no header."""
    return np.ascontiguousarray(vector, "<f4").tobytes()


def blocks(count: int, size: int) -> list[tuple[int, int]]:
    """Return (begin, end) of consecutive blocks of ``size`` tokens; the last may be shorter."""
    return [(i, min(i + size, count)) for i in range(0, count, size)]


@dataclass
class Embedder:
    """Mean hidden states of a language model, one text at a time.

    Parameters
    ----------
    model : Model
    layer : int
        0: the mean of the tokens' input embeddings, which costs no pass through the model. Above:
        states after this many layers; the text is read after a beginning-of-text token, which is
        left out of the mean.

    Notes
    -----
    Not for use by two threads at once.
    """

    model: Model
    layer: int = 0
    _known: dict[int, Floats] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        depth = self.model.info.layers
        if not 0 <= self.layer <= depth:
            raise UsageError(f"audit: layer {self.layer} is not in 0..{depth}")
        needs = Capability.HIDDEN if self.layer else Capability.HEAD
        self.model.require(needs, who="audit")

    @property
    def facts(self) -> dict[str, Any]:
        """What vectors depend on."""
        info = self.model.info
        return {"weights": info.fingerprint, "dtype": info.dtype, "layer": self.layer,
                "width": info.width}  # fmt: skip

    def tokens(self, ids: Sequence[int]) -> Floats:
        """Return a vector per token, (m, d), rounded; each token embedded by itself."""
        new = sorted({int(i) for i in ids} - set(self._known))
        if new and not self.layer:
            rows = to_numpy(self.model.embed(np.asarray(new, np.int64)))
            self._known |= dict(zip(new, on_grid(rows), strict=True))
        for token in new if self.layer else ():
            self._known[token] = on_grid(self._states([token]).mean(axis=0))
        width = self.model.info.width
        return np.stack([self._known[int(i)] for i in ids]) if len(ids) else np.zeros(
            (0, width), np.float32)  # fmt: skip

    def text(self, ids: Sequence[int]) -> Floats:
        """Return the vector (d,) of a text given as token ids, rounded; zero for no tokens."""
        if not len(ids):
            return np.zeros(self.model.info.width, np.float32)
        if not self.layer:
            rows = to_numpy(self.model.embed(np.asarray(ids, np.int64)))
            return on_grid(np.asarray(rows, np.float64).mean(axis=0))
        return on_grid(self._states(ids).mean(axis=0))

    def _states(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        tokenizer, size = self.model.tokenizer, self.model.prefill_chunk
        front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        whole = np.asarray([*front, *ids], np.int64)
        parts = []
        with self.model.session(needs=Capability.HIDDEN, context=len(whole) + 8) as session:
            for begin in range(0, len(whole), size):
                ask = Forward(
                    keep=begin, tokens=whole[None, begin : begin + size], logits="none",
                    hidden=(self.layer,),
                )  # fmt: skip
                parts.append(to_numpy(session.forward(ask).hidden[self.layer][0, :, :]))
        found: npt.NDArray[np.float64] = np.concatenate(parts).astype(np.float64)[len(front) :]
        return found


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """What a provider commits to.

    Attributes
    ----------
    token_vectors : float32 (m, d)
    block_vectors : float32 (ceil(m / block), d)
    block : int
        Tokens per block.
    """

    token_vectors: Floats = field(repr=False)
    block_vectors: Floats = field(repr=False)
    block: int

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.token_vectors)

    def leaf(self, index: int) -> Floats:
        """Return the fingerprint (2 d,) of a token: its block's vector, then its own."""
        return np.concatenate([self.block_vectors[index // self.block], self.token_vectors[index]])


def fingerprints(embedder: Embedder, ids: Sequence[int], *, block: int) -> Fingerprints:
    """Return the fingerprints of reasoning tokens cut into blocks."""
    if block < 1:
        raise UsageError(f"audit: block must be at least 1, got {block}")
    ids = [int(i) for i in ids]
    rows = [embedder.text(ids[a:b]) for a, b in blocks(len(ids), block)]
    width = embedder.model.info.width
    return Fingerprints(
        token_vectors=embedder.tokens(ids),
        block_vectors=np.stack(rows) if rows else np.zeros((0, width), np.float32),
        block=block,
    )
