"""Draft trees: tokens that a cheap guesser proposes, and the calls that let the target check them.

The *root* is the last confirmed token. It is not a node of the tree, but it is fed in the same
call, so that the answer holds the target's logits at the root and at every node: entry 0 of the
answer is the root's, entry ``i + 1`` that of node ``i``. A tree without branches is asked as plain
tokens and rolled back by ``keep``, which every engine with ROLLBACK can do; only branches need
TREE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...errors import UsageError
from ...model import PAD, Array, Capability, Forward, IntArray, Output

ROOT = -1
"""Parent of the nodes that follow the last confirmed token."""


@dataclass(frozen=True)
class DraftTree:
    """Tokens proposed after a text, as a tree.

    Parameters
    ----------
    tokens : int64 (N,)
    parents : int64 (N,)
        Node that each node follows, :data:`ROOT` for the first tokens. A parent stands before its
        children.

    Raises
    ------
    UsageError
        Shapes disagree, or a parent does not stand before its child.
    """

    tokens: IntArray
    parents: IntArray

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens, np.int64)
        parents = np.asarray(self.parents, np.int64)
        if tokens.ndim != 1 or tokens.shape != parents.shape:
            raise UsageError(f"draft tree: {tokens.shape} tokens, {parents.shape} parents")
        if len(parents) and ((parents < ROOT) | (parents >= np.arange(len(parents)))).any():
            raise UsageError("draft tree: a parent must stand before its children")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "parents", parents)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        lists: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents.tolist()):
            lists[parent + 1].append(node)
        return tuple(tuple(nodes) for nodes in lists)

    def children(self, node: int) -> tuple[int, ...]:
        """Return the children of ``node`` (or of :data:`ROOT`) in the order they were added."""
        return self._children[node + 1]

    def child(self, node: int, token: int) -> int | None:
        """Return the first child of ``node`` that holds ``token``, or None."""
        for child in self.children(node):
            if self.tokens[child] == token:
                return child
        return None

    @cached_property
    def depths(self) -> IntArray:
        """Depth (N,) of each node; the first tokens have depth 1."""
        depths = np.zeros(len(self), np.int64)
        for node, parent in enumerate(self.parents.tolist()):
            depths[node] = 1 + (depths[parent] if parent >= 0 else 0)
        return depths

    @property
    def depth(self) -> int:
        """Length of the longest path; 0 for an empty tree."""
        return int(self.depths.max()) if len(self) else 0

    @cached_property
    def is_chain(self) -> bool:
        """Whether no node has two children (an empty tree is a chain)."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    @property
    def leaves(self) -> int:
        """Number of nodes without children."""
        return len(self) - len(set(self.parents.tolist()) - {ROOT})

    def path(self, node: int) -> tuple[int, ...]:
        """Return the nodes from a first token down to ``node``; empty for :data:`ROOT`."""
        nodes: list[int] = []
        while node != ROOT:
            nodes.append(node)
            node = int(self.parents[node])
        return tuple(reversed(nodes))

    def first(self, count: int) -> DraftTree:
        """Return the tree of the first ``count`` nodes (parents stand first, so it is one)."""
        return DraftTree(self.tokens[:count], self.parents[:count])


EMPTY = DraftTree(np.empty(0, np.int64), np.empty(0, np.int64))


def chain_tree(tokens: Sequence[int] | IntArray) -> DraftTree:
    """Return ``tokens`` as a tree without branches."""
    ids = np.asarray(tokens, np.int64)
    return DraftTree(ids, np.arange(-1, len(ids) - 1))


def tree_of_paths(paths: Sequence[Sequence[int]]) -> tuple[DraftTree, IntArray]:
    """Return the tree that holds every path once, and where each path runs in it.

    Parameters
    ----------
    paths : K sequences of token ids
        Drafts of possibly unequal length; common beginnings become common nodes.

    Returns
    -------
    tree : DraftTree
        Nodes in order of depth, and within one depth in the order of the paths.
    nodes : int64 (K, L)
        Node of each path at each position; -1 beyond its end.
    """
    length = max((len(path) for path in paths), default=0)
    nodes = np.full((len(paths), length), PAD, np.int64)
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for depth in range(length):
        for k, path in enumerate(paths):
            if depth >= len(path):
                continue
            parent = int(nodes[k, depth - 1]) if depth else ROOT
            key = (parent, int(path[depth]))
            if key not in known:
                known[key] = len(tokens)
                tokens.append(key[1])
                parents.append(parent)
            nodes[k, depth] = known[key]
    return DraftTree(np.array(tokens, np.int64), np.array(parents, np.int64)), nodes


def histories(prefix: IntArray, tree: DraftTree) -> list[IntArray]:
    """Return the text that ends at the root and at every node: N + 1 arrays, the root's first.

    ``prefix`` (T,) is the confirmed text, its last token the root.
    """
    texts = [np.asarray(prefix, np.int64)]
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist()):
        texts.append(np.append(texts[parent + 1], token))
    return texts


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The branch of a session's pending tree that the next call shall keep.

    Attributes
    ----------
    base : int
        Cached tokens before the pending tree.
    path : tuple of int
        Nodes of the pending tree as they were fed (the root is 0), from the root downwards.
    """

    base: int
    path: tuple[int, ...]


def ask_tree(history: IntArray, tree: DraftTree, kept: Kept | None = None) -> Forward:
    """Return the call that feeds the root and ``tree`` and returns the logits of all of them.

    Parameters
    ----------
    history : int64 (T,)
        Confirmed text; all but its last token is cached, or will be once ``kept`` is.
    tree : DraftTree
        Empty: the call of plain decoding.
    kept : Kept or None
        From :func:`kept_branch` of the round before; None when no tree is pending.
    """
    tokens = np.concatenate([history[-1:], tree.tokens])[None]
    parents = None if tree.is_chain else np.concatenate([[PAD], tree.parents + 1])[None]
    return Forward(
        keep=len(history) - 1 if kept is None else kept.base,
        path=None if kept is None else np.array([kept.path], np.int64),
        tokens=tokens,
        parents=parents,
        logits="all" if len(tree) else "last",
    )


def kept_branch(history: IntArray, tree: DraftTree, node: int) -> Kept | None:
    """Return what the next call must keep when the walk through ``tree`` ended at ``node``.

    ``history`` is the text that ``tree`` was asked after. None after a tree without branches: its
    tokens are cached like any others, and the next ``keep`` drops what was rejected.
    """
    if tree.is_chain:
        return None
    return Kept(base=len(history) - 1, path=(0, *(i + 1 for i in tree.path(node))))


def ask_again(before: IntArray, cached: int, history: IntArray) -> Forward:
    """Return the call that goes on after ``history`` when the text read ``before`` until now.

    Parameters
    ----------
    before : int64 (T,)
        Confirmed text so far.
    cached : int
        How many of its tokens are surely in the cache; a pending tree does not count.
    history : int64 (T',)
    """
    shared = min(cached, len(before), len(history) - 1)
    differ = np.flatnonzero(before[:shared] != history[:shared])
    keep = int(differ[0]) if len(differ) else shared
    return Forward(keep=keep, tokens=history[None, keep:])


def node_logits(out: Output) -> Array:
    """Return logits (1 + N, V) of the root and the nodes from the answer to :func:`ask_tree`."""
    logits: Array = out.logits
    return logits if len(logits.shape) == 2 else logits[0, ...]


def needs(*, branches: bool) -> Capability:
    """Return what a target must offer to check drafts; TREE only if they may have branches."""
    plain = Capability.LAST_LOGITS | Capability.ALL_LOGITS | Capability.ROLLBACK
    return plain | Capability.TREE if branches else plain
