"""Plans as flat lists of tokens: what goes into the engine's batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.core.array import to_numpy
from steersman.core.model import IntArray, Plan

from .handles import FloatArray


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Tokens of one or more rows, in an order in which each sequence's positions rise.

    Attributes
    ----------
    pos : int32 (N,)
        Position of each token in its sequence.
    flag : int8 (N,)
        1 where logits are wanted.
    tokens : int32 (N,) or None
    embeds : float32 (N, D) or None
        Instead of ``tokens``.
    seq : int32 (N,) or None
        Sequence of each token.
    shared : list of lists of int, or None
        Sequences of each token, where a token belongs to several.
    rows, columns : int64 (N,)
        Where each token stands in the plan.
    causal : bool
    """

    pos: npt.NDArray[np.int32]
    flag: npt.NDArray[np.int8]
    tokens: npt.NDArray[np.int32] | None = None
    embeds: FloatArray | None = None
    seq: npt.NDArray[np.int32] | None = None
    shared: Sequence[Sequence[int]] | None = None
    rows: IntArray | None = None
    columns: IntArray | None = None
    causal: bool = True

    def __len__(self) -> int:
        return len(self.pos)

    def owners(self, index: int) -> Sequence[int]:
        """Return the sequences that token ``index`` belongs to."""
        if self.shared is not None:
            return self.shared[index]
        assert self.seq is not None
        return (int(self.seq[index]),)


def replayed(tokens: IntArray, seq: int, begin: int) -> Entries:
    """Return entries that append ``tokens`` to a sequence of ``begin`` positions, no logits."""
    count = len(tokens)
    return Entries(
        tokens=tokens.astype(np.int32),
        pos=np.arange(begin, begin + count, dtype=np.int32),
        seq=np.full(count, seq, np.int32),
        flag=np.zeros(count, np.int8),
    )


def entries_of(
    plan: Plan,
    seqs: Sequence[int],
    nodes: Sequence[Sequence[Sequence[int]]] | None,
    *,
    every: bool,
    apart: bool,
) -> Iterator[Entries]:
    """Return a plan's new tokens, in one list or in one per row.

    Parameters
    ----------
    plan : Plan
    seqs : sequence of int
        Sequence of each row.
    nodes : nested sequences, optional
        For trees: of each row, of each node, the sequences that hold it.
    every : bool
        Flag all positions, whatever the plan wants.
    apart : bool
        One list per row.
    """
    embeds = None if plan.embeds is None else np.asarray(to_numpy(plan.embeds), np.float32)
    groups = [[i] for i in range(plan.batch)] if apart else [list(range(plan.batch))]
    for group in groups:
        counts = plan.counts[group]
        total = int(counts.sum())
        if not total:
            continue
        valid = np.arange(plan.width)[None, :] < counts[:, None]
        rows, columns = np.nonzero(valid)
        rows = np.asarray(group, np.int64)[rows]
        flag = np.zeros(total, np.int8)
        if every or plan.logits == "all":
            flag[:] = 1
        elif plan.logits == "last":
            flag[(np.cumsum(counts) - 1)[counts > 0]] = 1
        yield Entries(
            tokens=None if plan.tokens is None else plan.tokens[rows, columns].astype(np.int32),
            embeds=None if embeds is None else np.ascontiguousarray(embeds[rows, columns]),
            pos=plan.positions[rows, columns].astype(np.int32),
            seq=None if nodes is not None else np.asarray(seqs, np.int32)[rows],
            shared=None
            if nodes is None
            else [nodes[int(r)][int(c)] for r, c in zip(rows, columns)],
            flag=flag,
            rows=rows,
            columns=columns,
            causal=plan.causal,
        )


def leaves_of(parents: npt.NDArray[Any]) -> list[int]:
    """Return the nodes of a tree that have no children, in order."""
    inner = set(parents.tolist())
    return [node for node in range(len(parents)) if node not in inner]
