"""Hidden states of every prefix of the sampled texts: what a value head is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..array import to_numpy
from ..errors import InvalidInput
from ..model import Capability, Forward, IntArray, Model, Session
from ..whole_file import whole_file
from .labels import LabelKind, PrefixTree, label_rows, prefix_tree
from .rollouts import Rollout

Floats = npt.NDArray[np.float32]
NEEDS = Capability.HIDDEN | Capability.HEAD | Capability.TREE | Capability.ROLLBACK
LEAVES = 32  # texts whose prefixes are computed in one call


@dataclass(frozen=True, kw_only=True)
class ValueDataset:
    """One entry per prefix, and the rows that say what its value should be.

    Attributes
    ----------
    hidden : float32 (M, D)
        After the final norm, at each prefix's last token.
    values : float32 (M,)
        Share of right texts among those that begin so.
    counts : float32 (M,)
        How many texts begin so.
    questions : int64 (M,)
        Number of the question that a prefix belongs to.
    nodes : int64 (R,)
        Prefix of each training row.
    labels, weights : float32 (R,)
        See :func:`.label_rows`.
    """

    hidden: Floats
    values: Floats
    counts: Floats
    questions: IntArray
    nodes: IntArray
    labels: Floats
    weights: Floats


def tree_hidden(
    model: Model, session: Session, prompt: Sequence[int], tree: PrefixTree, *, layer: int
) -> Floats:
    """Return the hidden states (M, D) of all prefixes, after the final norm.

    A prefix that many texts share is computed once: the texts are one tree to the model.

    Parameters
    ----------
    model : Model
    session : Session
        Of that model, opened with :data:`NEEDS` and ``max_rows`` of :data:`LEAVES`.
    prompt : sequence of int
    tree : PrefixTree
    layer : int
        Hidden state to take, 0..L.
    """
    ids = np.asarray(prompt, np.int64)
    begin = min(session.common_prefix(ids), len(ids))
    for at in range(begin, len(ids), model.prefill_chunk):
        piece = ids[at : at + model.prefill_chunk]
        session.forward(Forward(keep=at, tokens=piece[None], logits="none"))
    hidden = np.zeros((len(tree.tokens), model.info.width), np.float32)
    done = np.zeros(len(tree.tokens), bool)
    paths = [path for path in {tuple(p.tolist()): p for p in tree.paths}.values() if len(path)]
    for first in range(0, len(paths), LEAVES):
        nodes = np.unique(np.concatenate(paths[first : first + LEAVES]))
        if done[nodes].all():
            continue
        parents = tree.parents[nodes]
        # Nodes are sorted and a parent has the smaller number, so places keep their order.
        local = np.where(parents < 0, -1, np.searchsorted(nodes, parents))
        out = session.forward(
            Forward(
                keep=len(ids),
                tokens=tree.tokens[nodes][None],
                parents=local[None],
                logits="none",
                hidden=(layer,),
            )
        )
        normed = model.norm(out.hidden[layer][0, :, :])
        hidden[nodes] = np.asarray(to_numpy(normed), np.float32)
        done[nodes] = True
    return hidden


def extract(
    folder: Path,
    rollouts: Sequence[Rollout],
    model: Model,
    *,
    layer: int,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[], Any] = lambda: None,
) -> int:
    """Write the hidden states of every question's prefixes; goes on where an earlier call stopped.

    Parameters
    ----------
    folder : Path
        Gets one ``layer-L/NNNNN.npy`` per question.
    rollouts : sequence of Rollout
    model : Model
    layer : int
    cancelled, progress : callable
        Polled before, and called after, every question.

    Returns
    -------
    int
        How many questions are done.
    """
    model.require(NEEDS, who="train value")
    with model.session(max_rows=LEAVES, needs=NEEDS) as session:
        for number, rollout in enumerate(rollouts):
            path = features_path(folder, layer, number)
            if not path.exists():
                if cancelled():
                    return number
                tree = prefix_tree(rollout.texts, rollout.right)
                _write(path, tree_hidden(model, session, rollout.prompt, tree, layer=layer))
            progress()
    return len(rollouts)


def read_dataset(
    folder: Path,
    rollouts: Sequence[Rollout],
    *,
    layer: int,
    labels: LabelKind = "token",
    step_tokens: frozenset[int] = frozenset(),
) -> ValueDataset:
    """Return what :func:`extract` wrote, with labels.

    Parameters
    ----------
    folder, rollouts, layer
        As for :func:`extract`.
    labels : {"token", "outcome", "step"}
    step_tokens : frozenset of int
        Tokens that end a step, for "step".

    Raises
    ------
    InvalidInput
        A file is damaged or belongs to other texts.
    """
    parts: dict[str, list[Any]] = {
        key: [] for key in ("hidden", "values", "counts", "questions", "nodes", "labels", "weights")
    }
    base = 0
    for number, rollout in enumerate(rollouts):
        tree = prefix_tree(rollout.texts, rollout.right)
        size = len(tree.tokens)
        path = features_path(folder, layer, number)
        try:
            hidden = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as exc:
            raise InvalidInput(f"{path}: damaged ({exc}); delete it and run again") from None
        if hidden.ndim != 2 or len(hidden) != size or hidden.dtype != np.float32:
            raise InvalidInput(f"{path}: belongs to other texts; delete it and run again")
        ends = [[token in step_tokens for token in text] for text in rollout.texts]
        rows = label_rows(tree, labels, ends=ends)
        parts["hidden"].append(hidden)
        parts["values"].append(tree.values.astype(np.float32))
        parts["counts"].append(tree.counts.astype(np.float32))
        parts["questions"].append(np.full(size, number))
        parts["nodes"].append(rows.nodes + base)
        parts["labels"].append(rows.labels)
        parts["weights"].append(rows.weights)
        base += size
    if not base:
        raise InvalidInput(f"{folder}: holds no texts")
    return ValueDataset(**{key: np.concatenate(arrays) for key, arrays in parts.items()})


def features_path(folder: Path, layer: int, number: int) -> Path:
    """Return the file that holds one question's hidden states."""
    return folder / f"layer-{layer}" / f"{number:05d}.npy"


def _write(path: Path, array: Floats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.save(file, array)
