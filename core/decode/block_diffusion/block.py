"""The values of a block under construction, and of the masked positions that a pass is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...array import Array, array_namespace, asarray_like, to_numpy
from ...logits import Chain, LogitBias
from ...logits.candidates import check_left, check_peak
from ...model import IntArray
from ...ops import log_softmax, target_logprobs, top_k
from ..rng import Rng
from ..types import Request, Token
from .credit import Credits

AFTER = 100_000
"""Keys of random numbers of stages after the credit, so that they meet none of those before."""

_PASS = 1_000_000  # keys of a pass: this times its number, plus the key of the use


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block under construction. ``tokens`` holds None where it is still masked."""

    start: int
    tokens: tuple[Token | None, ...]
    passes: int = 0
    credits: Credits = field(default_factory=Credits)

    @property
    def fixed(self) -> tuple[Token, ...]:
        """The tokens before the first masked position."""
        known = []
        for token in self.tokens:
            if token is None:
                break
            known.append(token)
        return tuple(known)

    @property
    def full(self) -> bool:
        return all(token is not None for token in self.tokens)

    def ids(self, mask: int) -> IntArray:
        return np.array([mask if t is None else t.id for t in self.tokens], np.int64)


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What stays the same for a text.

    Attributes
    ----------
    chain : Chain
        The strategy's, after a ban of the mask token where there is one.
    before, after : Chain
        Its parts around the credit; neither holds the temperature of 0 that ``greedy`` stands for.
    mask : int
        -1 where blocks are of one token and need none.
    """

    chain: Chain
    before: Chain
    after: Chain
    greedy: bool
    mask: int

    @classmethod
    def of(cls, chain: Chain, mask: int) -> Tools:
        stages = chain.stages
        if mask >= 0:
            stages = (LogitBias(bias={mask: -np.inf}), *stages)
        chain = replace(chain, stages=stages)
        acting = [stage for _, stage in chain.active]
        if chain.greedy:
            acting.pop()
        cut = max((i + 1 for i, stage in enumerate(acting) if stage.by_id), default=0)
        return cls(
            chain=chain,
            before=replace(chain, stages=tuple(acting[:cut])),
            after=replace(chain, stages=tuple(acting[cut:])),
            greedy=chain.greedy,
            mask=mask,
        )


@dataclass(frozen=True)
class Candidates:
    """The masked positions that a pass is about, one row each.

    Attributes
    ----------
    prefix : int64 (T,)
        The text before the block.
    positions : sequence of m int
        Where they stand in the block.
    """

    tools: Tools
    request: Request
    prefix: IntArray
    block: Block
    positions: Sequence[int]
    rng: Rng

    def uniform(self, row: int, key: int) -> float:
        """Return the random number of one row for one use in this pass."""
        return self.rng.uniform(
            self.request.row,
            self.block.start + self.positions[row],
            draw=_PASS * (self.block.passes + 1) + key,
        )

    def uniforms(self, key: int) -> npt.NDArray[np.float64]:
        return np.array([self.uniform(row, key) for row in range(len(self.positions))])

    def history(self, row: int) -> IntArray:
        """Return the fixed tokens before one row's position."""
        block = self.block
        known = [t.id for t in block.tokens[: self.positions[row]] if t is not None]
        return np.concatenate([self.prefix, np.array(known, np.int64)])

    def apply(self, chain: Chain, logits: Array, offset: int = 0) -> Array:
        """Return logits (m, V) after ``chain``."""
        if not chain.active:
            return logits
        return chain.apply(
            logits,
            history=self._histories(chain),
            uniforms=lambda row, key: self.uniform(row, key + offset),
        )

    def _histories(self, chain: Chain, rows: Sequence[int] | None = None) -> list[IntArray]:
        rows = range(len(self.positions)) if rows is None else rows
        return [self.history(row) for row in rows] if chain.needs_history else []

    def read(
        self, raw: Array, final: Array, tokens: Array, sure: Array, *, greedy: bool
    ) -> list[tuple[Token, float]]:
        """Copy everything to the host at once: a token and its confidence per row.

        Raises
        ------
        BackendError
            A row holds NaN or +inf, or the chain left it no token.
        """
        xp = array_namespace(raw)
        logprobs = self.request.logprobs
        peaks = [xp.max(x, axis=-1) for x in (raw, final)]
        columns = [xp.astype(tokens, xp.float32), sure, *peaks]
        if logprobs is not None:
            columns += [target_logprobs(raw, tokens), target_logprobs(final, tokens)]
        table = xp.stack([xp.astype(c, xp.float32) for c in columns], axis=-1)
        if logprobs:
            most, ids = top_k(log_softmax(raw), logprobs)
            table = xp.concat([table, most, xp.astype(ids, xp.float32)], axis=-1)
        found = []
        for number, row in enumerate(to_numpy(table).astype(np.float64)):
            check_peak(float(row[2]), number)
            check_left(row[3:4].astype(np.float32), number)
            token = Token(id=int(row[0]))
            if logprobs is not None:
                token = replace(
                    token, raw_logprob=float(row[4]), logprob=0.0 if greedy else float(row[5])
                )
            if logprobs:
                best, ids = np.split(row[6:], 2)
                top = tuple(zip(ids.astype(np.int64).tolist(), best.tolist(), strict=True))
                token = replace(token, top=top)
            found.append((token, float(row[1])))
        return found

    def traces(
        self, fixed: Sequence[int], raw: Array, settled: Array, tokens: Sequence[int]
    ) -> dict[int, Mapping[str, Any]]:
        """Return how the tokens of the rows ``fixed`` came about, where somebody asked."""
        n, tools = self.request.trace, self.tools
        if n is None:
            return {}
        xp = array_namespace(raw)
        at = asarray_like(np.array(fixed), raw)
        told = tools.after.explain(
            xp.take(settled, at, axis=0),
            history=self._histories(tools.after, fixed),
            uniforms=lambda i, key: self.uniform(fixed[i], key + AFTER),
            n=n,
            tokens=[tokens[row] for row in fixed],
            raw=xp.take(raw, at, axis=0),
            name="block_diffusion",
        )
        return dict(zip(fixed, told, strict=True))
