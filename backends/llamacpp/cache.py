"""A cache that grows: a context, replaced by a larger one when its rows need more room.

The engine allocates and touches all of a context's cells when it is created, and copies whole rows
on a fork. Starting small makes short prompts cheap and leaves large contexts possible; the copy
into the larger context is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.core.errors import BackendError, UsageError

from .capture import Capture
from .entries import Entries
from .handles import Context, FloatArray, ModelHandle, check_memory

_FIRST_CELLS = 512
_PAD = 256  # the engine rounds rows up to this many cells


class Cache:
    """Sequences of one context and what they hold.

    Parameters
    ----------
    model : ModelHandle
    sequences : int
        Sequence ids, 0..sequences-1.
    positions : int
        Most positions of one sequence.
    unified : bool
        All sequences share one pool of cells: needed for trees, whose branches share a prefix.
    micro_batch : int
        Tokens per graph.
    causal_limit : int
        Tokens per call with causal attention.
    bytes_per_cell : int
        Keys and values of one position.
    capture : Capture, optional
    **options
        Passed on to :class:`Context`.

    Attributes
    ----------
    length : list of int
        Positions that each sequence holds.
    """

    def __init__(
        self,
        model: ModelHandle,
        *,
        sequences: int,
        positions: int,
        unified: bool,
        micro_batch: int,
        causal_limit: int,
        bytes_per_cell: int,
        capture: Capture | None,
        opening: threading.Lock,
        **options: Any,
    ) -> None:
        self._model: ModelHandle | None = model
        self._sequences = sequences
        self._unified = unified
        self._micro_batch = micro_batch
        self._causal_limit = causal_limit
        self._bytes_per_cell = bytes_per_cell
        self._capture = capture
        self._opening = opening
        self._options = options
        most = -(-positions // _PAD) * _PAD
        self._most_cells = most * sequences if unified else most
        self._cells = min(most, _FIRST_CELLS)
        self._context: Context | None = self._open(self._cells)
        self.length = [0] * sequences
        # Where positions lie, per sequence; only kept where attention is read from a shared pool.
        self._track = unified and capture is not None
        self._places: dict[int, list[list[int]]] = {}  # by pool, see Capture.take_places
        self.new_places: dict[int, list[int]] = {}
        # Targets of copies that the engine carries out at its next call.
        self._pending: set[int] = set()

    def _open(self, cells: int) -> Context:
        if self._model is None:
            raise UsageError("session: already closed")
        total = cells * (1 if self._unified else self._sequences)
        check_memory(total * self._bytes_per_cell, f"{total} positions")
        with self._opening:
            return Context(
                self._model,
                cells=cells,
                rows=self._sequences,
                unified=self._unified,
                micro_batch=self._micro_batch,
                callback=None if self._capture is None else self._capture.function,
                **self._options,
            )

    def close(self) -> None:
        """Let go of the context; it is freed once no logits look into it any more."""
        self._context = self._model = None

    @property
    def context(self) -> Context:
        """The present context."""
        if self._context is None:
            raise UsageError("session: already closed")
        return self._context

    @property
    def shared(self) -> bool:
        """Whether all sequences share one pool of cells."""
        return self._unified

    @property
    def cells(self) -> int:
        """Positions there is room for now: per sequence, or in all when shared."""
        return self._cells

    def reserve(self, cells: int) -> list[int]:
        """Make room for ``cells`` positions, per sequence or in all when shared.

        Returns
        -------
        list of int
            Sequences that lost their content (copies the engine had not carried out yet).
        """
        size = self._cells
        while size < cells:
            size *= 2
        size = min(size, self._most_cells)
        if size <= self._cells:
            return []
        fresh = self._open(size)
        lost = sorted(self._pending)
        for seq in lost:
            self.remove(seq, 0)
        self.context.copy_to(fresh)
        self._context, self._cells = fresh, size
        self._pending.clear()
        for pool, table in self._places.items():
            # The copy packs the cells in use, in their order.
            used = np.unique([place for places in table for place in places])
            self._places[pool] = [np.searchsorted(used, places).tolist() for places in table]
        return lost

    def enlarge(self) -> None:
        """Double a full cache.

        Raises
        ------
        BackendError
            It is as large as it may become.
        """
        if self._cells >= self._most_cells:
            raise BackendError(
                f"cache: all {self._cells} positions are in use; "
                "use fewer rows or a larger --ctx-size"
            )
        if self.reserve(2 * self._cells):
            raise BackendError("cache: rows were lost while it grew; make the call again")

    def remove(self, seq: int, begin: int) -> bool:
        """Cut a sequence; False when the engine can only empty it (then it is empty)."""
        if self.length[seq] <= begin:
            return True
        done = self.context.remove(seq, begin)
        if not done:
            self.context.remove(seq, -1)
            begin = 0
        self.length[seq] = begin
        self._forget(seq, begin)
        return done

    def clean(self, seq: int, begin: int) -> None:
        """Cut a sequence to ``begin`` after a failure, whatever the records say about it."""
        if not self.context.remove(seq, begin):
            self.context.remove(seq, -1)
            begin = 0
        self.length[seq] = min(self.length[seq], begin)
        self._forget(seq, begin)
        self._pending.discard(seq)

    def _forget(self, seq: int, begin: int) -> None:
        for table in self._places.values():
            del table[seq][begin:]

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` the same as ``source``."""
        self.remove(target, 0)
        if not self.length[source]:
            return
        self.context.copy(source, target)
        self.length[target] = self.length[source]
        for table in self._places.values():
            table[target] = list(table[source])
        if not self._unified:
            self._pending.add(target)

    def places(self, layer: int, seq: int, begin: int) -> npt.NDArray[np.int64]:
        """Return the cells of a sequence's first ``begin`` positions and of the newest tokens.

        Only known for a shared pool whose capture tracks cells.
        """
        assert self._capture is not None
        pool = self._capture.pool_of.get(layer, -1)
        if pool not in self._places:
            raise BackendError(f"llama.cpp: the cells of layer {layer} are not known")
        return np.asarray(self._places[pool][seq][:begin] + self.new_places[pool], np.int64)

    def step(self, token: int, seq: int) -> FloatArray:
        """Append one token and return a view (1, V) of its logits."""
        at = self.length[seq]
        while True:
            context = self.context
            context.token[0], context.pos[0], context.seq[0] = token, at, seq
            context.flag[0] = 1
            if not context.decode(1):
                break
            self.enlarge()
        logits = context.logits(1)
        self._pending.clear()
        self.length[seq] = at + 1
        return logits

    def feed(self, entries: Entries) -> Iterator[tuple[int, FloatArray]]:
        """Decode entries in as many calls as they need.

        Yields
        ------
        first : int
            Index of the first flagged entry, among the flagged ones, that the view is about.
        logits : float32 array (k, V)
            View of the engine's buffer; the next call overwrites it.
        """
        total, begin, first = len(entries), 0, 0
        self.new_places = {}
        while begin < total:
            context = self.context
            size = min(context.n_batch, self._causal_limit if entries.causal else total)
            part = slice(begin, min(total, begin + size))
            n = part.stop - begin
            context.pos[:n] = entries.pos[part]
            context.flag[:n] = entries.flag[part]
            if entries.tokens is not None:
                context.token[:n] = entries.tokens[part]
            if entries.seq is not None:
                context.seq[:n] = entries.seq[part]
            context.set_causal(entries.causal)
            full = context.decode(
                n,
                embeds=None if entries.embeds is None else entries.embeds[part],
                shared=None if entries.shared is None else entries.shared[part],
            )
            if self._capture is not None and self._capture.error is not None:
                self._capture.end()
            if full:
                self.enlarge()
                continue
            self._pending.clear()
            self._note(entries, part)
            flagged = int(np.count_nonzero(entries.flag[part]))
            if flagged:
                yield first, context.logits(flagged)
            first += flagged
            begin = part.stop
        if not entries.causal:
            self.context.set_causal(True)

    def _note(self, entries: Entries, part: slice) -> None:
        if entries.seq is not None:
            ids, counts = np.unique(entries.seq[part], return_counts=True)
            for seq, count in zip(ids.tolist(), counts.tolist()):
                self.length[seq] += count
        else:
            for index in range(part.start, part.stop):
                for seq in entries.owners(index):
                    self.length[seq] += 1
        if not self._track or self._capture is None:
            return
        for pool, new in self._capture.take_places().items():
            self.new_places.setdefault(pool, []).extend(new)
            table = self._places.setdefault(pool, [[] for _ in self.length])
            for place, index in zip(new, range(part.start, part.stop)):
                for seq in entries.owners(index):
                    table[seq].append(place)
