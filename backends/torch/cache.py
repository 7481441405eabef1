"""Key/value buffers of a session, and the geometry of one call on them.

Slot ``j`` of a row holds its ``j``-th cached position, so a row needs no more than its length to be
rolled back, and rows of unequal length share one buffer. Lengths live in the session, never here:
what lies beyond a row's length is stale but finite, and masks keep it out.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.core.model import IntArray, Plan

_FIRST_CAPACITY = 256
# Attention kernels split their sums by the number of keys, in shapes that depend on the remainder;
# always reading whole blocks makes a sum the same in every call. Small ones at first, so that a
# prompt reads little that it cannot see; large ones behind them, as every block has its own cost.
_SMALL_BLOCK = 128
_BLOCK = 512
STRICT_QUERIES = 8  # rows of queries that go together, so that no kernel has a remainder
_UNSEEN = -1e30  # as a bias; with infinity a block that a query does not see would give NaN


class Layout:
    """Where the new positions of a checked call stand, on the device.

    New positions are *packed*: the ``T`` valid ones of all rows in one dimension, padding left out.

    Attributes
    ----------
    batch, width : int
        ``B`` rows and ``n`` columns, padding included.
    stop : int
        Slots that attention reads: the longest row's end; when ``strict``, rounded up to a whole
        block.
    strict : bool
        Attention always takes the same route, masked and in whole blocks, so that its sums do not
        depend on how many positions are new. CPU only.
    begin : int or None
        The one slot at which all rows begin to write ``n`` tokens; None where rows differ.
    valid : int64 (T,) or None
        Places ``b * n + i`` of the packed positions; None when nothing is padding.
    rows, slots : int64 (T,) or None
        Where each packed position is written; None with ``begin``.
    positions : int64 (T,)
        Position in the row's text (a tree node's depth counts, not its slot).
    chain : bool
        Causal and without a tree, so that slot order is position order.
    """

    def __init__(self, plan: Plan, device: torch.device, *, strict: bool = False) -> None:
        self.plan = plan
        self.strict = strict
        self.device = device
        self.batch, self.width = plan.batch, plan.width
        self.end = int(plan.end.max())
        self.stop = whole_blocks(self.end) if strict else self.end
        self.chain = plan.causal and plan.ancestors is None
        ragged = bool((plan.counts != self.width).any())
        first = int(plan.start[0])
        self.begin = None if ragged or bool((plan.start != first).any()) else first
        self._places = np.flatnonzero(self._real) if ragged else None
        self.valid = None if self._places is None else self._tensor(self._places)
        self.rows = self.slots = None
        if self.begin is None:
            row = np.repeat(np.arange(self.batch), plan.counts)
            slot = (plan.start[:, None] + np.arange(self.width))[self._real]
            self.rows, self.slots = self._tensor(row), self._tensor(slot)
        self.positions = self._tensor(self._pack(plan.positions))

    @cached_property
    def _real(self) -> np.ndarray:
        return np.arange(self.width) < self.plan.counts[:, None]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _pack(self, values: np.ndarray) -> np.ndarray:
        flat = values.reshape(-1)
        return flat if self._places is None else flat[self._places]

    def ids(self, *, padded: bool = False) -> Tensor:
        """Return token ids: packed (T,), or (B, n) with 0 for padding."""
        assert self.plan.tokens is not None
        if padded:
            return self._tensor(np.maximum(self.plan.tokens, 0))
        return self._tensor(self._pack(self.plan.tokens))

    def grid_positions(self) -> Tensor:
        """Return positions as (B, n), 0 for padding."""
        return self._tensor(self.plan.positions)

    def pack(self, x: Tensor) -> Tensor:
        """Return (B, n, ...) as (T, ...)."""
        flat = x.reshape(self.batch * self.width, *x.shape[2:])
        return flat if self.valid is None else flat[self.valid]

    def unpack(self, x: Tensor) -> Tensor:
        """Return (T, ...) as (B, n, ...), 0 for padding."""
        if self.valid is not None:
            flat = x.new_zeros(self.batch * self.width, *x.shape[1:])
            flat[self.valid] = x
            x = flat
        return x.view(self.batch, self.width, *x.shape[1:])

    def last(self, x: Tensor) -> Tensor:
        """Return the last valid position of each row, (T, ...) to (B, ...).

        A row that appends nothing gets some other row's, as its entries are unspecified.
        """
        if self.valid is None:
            return x if self.width == 1 else x[self.width - 1 :: self.width]
        return x[self._tensor(np.maximum(np.cumsum(self.plan.counts) - 1, 0))]

    @cached_property
    def visible(self) -> Tensor:
        """What each new position may see: bool (B or 1, 1, n, stop).

        Every query sees something, padding too: a softmax over nothing is NaN.
        """
        plan = self.plan
        slot = torch.arange(self.stop, device=self.device)
        if self.chain and self.begin is not None:
            step = torch.arange(self.width, device=self.device) + self.begin
            return (slot <= step[:, None])[None, None]
        start = self._tensor(plan.start)[:, None, None]
        if self.chain:
            seen = slot <= start + torch.arange(self.width, device=self.device)[:, None]
        elif plan.ancestors is None:
            seen = (slot < self._tensor(plan.end)[:, None, None]).expand(-1, self.width, -1)
        else:
            seen = (slot < start).expand(-1, self.width, -1).clone()
            column = slot - start[:, :, 0]  # (B, stop): the new node that stands in each slot
            inside = (column >= 0) & (column < self.width)
            index = column.clamp(0, self.width - 1)[:, None].expand(-1, self.width, -1)
            seen |= self._tensor(plan.ancestors).gather(2, index) & inside[:, None]
        if self.valid is not None:
            seen = seen.clone()
            seen[:, :, 0] |= ~self._tensor(self._real)
        return seen[:, None]

    @cached_property
    def free(self) -> bool:
        """Whether attention needs no mask: one new position per row, all cached slots visible."""
        aligned = self.begin is not None and not self.strict
        return aligned and (self.width == 1 or not self.plan.causal)

    @cached_property
    def triangle(self) -> bool:
        """Whether the kernel's own causal mask says it all: a fresh chain."""
        return self.chain and self.begin == 0 and not self.strict

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return ``visible`` as an additive mask, built once per call; None where none is needed.

        Kernels would turn a bool mask into this in every layer. When ``strict``, it has rows for
        queries up to a multiple of ``STRICT_QUERIES``, and is finite.
        """
        if self.free or self.triangle:
            return None
        return self._bias.to(dtype)

    @cached_property
    def _bias(self) -> Tensor:
        mask = torch.zeros(self.visible.shape, device=self.device)
        mask.masked_fill_(~self.visible, _UNSEEN if self.strict else float("-inf"))
        return F.pad(mask, (0, 0, 0, -self.width % STRICT_QUERIES)) if self.strict else mask

    @cached_property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Blocks of slots up to ``stop``, for a strict layout.

        Returns
        -------
        list of (begin, end, first)
            Slots ``begin..end``, which no query before the ``first``-th sees.
        """
        latest = int(self.plan.start.max())
        blocks, begin = [], 0
        while begin < self.stop:
            end = begin + (_SMALL_BLOCK if begin < _BLOCK else _BLOCK)
            first = max(0, begin - latest) if self.chain else 0
            blocks.append((begin, end, first - first % STRICT_QUERIES))
            begin = end
        return blocks


def whole_blocks(slots: int) -> int:
    """Return ``slots`` rounded up to whole attention blocks."""
    block = _SMALL_BLOCK if slots <= _BLOCK else _BLOCK
    return -(-slots // block) * block


class KVCache:
    """Buffers (B, heads, capacity, head size) per layer, made on first use and grown by doubling.

    Parameters
    ----------
    layers : int
    batch : int
    limit : int
        Most slots that are ever needed: the session's context.
    dtype : torch.dtype
    """

    def __init__(self, layers: int, batch: int, limit: int, dtype: torch.dtype) -> None:
        self.batch = batch
        self.limit = limit
        self.dtype = dtype
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def _capacity(self, slots: int) -> int:
        capacity = _FIRST_CAPACITY
        while capacity < slots:
            capacity *= 2
        return max(slots, min(capacity, self.limit))

    def _empty(self, like: Tensor, slots: int, *, batch: int | None = None) -> Tensor:
        # zeros, not empty: a NaN in a masked slot would still poison the sum over values.
        shape = (batch or self.batch, like.shape[1], self._capacity(slots), like.shape[-1])
        return torch.zeros(shape, dtype=self.dtype, device=like.device)

    def _room(self, buffers: list[Tensor | None], layer: int, new: Tensor, slots: int) -> Tensor:
        old = buffers[layer]
        if old is not None and old.shape[2] >= slots:
            return old
        grown = self._empty(new, slots)
        if old is not None:
            grown[:, :, : old.shape[2]] = old
        buffers[layer] = grown
        return grown

    def write(
        self, layer: int, key: Tensor, value: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Store packed keys and values (T, heads, head size); return all that is readable.

        Returns
        -------
        keys, values : (B, heads, stop, head size)
            Views of the buffers.
        """
        pair = []
        for buffers, new in ((self.keys, key), (self.values, value)):
            buffer = self._room(buffers, layer, new, layout.stop)
            if layout.begin is None:
                buffer[layout.rows, :, layout.slots] = new.to(self.dtype)
            else:
                grid = new.view(layout.batch, layout.width, *new.shape[1:]).transpose(1, 2)
                buffer.narrow(2, layout.begin, layout.width).copy_(grid)
            pair.append(buffer.narrow(2, 0, layout.stop))
        return pair[0], pair[1]

    def compact(self, base: IntArray, path: IntArray) -> None:
        """Move the nodes of each row's ``path`` to stand right after ``base``, in place."""
        for b, nodes in _moves(path):
            target = slice(int(base[b]), int(base[b]) + len(nodes))
            for buffers in (self.keys, self.values):
                for buffer in buffers:
                    if buffer is not None:
                        source = torch.from_numpy(nodes + base[b]).to(buffer.device)
                        buffer[b, :, target] = buffer[b].index_select(1, source)

    def gather(self, rows: IntArray, base: IntArray, path: IntArray | None) -> KVCache:
        """Return new buffers whose row ``i`` continues ``rows[i]``; these stay as they are.

        Rows keep their first ``base[i]`` slots and, behind them, the nodes of ``path[i]``.
        """
        fresh = KVCache(len(self.keys), len(rows), self.limit, self.dtype)
        used = int(base.max())
        longest = used if path is None else int((base + (path >= 0).sum(axis=1)).max())
        if longest == 0:
            return fresh
        one = int(rows[0]) if bool((rows == rows[0]).all()) else None
        for target, source in ((fresh.keys, self.keys), (fresh.values, self.values)):
            index = None
            for layer, buffer in enumerate(source):
                if buffer is None:
                    continue
                if index is None and one is None:
                    index = torch.from_numpy(rows).to(buffer.device)
                # Room for the next token as well, so that a beam step does not copy twice.
                new = self._empty(buffer, min(longest + 1, self.limit), batch=len(rows))
                kept = buffer.narrow(2, 0, used)
                # A fork of one row broadcasts in the copy itself.
                new.narrow(2, 0, used).copy_(
                    kept[one : one + 1] if one is not None else kept.index_select(0, index)
                )
                for b, nodes in _paths(path):
                    begin = int(base[b])
                    where = torch.from_numpy(nodes + begin).to(buffer.device)
                    new[b, :, begin : begin + len(nodes)] = buffer[int(rows[b])].index_select(
                        1, where
                    )
                target[layer] = new
        return fresh

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        held = [t for t in (*self.keys, *self.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


def _paths(path: IntArray | None) -> list[tuple[int, IntArray]]:
    """Return (row, nodes) for every row that keeps nodes of its tree."""
    if path is None:
        return []
    rows = [(b, nodes[nodes >= 0]) for b, nodes in enumerate(path)]
    return [(b, nodes) for b, nodes in rows if len(nodes)]


def _moves(path: IntArray) -> list[tuple[int, IntArray]]:
    """Return (row, nodes) for the rows whose nodes do not stand in place already."""
    return [(b, nodes) for b, nodes in _paths(path) if (nodes != np.arange(len(nodes))).any()]
