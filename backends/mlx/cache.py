"""The key-value cache: columns shared by all rows, and one host table that says what they hold.

mlx-lm's own caches can only drop tokens from the end of all rows at once, and its rotating one not
even that. Here every layer keeps its keys and values by *column*; a table on the host, common to
all layers, gives each row's position in every column and whether it is valid there. Going back,
ragged rows, draft trees and their branches are then changes to the table, and what the layers see
is a mask. Sliding windows are part of the mask too, so they can be rolled back (and save no
memory).

As long as all rows are equally long and without holes ("dense", every single-row chain) there is no
table at all: the offset is one integer, the mask is None or causal, exactly as in mlx-lm.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from steersman.core.errors import BackendError
from steersman.core.model import PAD, IntArray, Plan

BoolArray = npt.NDArray[np.bool_]
Array = mx.array

_STEP = 256  # columns are allocated by this many
_WASTE = 32  # holes that a batch tolerates before its columns are packed


class LayerCache:
    """One layer's keys and values, in the shape that mlx-lm's models expect of a cache."""

    def __init__(self, table: SlotCache) -> None:
        self._table = table
        self.keys: Array | None = None  # (B, H_kv, capacity, d)
        self.values: Array | None = None

    @property
    def offset(self) -> int | Array:
        """Positions of the staged tokens: one for all, (B,) for chains, (B, n) for trees."""
        return self._table.offset

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> str | Array | None:
        """Return what mlx-lm passes on to attention: None, "causal" or bool (·, 1, N, S + N)."""
        return self._table.mask(window_size, as_array=return_array)

    def update_and_fetch(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Write the staged tokens behind the used columns; return all columns up to them."""
        begin = self._table.size
        end = begin + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys = _allocate(keys, end)
            self.values = _allocate(values, end)
        elif end > self.keys.shape[2]:
            self.keys = _grow(self.keys, begin, end)
            self.values = _grow(self.values, begin, end)
        self.keys[..., begin:end, :] = keys
        self.values[..., begin:end, :] = values
        return self.keys[..., :end, :], self.values[..., :end, :]


def _allocate(like: Array, columns: int) -> Array:
    batch, heads, _, width = like.shape
    return mx.zeros((batch, heads, -(-columns // _STEP) * _STEP, width), like.dtype)


def _grow(array: Array, used: int, columns: int) -> Array:
    more = -(-(columns - used) // _STEP) * _STEP
    batch, heads, _, width = array.shape
    fresh = mx.zeros((batch, heads, more, width), array.dtype)
    return mx.concatenate([array[..., :used, :], fresh], axis=2)


@dataclass(frozen=True)
class _Saved:
    batch: int
    size: int
    ok: BoolArray | None
    pos: IntArray | None
    tree: int | None
    arrays: list[tuple[Array | None, Array | None]]


class SlotCache:
    """All layers of one session.

    Attributes
    ----------
    batch : int
    size : int
        Columns in use.
    ok : bool (B, size) or None
        Where each row has a token; None while the cache is dense.
    pos : int64 (B, size) or None
        That token's position in its row.
    tree : int or None
        First column of the pending draft tree.
    layers : list of LayerCache
        What to pass to mlx-lm's model.
    """

    def __init__(self, layers: int) -> None:
        self.batch = 1
        self.size = 0
        self.ok: BoolArray | None = None
        self.pos: IntArray | None = None
        self.tree: int | None = None
        self.layers = [LayerCache(self) for _ in range(layers)]
        self._plan: Plan | None = None
        self._written = 0  # this call has overwritten columns from here on ...
        self._copied = False  # ... but in copies of the arrays it began with
        self._masks: dict[int | None, Array | None] = {}
        self.offset: int | Array = 0

    # -- a call: edit, stage, (the model runs,) commit; or restore ------------------------------

    def save(self) -> _Saved:
        """Return what :meth:`restore` needs; cheap, nothing is copied."""
        arrays = [(layer.keys, layer.values) for layer in self.layers]
        self._written, self._copied = self.size, False
        return _Saved(self.batch, self.size, self.ok, self.pos, self.tree, arrays)

    def restore(self, saved: _Saved) -> None:
        """Undo a call that failed. Columns that it has overwritten are marked as lost."""
        self.batch, self.size, self.tree = saved.batch, saved.size, saved.tree
        self.ok, self.pos = saved.ok, saved.pos
        for layer, (keys, values) in zip(self.layers, saved.arrays, strict=True):
            layer.keys, layer.values = keys, values
        self._plan = None
        if not self._copied and self._written < self.size:
            self._explicit()
            assert self.ok is not None
            self.ok = self.ok & (np.arange(self.size) < self._written)

    def edit(self, plan: Plan) -> None:
        """Take over the plan's rows, drop what is not kept, and pack the columns."""
        base = plan.base
        if self.ok is None and plan.identity and (base == base[0]).all():
            if base[0] > self.size:
                raise self._lost(self.size)
            self.size = self._written = int(base[0])
            return
        self._explicit()
        assert self.ok is not None and self.pos is not None
        ok, pos = self.ok[plan.rows], self.pos[plan.rows]
        if not plan.identity:
            index = mx.array(plan.rows.astype(np.int32))
            for layer in self.layers:
                if layer.keys is not None and layer.values is not None:
                    layer.keys = mx.take(layer.keys, index, axis=0)
                    layer.values = mx.take(layer.values, index, axis=0)
            self.batch = plan.batch
            self._copied = True
        valid = ok
        ok = ok & (pos < base[:, None])
        if plan.path is not None and self.tree is not None:
            row, place = np.nonzero(plan.path != PAD)
            columns = self.tree + plan.path[row, place]
            ok[row, columns] = valid[row, columns]
        short = ok.sum(axis=1) < plan.start
        if short.any():
            raise self._lost(int(ok.sum(axis=1)[short].min()))
        self._pack(ok, pos)
        self.tree = None

    def stage(self, plan: Plan) -> None:
        """Say what the layers will be asked to append: its positions and who sees whom."""
        self._plan = plan
        self._masks = {}
        self._written = min(self._written, self.size)
        if plan.parents is not None:
            self.offset = mx.array(plan.positions.astype(np.int32))
        elif (plan.start == plan.start[0]).all():
            self.offset = int(plan.start[0])
        else:
            self.offset = mx.array(plan.start.astype(np.int32))

    def commit(self) -> None:
        """The staged tokens are in: enter them into the table."""
        plan = self._staged()
        if not self._stays_dense(plan):
            self._explicit()
            assert self.ok is not None and self.pos is not None
            fresh = np.arange(plan.width) < plan.counts[:, None]
            self.ok = np.concatenate([self.ok, fresh], axis=1)
            self.pos = np.concatenate([self.pos, plan.positions], axis=1)
            if plan.parents is not None:
                self.tree = self.size
        self.size += plan.width
        self._plan = None

    def arrays(self) -> list[Array]:
        """Return every layer's arrays, to be evaluated."""
        return [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]

    # -- what the staged tokens see --------------------------------------------------------------

    def mask(self, window: int | None, *, as_array: bool = False) -> str | Array | None:
        """Return the staged tokens' mask over all columns, themselves included.

        Parameters
        ----------
        window : int or None
            Positions a token sees, itself included; None sees all.
        as_array : bool
            Never answer "causal".
        """
        plan = self._staged()
        if self._stays_dense(plan):
            fits = window is None or self.size + plan.width <= window
            if fits and (not plan.causal or plan.width == 1):
                return None
            if fits and not as_array:
                return "causal"
        if window not in self._masks:
            visible = self._visible(plan, window)
            self._masks[window] = None if visible.all() else mx.array(visible[:, None])
        return self._masks[window]

    def _visible(self, plan: Plan, window: int | None) -> BoolArray:
        """Return bool (B or 1, n, size + n)."""
        width, size = plan.width, self.size
        valid = np.arange(width) < plan.counts[:, None]
        if plan.ancestors is not None:
            fresh = plan.ancestors
        else:
            fresh = np.broadcast_to(valid[:, None, :], (plan.batch, width, width))
            if plan.causal:
                fresh = fresh & np.tri(width, dtype=np.bool_)
        old = np.ones((plan.batch, size), np.bool_) if self.ok is None else self.ok
        pos = np.arange(size)[None, :] if self.pos is None else self.pos
        seen = np.broadcast_to(old[:, None, :], (plan.batch, width, size))
        if window is not None:
            ask = plan.positions[:, :, None]
            seen = seen & (ask - pos[:, None, :] < window)
            fresh = fresh & (ask - plan.positions[:, None, :] < window)
        # A query of padding has nothing to see but itself; without that its softmax is empty.
        fresh = fresh | (~valid[:, :, None] & np.eye(width, dtype=np.bool_))
        visible = np.concatenate([seen, fresh], axis=2)
        return visible[:1] if (visible == visible[:1]).all() else visible

    def order(self) -> IntArray | None:
        """Return each row's columns in the order of its tokens, the staged ones last.

        Returns
        -------
        int64 (B, S) or None
            ``S`` is the most tokens that a row has; rows with fewer end in unseen columns. None
            when the columns stand in that order already.
        """
        plan = self._staged()
        if self._stays_dense(plan):
            return None
        old = np.ones((plan.batch, self.size), np.bool_) if self.ok is None else self.ok
        fresh = np.arange(plan.width) < plan.counts[:, None]
        ok = np.concatenate([old, fresh], axis=1)
        return np.argsort(~ok, axis=1, kind="stable")[:, : int(plan.end.max())]

    # -- helpers -------------------------------------------------------------------------------

    def _staged(self) -> Plan:
        if self._plan is None:
            raise BackendError("mlx: the cache was used outside a forward call")
        return self._plan

    def _stays_dense(self, plan: Plan) -> bool:
        return self.ok is None and plan.parents is None and bool((plan.counts == plan.width).all())

    def _lost(self, have: int) -> BackendError:
        return BackendError(
            f"mlx: an earlier call failed and left only {have} tokens in the cache; keep fewer"
        )

    def _explicit(self) -> None:
        if self.ok is None:
            shape = (self.batch, self.size)
            self.ok = np.ones(shape, np.bool_)
            self.pos = np.broadcast_to(np.arange(self.size), shape)

    def _pack(self, ok: BoolArray, pos: IntArray) -> None:
        """Cut columns that nobody uses from the end, and close holes where that pays."""
        used = np.flatnonzero(ok.any(axis=0))
        size = int(used[-1]) + 1 if len(used) else 0
        ok, pos = ok[:, :size], pos[:, :size]
        longest = int(ok.sum(axis=1).max())
        if size > longest and (self.batch == 1 or size - longest > max(_WASTE, longest // 8)):
            holes = np.flatnonzero(~ok.all(axis=0))
            first = int(holes[0])
            order = np.argsort(~ok[:, first:], axis=1, kind="stable")[:, : longest - first]
            self._move(first, order)
            ok = np.concatenate(
                [ok[:, :first], np.take_along_axis(ok[:, first:], order, axis=1)], axis=1
            )
            pos = np.concatenate(
                [pos[:, :first], np.take_along_axis(pos[:, first:], order, axis=1)], axis=1
            )
            size = longest
        self.size = size
        if ok.all():
            self.ok = self.pos = None
        else:
            self.ok, self.pos = ok, pos

    def _move(self, first: int, order: IntArray) -> None:
        count = order.shape[1]
        if count == 0:
            return
        self._written = min(self._written, first)
        self._copied = self._copied or self.batch > 1
        index = mx.array(order.astype(np.int32))[:, None, :, None]
        for layer in self.layers:
            for name in ("keys", "values"):
                array = getattr(layer, name)
                moved = mx.take_along_axis(array[..., first:, :], index, axis=2)
                if self.batch > 1:
                    # Other rows' kept tokens lie here too: write into a new array, so that a
                    # failing call can go back to the old one.
                    array = mx.array(array)
                array[..., first : first + count, :] = moved
                setattr(layer, name, array)
