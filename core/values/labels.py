"""Labels of tokens from sampled texts: the share of right ones among those that begin the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..model import IntArray

LabelKind = Literal["token", "outcome", "step"]


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """All prefixes of the texts sampled for one question; a node is a prefix that ends there.

    Attributes
    ----------
    tokens : int64 (M,)
        Last token of each prefix.
    parents : int64 (M,)
        Node of the prefix without it; -1 for the first token. A parent stands before its children.
    counts, right : int64 (M,)
        Texts that begin so, and how many of them end with the right answer.
    paths : tuple of int64 (T,)
        Nodes of each text, in the order of its tokens.
    """

    tokens: IntArray
    parents: IntArray
    counts: IntArray
    right: IntArray
    paths: tuple[IntArray, ...]

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The empirical value of every prefix (M,): ``right / counts``."""
        return self.right / np.maximum(self.counts, 1)

    @property
    def sharing_depth(self) -> float:
        """Mean number of a text's first tokens that another text has too; nan without texts."""
        shared = [int((self.counts[path] > 1).sum()) for path in self.paths]
        return float(np.mean(shared)) if shared else float("nan")


def prefix_tree(texts: Sequence[Sequence[int]], outcomes: Sequence[bool | int]) -> PrefixTree:
    """Return the tree of the texts sampled for one question.

    Equal texts count as often as they were drawn: leaving them out would change the probabilities.
    One pass over all tokens.

    Parameters
    ----------
    texts : sequence of sequences of int
        Token ids after the prompt, the end token included.
    outcomes : sequence of bool
        Whether each text gave the right answer.
    """
    if len(texts) != len(outcomes):
        raise UsageError(f"labels: {len(texts)} texts but {len(outcomes)} outcomes")
    places: dict[tuple[int, int], int] = {}
    counts: list[int] = []
    right: list[int] = []
    paths = []
    for text, outcome in zip(texts, outcomes):
        node, path = -1, []
        for token in text:
            node = places.setdefault((node, int(token)), len(places))
            if node == len(counts):
                counts.append(0)
                right.append(0)
            counts[node] += 1
            right[node] += bool(outcome)
            path.append(node)
        paths.append(np.array(path, np.int64))
    edges = np.array(list(places), np.int64).reshape(-1, 2)
    return PrefixTree(
        tokens=edges[:, 1],
        parents=edges[:, 0],
        counts=np.array(counts, np.int64),
        right=np.array(right, np.int64),
        paths=tuple(paths),
    )


@dataclass(frozen=True, kw_only=True)
class LabelRows:
    """Training rows of one question: a prefix, its label, and how many tokens the row stands for.

    Attributes
    ----------
    nodes : int64 (R,)
    labels : float32 (R,)
    weights : float32 (R,)
    """

    nodes: IntArray
    labels: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]


def label_rows(
    tree: PrefixTree, kind: LabelKind = "token", *, ends: Sequence[Sequence[bool]] | None = None
) -> LabelRows:
    """Return labels for every token of every text, equal ones of one prefix gathered in a row.

    Parameters
    ----------
    tree : PrefixTree
    kind : {"token", "outcome", "step"}
        "token": the share of right texts among those of the same prefix. "outcome": each text's
        own outcome on all its tokens (an outcome verifier). "step": on all tokens of a step, 1 if
        any text that shares the step's end is right, else 0 (a step verifier).
    ends : sequence of sequences of bool, optional
        For "step": whether a step ends with a token, per text; a text's last token always ends one.
    """
    every = np.arange(len(tree.tokens))
    if kind == "token":
        nodes, labels, weights = every, tree.values, tree.counts
    elif kind == "outcome":
        nodes = np.concatenate([every, every])
        labels = np.concatenate([np.ones(len(every)), np.zeros(len(every))])
        weights = np.concatenate([tree.right, tree.counts - tree.right])
    elif kind == "step":
        nodes, labels, weights = _step_rows(tree, ends)
    else:
        raise UsageError(f"labels: must be token, outcome or step, got {kind!r}")
    held = weights > 0
    return LabelRows(
        nodes=nodes[held].astype(np.int64),
        labels=labels[held].astype(np.float32),
        weights=weights[held].astype(np.float32),
    )


def _step_rows(
    tree: PrefixTree, ends: Sequence[Sequence[bool]] | None
) -> tuple[IntArray, npt.NDArray[np.float64], IntArray]:
    if ends is None or len(ends) != len(tree.paths):
        raise UsageError("labels: step labels need the ends of the steps of every text")
    found: dict[tuple[int, int], int] = defaultdict(int)
    for path, marks in zip(tree.paths, ends):
        label = 0
        for place in range(len(path) - 1, -1, -1):  # from the back: a token knows its step's end
            if place == len(path) - 1 or marks[place]:
                label = int(tree.right[path[place]] > 0)
            found[int(path[place]), label] += 1
    rows = np.array(list(found), np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1].astype(np.float64), np.array(list(found.values()), np.int64)
