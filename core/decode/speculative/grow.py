"""Growing a draft tree from an n-gram table, the most promising token first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...model import IntArray
from .budget import Rates
from .ngram import CONTEXTS, Entry, NgramTable
from .rejection import Probs, gumbel_order
from .tree import EMPTY, ROOT, DraftTree

_PRIOR = 0.7  # share of what the table expects that comes true, before anything is known
_SURE = 4  # observations beyond which an entry counts as well known


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A tree, and what is expected of it.

    Attributes
    ----------
    tree : DraftTree
        The most promising nodes first, so that its first ``n`` nodes are a good tree of that size.
    gains : tuple of float
        Probability that each node will be accepted, falling.
    slots : tuple of (kind, expected)
        What kind of guess each node is, and how likely the table alone says that it comes true
        where its parent did.
    sources : mapping of node to (tokens, probabilities)
        What the children of each node were drawn from; only where they were drawn.
    """

    tree: DraftTree = EMPTY
    gains: tuple[float, ...] = ()
    slots: tuple[tuple[Hashable, float], ...] = ()
    sources: Mapping[int, tuple[IntArray, Probs]] = field(default_factory=dict)

    def learn(self, rates: Rates, nodes: Sequence[int], tokens: Sequence[int]) -> None:
        """Note which guesses came true at the ``nodes`` that the walk passed.

        ``tokens`` are what was chosen there. Children that were not asked about count as well.
        """
        for node, token in zip(nodes, tokens):
            for child in self.tree.children(node):
                hit = int(self.tree.tokens[child]) == token
                kind, expected = self.slots[child]
                rates.observe(kind, expected, float(hit))
                if hit:
                    break


NOTHING = Draft()

Order = Callable[[Sequence[float]], tuple[Sequence[int], Sequence[float]]]
"""From an entry's probabilities (scaled to sum to 1) to the places of its tokens in the order in
which they are proposed, and how likely each is to be the next token."""


def likeliest(probs: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """Propose the likeliest tokens first."""
    return range(len(probs)), probs


def drawn(uniforms: Probs) -> Order:
    """Return the order of a draw without replacement, with fresh noise for every node.

    Parameters
    ----------
    uniforms : float64 (nodes, 10)
        In (0, 1); each row serves one node, in the order in which nodes are looked up.

    Notes
    -----
    For recursive rejection a node may be asked about because of what was drawn before it, never
    because of what it itself is. So what is expected of the i-th child depends on i alone.
    """
    rows = iter(uniforms)

    def order(probs: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
        places = gumbel_order(np.array(probs), next(rows)[: len(probs)]).tolist()
        return places, [0.7 * 0.3**i for i in range(len(places))]

    return order


def grow(
    table: NgramTable,
    rates: Rates,
    before: IntArray,
    order: Order,
    *,
    nodes: int,
    depth: int,
    branches: int,
    floor: float = 0.0,
    sources: bool = False,
) -> Draft:
    """Return a draft of at most ``nodes`` tokens after the text ``before``.

    Parameters
    ----------
    table : NgramTable
    rates : Rates
        How earlier guesses of each kind fared; a guess is trusted accordingly.
    before : int64 (T,)
        Only its last four tokens are looked at.
    order : Order
        :func:`likeliest` or :func:`drawn`.
    nodes, depth, branches : int
        Limits on the tree, its depth, and the children of one node.
    floor : float
        Guesses less likely than this are not worth asking about; the first one is made anyway, so
        that something is learned from it.
    sources : bool
        Keep what children were drawn from.
    """
    if nodes < 1 or depth < 1:
        return NOTHING
    tokens: list[int] = []
    parents: list[int] = []
    gains: list[float] = []
    slots: list[tuple[Hashable, float]] = []
    kept: dict[int, tuple[IntArray, Probs]] = {}
    heap: list[tuple[float, int, int, _Family]] = []
    serial = 0

    def expand(node: int, gain: float, context: tuple[int, ...], at: int) -> None:
        nonlocal serial
        hit = table.find(context) if at < depth else None
        if hit is None:
            return
        total = sum(hit.entry.probs)
        probs = [p / total for p in hit.entry.probs]
        places, scores = order(probs)
        if sources:
            kept[node] = (np.array(hit.entry.tokens, np.int64), np.array(probs))
        known = (hit.length, min(hit.entry.seen, _SURE))
        family = _Family(node, gain, context, at, hit.entry, places, scores, known)
        push(family, 0)

    def push(family: _Family, slot: int) -> None:
        nonlocal serial
        if slot >= min(branches, len(family.places)):
            return
        kind = (*family.known, min(slot, 2))
        expected = family.scores[slot]
        gain = family.gain * min(expected * rates.rate(kind, _PRIOR), 0.99)
        if gain >= floor or not (tokens or heap):
            serial += 1
            heapq.heappush(heap, (-gain, serial, slot, family))

    expand(ROOT, 1.0, tuple(before[-CONTEXTS[0] :].tolist()), 0)
    while heap and len(tokens) < nodes:
        gain, _, slot, family = heapq.heappop(heap)
        gain = -gain
        node, token = len(tokens), family.entry.tokens[family.places[slot]]
        tokens.append(token)
        parents.append(family.node)
        gains.append(gain)
        slots.append(((*family.known, min(slot, 2)), family.scores[slot]))
        push(family, slot + 1)
        if gain >= floor:
            context = (*family.context, token)[-CONTEXTS[0] :]
            expand(node, gain, context, family.depth + 1)
    return Draft(
        tree=DraftTree(np.array(tokens, np.int64), np.array(parents, np.int64)),
        gains=tuple(gains),
        slots=tuple(slots),
        sources=kept,
    )


@dataclass(frozen=True)
class _Family:
    """A node whose children are being proposed."""

    node: int
    gain: float
    context: tuple[int, ...]
    depth: int
    entry: Entry
    places: Sequence[int]
    scores: Sequence[float]
    known: tuple[int, int]


__all__ = ["NOTHING", "Draft", "drawn", "grow", "likeliest"]
