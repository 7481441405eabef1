"""Which sequence each row of a session lies in, and what is truly there.

Reordering rows only changes this table; forks alone copy. The table also survives failures: it
records how many of a row's tokens its sequence holds, and whoever needs more computes the rest
again from the ids that the session has recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steersman.core.model import PAD, Plan

from .cache import Cache
from .entries import leaves_of


@dataclass(slots=True)
class Row:
    """Where a row lies.

    Attributes
    ----------
    seq : int
        Sequence; -1 when nothing is left of the row.
    have : int
        Leading tokens of the row that the sequence holds.
    nodes : list of int, optional
        While a draft tree is pending: a sequence that holds each node.
    """

    seq: int
    have: int
    nodes: list[int] | None = None


def arrange(cache: Cache, old: list[Row], plan: Plan) -> list[Row]:
    """Move, copy and cut sequences as a plan says, and return its rows.

    Their ``have`` is at most the plan's ``start``, and less where an earlier failure lost tokens.
    """
    rows: list[Row] = []
    for i, index in enumerate(plan.rows):
        row = old[index]
        seq, have = row.seq, min(row.have, int(plan.base[i]))
        if plan.path is not None and row.nodes is not None:
            path = plan.path[i][plan.path[i] != PAD]
            if len(path):
                seq, have = row.nodes[int(path[-1])], int(plan.start[i])
        # Never trust the table beyond what the cache says it holds.
        rows.append(Row(seq, min(have, cache.length[seq]) if seq >= 0 else 0))
    kept = {row.seq for row in rows}
    free = [seq for seq in range(len(cache.length)) if seq not in kept]
    for seq in free:
        cache.remove(seq, 0)
    taken: set[int] = set()
    for row in rows:
        source = row.seq
        if source < 0 or source in taken:
            row.seq = free.pop()
        if source in taken:
            cache.copy(source, row.seq)
        taken.add(row.seq)
    # A copy is of the whole sequence, so cutting comes after all of them.
    for row in rows:
        if not cache.remove(row.seq, row.have):
            row.have = 0  # a recurrent state cannot be cut, only computed again
    return rows


def what_is_left(rows: list[Row], plan: Plan, count: int) -> list[Row]:
    """Return the ``count`` old rows as they are once the new ones are cut back to ``base``."""
    left = [Row(-1, 0) for _ in range(count)]
    for i, index in enumerate(plan.rows):
        if left[index].seq < 0:
            left[index] = Row(rows[i].seq, min(rows[i].have, int(plan.base[i])))
    return left


def plant(cache: Cache, rows: list[Row], plan: Plan) -> list[list[list[int]]]:
    """Give every leaf of a plan's trees a sequence that begins with its row.

    Returns
    -------
    nested list
        Of each row, of each node, the sequences of the leaves below it; the first leaf keeps the
        row's own sequence.
    """
    assert plan.parents is not None and plan.ancestors is not None
    used = {row.seq for row in rows}
    free = [seq for seq in range(len(cache.length)) if seq not in used]
    planted = []
    for i, row in enumerate(rows):
        count = int(plan.counts[i])
        leaves = leaves_of(plan.parents[i, :count])
        seqs = [row.seq, *(free.pop() for _ in leaves[1:])]
        for seq in seqs[1:]:
            cache.copy(row.seq, seq)
        below = plan.ancestors[i]
        planted.append(
            [[seq for leaf, seq in zip(leaves, seqs) if below[leaf, node]] for node in range(count)]
        )
    return planted


def leaf_count(plan: Plan) -> int:
    """Return how many sequences a plan's trees need."""
    if plan.parents is None:
        return 0
    return sum(max(1, len(leaves_of(plan.parents[i, : plan.counts[i]]))) for i in range(plan.batch))


def kept_tokens(tokens: np.ndarray, tree_base: int, plan: Plan, i: int) -> np.ndarray:
    """Return the ids that new row ``i`` starts from, given what its old row recorded."""
    kept = tokens[: plan.base[i]]
    if plan.path is None:
        return kept
    path = plan.path[i][plan.path[i] != PAD]
    return np.concatenate([kept, tokens[tree_base:][path]])
