"""A cache of rows, and every check of what is asked of it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from .errors import ContextOverflow, UsageError
from .forward import PAD, Capability, Forward, IntArray, Output, Plan

if TYPE_CHECKING:
    from .model import Model


class Session(ABC):
    """A cache of ``B`` rows. Not thread-safe: a second thread that calls it gets an error.

    Adapters implement :meth:`_run` and may override :meth:`close`. They must leave their cache
    usable when ``_run`` raises: the records here are only updated after it returns, and the next
    call's ``base`` and ``start`` say what is really kept.

    Attributes
    ----------
    borrowed_logits : bool
        True when logits of the last call become invalid (are overwritten) by the next call.
    """

    borrowed_logits = False

    def __init__(self, model: Model, *, max_rows: int, needs: Capability, context: int) -> None:
        if max_rows < 1:
            raise UsageError(f"session: max_rows must be at least 1, got {max_rows}")
        model.require(needs, who="session")
        self.model = model
        self.max_rows = max_rows
        self.needs = needs
        self.context = context
        self._rows: list[IntArray] = [np.empty(0, np.int64)]
        self._tree: IntArray | None = None  # parents of the pending tree
        self._tree_base = np.zeros(1, np.int64)
        self._lock = threading.Lock()
        self._closed = False

    # -- what a strategy may look at -------------------------------------------------------

    @property
    def batch(self) -> int:
        """Number of live rows."""
        return len(self._rows)

    @property
    def lengths(self) -> IntArray:
        """Cached tokens per row (B,), nodes of a pending tree not counted."""
        return self._tree_base.copy()

    def row_tokens(self, row: int = 0) -> IntArray:
        """Return the cached ids of one row; -1 for a soft token or one of an open block."""
        return self._rows[row][: self._tree_base[row]].copy()

    def common_prefix(self, tokens: IntArray | Sequence[int], row: int = 0) -> int:
        """Return how many leading ids of ``tokens`` the cache of ``row`` already holds."""
        have = self.row_tokens(row)
        want = np.asarray(tokens, np.int64)
        n = min(len(have), len(want))
        differ = np.flatnonzero((have[:n] != want[:n]) | (have[:n] < 0))
        return int(differ[0]) if len(differ) else n

    # -- the one verb ----------------------------------------------------------------------

    def forward(self, ask: Forward) -> Output:
        """Change the cache as ``ask`` says and return what it wants.

        Raises
        ------
        UsageError
            A token, row, length or layer is out of range, shapes disagree, or the session was
            opened without what this call needs. The cache is unchanged.
        ContextOverflow
            A row would grow beyond the context. The cache is unchanged.
        BackendError
            The engine failed; the rows keep what they had, up to the tokens already kept.
        """
        if not self._lock.acquire(blocking=False):
            raise UsageError("session: used by two threads at once; open one session per thread")
        try:
            if self._closed:
                raise UsageError("session: already closed")
            plan = self._plan(ask)
            out = self._run(plan)
            self._record(plan)
            return out
        finally:
            self._lock.release()

    @abstractmethod
    def _run(self, plan: Plan) -> Output:
        """Do what a checked plan says. ``plan.width`` may be 0: then only rows change."""

    def close(self) -> None:
        """Free the cache."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- checks, once for all adapters --------------------------------------------------------

    def _plan_token(self, ask: Forward) -> Plan | None:
        """Return the plan of one token on the only row; None for any other call, or a bad one.

        Plain decoding makes this call for every token, and the general way takes some 100 µs in
        small array operations. The checks are the same; whatever fails one is left to the general
        way, which says what is wrong.
        """
        tokens, keep = ask.tokens, ask.keep
        if (
            type(keep) is not int
            or type(tokens) is not np.ndarray
            or tokens.shape != (1, 1)
            or tokens.dtype.kind not in "iu"
            or len(self._rows) != 1
            or ask.logits != "last"
            or ask.rows is not None
            or ask.parents is not None
            or ask.path is not None
            or ask.embeds is not None
            or not ask.causal
            or ask.hidden
            or ask.attentions
            or Capability.LAST_LOGITS not in self.model.capabilities
            or not 0 <= tokens[0, 0] < self.model.info.vocab_size
            or not 0 <= keep <= self._tree_base[0]
            or (
                0 < keep < self._tree_base[0] and Capability.ROLLBACK not in self.model.capabilities
            )
            or keep >= self.context
        ):
            return None
        start = np.array([keep], np.int64)
        return Plan(
            rows=np.zeros(1, np.int64),
            identity=True,
            base=start,
            path=None,
            start=start,
            tokens=tokens.astype(np.int64),
            embeds=None,
            counts=np.ones(1, np.int64),
            positions=start[:, None],
            parents=None,
            ancestors=None,
            causal=True,
            logits="last",
            hidden=(),
            attentions=(),
        )

    def _plan(self, ask: Forward) -> Plan:
        single = self._plan_token(ask)
        if single is not None:
            return single
        used = ask.needs() & ~(Capability.LAST_LOGITS | Capability.ALL_LOGITS)
        absent = used & ~self.needs
        if absent:
            raise UsageError(
                f"session: opened without {' and '.join(absent.names())}; name them in needs="
            )
        self.model.require(ask.needs(), who="forward")
        rows = _ints("rows", np.arange(self.batch) if ask.rows is None else ask.rows, 1)
        if len(rows) == 0 or len(rows) > self.max_rows:
            raise UsageError(f"forward: {len(rows)} rows, session holds 1 to {self.max_rows}")
        _in_range("rows", rows, 0, self.batch)
        batch = len(rows)
        identity = batch == self.batch and bool((rows == np.arange(batch)).all())
        keep = _ints("keep", ask.keep, 0 if np.ndim(ask.keep) == 0 else 1)
        base = np.full(batch, keep) if keep.ndim == 0 else keep
        if base.shape != (batch,):
            raise UsageError(f"forward: keep has {base.size} entries for {batch} rows")
        if ((base < 0) | (base > self._tree_base[rows])).any():
            raise UsageError(
                f"forward: keep {base.tolist()} outside 0..{self._tree_base[rows].tolist()}"
            )
        # Emptying a row is always possible; keeping a part of it is not (recurrent models).
        if ((base > 0) & (base < self._tree_base[rows])).any():
            self.model.require(Capability.ROLLBACK, who="forward")
        path, path_length = self._check_path(ask, rows, base)
        start = base + path_length
        tokens, counts, width = self._check_tokens(ask, batch)
        if width == 0 and (ask.logits != "none" or ask.hidden or ask.attentions):
            raise UsageError("forward: nothing to append, so there is nothing to return")
        if width and not counts.any():
            raise UsageError("forward: every row is padding")
        end = start + counts
        if (end > self.context).any():
            raise ContextOverflow(
                f"context: {int(end.max())} tokens do not fit into {self.context}; "
                "shorten the prompt, raise --ctx-size or allow --truncate"
            )
        parents, ancestors, depth = _check_parents(ask, batch, width, counts)
        valid = np.arange(width)[None, :] < counts[:, None]
        positions = np.where(valid, start[:, None] + depth, 0)
        layers = self.model.info.layers
        for name, chosen, top in (
            ("hidden", ask.hidden, layers + 1),
            ("attentions", ask.attentions, layers),
        ):
            _in_range(name, np.asarray(chosen, np.int64), 0, top)
        return Plan(
            rows=rows,
            identity=identity,
            base=base,
            path=path,
            start=start,
            tokens=tokens,
            embeds=ask.embeds,
            counts=counts,
            positions=positions,
            parents=parents,
            ancestors=ancestors,
            causal=ask.causal,
            logits=ask.logits,
            hidden=tuple(ask.hidden),
            attentions=tuple(ask.attentions),
        )

    def _check_tokens(self, ask: Forward, batch: int) -> tuple[IntArray | None, IntArray, int]:
        if ask.embeds is not None:
            if ask.tokens is not None:
                raise UsageError("forward: give tokens or embeds, not both")
            shape = tuple(ask.embeds.shape)
            if len(shape) != 3 or shape[0] != batch or shape[2] != self.model.info.width:
                raise UsageError(
                    f"forward: embeds {shape}, expected ({batch}, n, {self.model.info.width})"
                )
            return None, np.full(batch, shape[1], np.int64), int(shape[1])
        if ask.tokens is None:
            return np.empty((batch, 0), np.int64), np.zeros(batch, np.int64), 0
        tokens = _ints("tokens", ask.tokens, 2)
        if tokens.shape[0] != batch:
            raise UsageError(f"forward: tokens for {tokens.shape[0]} rows, expected {batch}")
        _in_range("tokens", tokens, PAD, self.model.info.vocab_size)
        real = tokens != PAD
        counts = real.sum(axis=1)
        if (real != (np.arange(tokens.shape[1])[None, :] < counts[:, None])).any():
            raise UsageError("forward: -1 may stand only to the right of a row's tokens")
        return tokens, counts, int(tokens.shape[1])

    def _check_path(
        self, ask: Forward, rows: IntArray, base: IntArray
    ) -> tuple[IntArray | None, IntArray]:
        if ask.path is None:
            return None, np.zeros(len(rows), np.int64)
        if self._tree is None:
            raise UsageError("forward: path given, but no draft tree is pending")
        path = _ints("path", ask.path, 2)
        if path.shape[0] != len(rows):
            raise UsageError(f"forward: path for {path.shape[0]} rows, expected {len(rows)}")
        for i, row in enumerate(rows):
            nodes = path[i][path[i] != PAD]
            if (path[i][: len(nodes)] != nodes).any():
                raise UsageError("forward: -1 may stand only to the right of a path")
            tree = self._tree[row]
            count = len(self._rows[row]) - int(self._tree_base[row])
            _in_range("path", nodes, 0, count)
            if len(nodes) and base[i] != self._tree_base[row]:
                raise UsageError("forward: a path needs keep equal to where its tree began")
            before = -1
            for node in nodes:
                if tree[node] != before:
                    raise UsageError("forward: path is not a chain from a root of the tree")
                before = int(node)
        return path, (path != PAD).sum(axis=1)

    def _record(self, plan: Plan) -> None:
        fresh: list[IntArray] = []
        for i, row in enumerate(plan.rows):
            old, begin = self._rows[row], int(self._tree_base[row])
            kept = [old[: plan.base[i]]]
            if plan.path is not None:
                kept.append(old[begin:][plan.path[i][plan.path[i] != PAD]])
            if plan.tokens is None or not plan.causal:
                # Nothing that was computed from ids alone, left to right: no prefix to reuse.
                kept.append(np.full(plan.counts[i], PAD, np.int64))
            else:
                kept.append(plan.tokens[i, : plan.counts[i]])
            fresh.append(np.concatenate(kept))
        self._rows = fresh
        self._tree = plan.parents
        self._tree_base = plan.start.copy() if plan.parents is not None else plan.end


def _ints(name: str, value: Any, ndim: int) -> IntArray:
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"forward: {name} must be integers, got {array.dtype}")
    if array.ndim != ndim:
        raise UsageError(f"forward: {name} must have {ndim} dimension(s), got {array.ndim}")
    return array.astype(np.int64)


def _in_range(name: str, values: IntArray, low: int, high: int) -> None:
    bad = values[(values < low) | (values >= high)]
    if bad.size:
        raise UsageError(f"forward: {name} {int(bad.flat[0])} outside {low}..{high - 1}")


def _check_parents(
    ask: Forward, batch: int, width: int, counts: IntArray
) -> tuple[IntArray | None, npt.NDArray[np.bool_] | None, IntArray]:
    """Return parents, the ancestor-or-self matrix, and each new position's depth."""
    if ask.parents is None:
        return None, None, np.broadcast_to(np.arange(width), (batch, width))
    if not ask.causal or ask.embeds is not None:
        raise UsageError("forward: a draft tree is causal and made of token ids")
    parents = _ints("parents", ask.parents, 2)
    if parents.shape != (batch, width):
        raise UsageError(f"forward: parents {parents.shape}, expected {(batch, width)}")
    ancestors = np.zeros((batch, width, width), np.bool_)
    depth = np.zeros((batch, width), np.int64)
    for b in range(batch):
        for i in range(int(counts[b])):
            parent = int(parents[b, i])
            if not -1 <= parent < i:
                raise UsageError(f"forward: parent {parent} of node {i} must stand before it")
            if parent >= 0:
                ancestors[b, i] = ancestors[b, parent]
                depth[b, i] = depth[b, parent] + 1
            ancestors[b, i, i] = True
    return parents, ancestors, depth
