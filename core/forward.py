"""The values of the model contract: what is asked of a cache, and what comes back.

Conventions are stated in :mod:`.model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = Any  # an array of numpy, torch, mlx or any other array-API library
IntArray = npt.NDArray[np.int64]
PAD = -1


class Capability(Flag):
    """What a loaded model can do. A strategy's ``requires`` is a set of the same flags."""

    NONE = 0
    LAST_LOGITS = auto()  # logits of the last new position
    ALL_LOGITS = auto()  # logits of every new position
    ROLLBACK = auto()  # keep fewer tokens than are cached
    ROWS = auto()  # several rows of unequal length in one call
    FORK = auto()  # rows continue, repeat or drop cached rows
    TREE = auto()  # draft trees in one call
    HIDDEN = auto()  # hidden states of chosen layers
    ATTENTIONS = auto()  # attention weights of chosen layers
    EMBEDS = auto()  # soft tokens: embeddings as input
    BLOCK = auto()  # new positions attend to each other both ways
    HEAD = auto()  # embedding matrix, final norm and projection as functions

    def names(self) -> list[str]:
        """Return the names of the single flags in this set, in declaration order."""
        return [flag.name or "" for flag in Capability if flag in self and flag.value]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Keep the first ``keep`` tokens of each row, append tokens, and say what to return.

    Parameters
    ----------
    keep : int or int array (B,)
        Cached tokens each new row starts from. An int means the same for every row.
    tokens : int array (B, n), right-padded with -1, or None
        Token ids to append. A row of only -1 appends nothing. None with ``embeds``, or to change
        rows without computing anything.
    rows : int array (B,), optional
        Cached row that each new row continues. None: the rows stay as they are. A row may be named
        several times (fork) or never (dropped); ``B`` may change.
    parents : int array (B, n), optional
        Draft tree over the new positions: index of the parent within the same row's new tokens,
        -1 for a root (a child of the kept prefix). A parent stands before its children. A tree
        stays pending: the next call either names the branch to keep in ``path`` or drops it.
    path : int array (B, m), right-padded with -1, optional
        Branch of the row's pending tree, from a root downwards, that is kept after ``keep``; the
        kept prefix plus this branch is what ``tokens`` are appended to.
    embeds : float array (B, n, D), optional
        Soft tokens instead of ids, in the scale of ``Model.embed``.
    causal : bool
        False: new positions see each other both ways. What they leave in the cache was computed
        that way; drop the block (smaller ``keep``) and feed it again to commit it causally. Until
        then the row's record says -1 for it, so that no later prompt takes it for its own prefix.
    logits : {"none", "last", "all"}
        Which logits to return.
    hidden : tuple of int
        Layers whose hidden states to return, 0..L (see the module's conventions).
    attentions : tuple of int
        Layers whose attention weights to return, 0..L-1.
    """

    keep: int | IntArray | Sequence[int]
    tokens: IntArray | Sequence[Sequence[int]] | None = None
    rows: IntArray | Sequence[int] | None = None
    parents: IntArray | Sequence[Sequence[int]] | None = None
    path: IntArray | Sequence[Sequence[int]] | None = None
    embeds: Array | None = None
    causal: bool = True
    logits: Literal["none", "last", "all"] = "last"
    hidden: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()

    def needs(self) -> Capability:
        """Return the capabilities that this call uses."""
        need = Capability.NONE
        if self.logits == "last":
            need |= Capability.LAST_LOGITS
        elif self.logits == "all":
            need |= Capability.ALL_LOGITS
        if self.rows is not None:
            need |= Capability.FORK
        if self.parents is not None or self.path is not None:
            need |= Capability.TREE
        if self.embeds is not None:
            need |= Capability.EMBEDS
        if not self.causal:
            need |= Capability.BLOCK
        if self.hidden:
            need |= Capability.HIDDEN
        if self.attentions:
            need |= Capability.ATTENTIONS
        return need


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a forward call returns; arrays belong to the engine's library.

    Attributes
    ----------
    logits : float32 array (B, V) for "last", (B, n, V) for "all", else None
        Entries of padded positions are unspecified but finite. The array is the caller's: a later
        call does not change it unless the adapter's ``borrowed_logits`` says so.
    hidden : mapping of layer to float array (B, n, D)
    attentions : mapping of layer to float array (B, H, n, S)
        ``S`` counts the positions visible to the row with the most cached tokens; each query's
        weights over its own row sum to 1 and weights of unseen positions are 0. Keys are in the
        order of the row's cached tokens, the new ones last.
    """

    logits: Array | None = None
    hidden: Mapping[int, Array] = field(default_factory=dict)
    attentions: Mapping[int, Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked :class:`Forward`, with everything that adapters would otherwise derive.

    Attributes
    ----------
    rows : int64 (B,)
        Source row of each new row.
    identity : bool
        True when ``rows`` is 0..B-1 over all cached rows, so nothing has to move.
    base : int64 (B,)
        Tokens kept from before the pending tree (``keep``).
    path : int64 (B, m), -1 padded, or None
        Pending-tree nodes kept after ``base``.
    start : int64 (B,)
        Cached tokens each row starts from: ``base`` plus the length of its path.
    tokens : int64 (B, n), -1 padded, or None when ``embeds`` are given
    embeds : float array (B, n, D) or None
    counts : int64 (B,)
        Valid new positions of each row.
    positions : int64 (B, n)
        Position of each new token in its row's text: ``start + depth``; 0 for padding.
    parents : int64 (B, n) or None
    ancestors : bool (B, n, n) or None
        For trees: [b, i, j] is True when j is i or an ancestor of i.
    causal, logits, hidden, attentions
        As in :class:`Forward`.
    """

    rows: IntArray
    identity: bool
    base: IntArray
    path: IntArray | None
    start: IntArray
    tokens: IntArray | None
    embeds: Array | None
    counts: IntArray
    positions: IntArray
    parents: IntArray | None
    ancestors: npt.NDArray[np.bool_] | None
    causal: bool
    logits: Literal["none", "last", "all"]
    hidden: tuple[int, ...]
    attentions: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Number of rows after this call."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Number of new positions, padding included."""
        return int(self.positions.shape[1])

    @property
    def end(self) -> IntArray:
        """Cached positions of each row after this call, pending tree nodes included."""
        return self.start + self.counts
