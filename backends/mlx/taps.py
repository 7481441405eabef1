"""Looking inside mlx-lm's models: soft tokens in, hidden states and attention weights out.

mlx-lm's layers offer no hooks, and setting ``__call__`` on an instance has no effect, so their
classes are replaced once, when a model is opened, by subclasses that look at a record of the
calling thread. Parameters, attributes and ``isinstance`` stay as they were, and a call without a
record (also one made by somebody else through mlx-lm) takes the original path. Because the record
belongs to the thread, several threads can share a model without a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Array = Any  # mx.array


@dataclass
class Record:
    """What one forward call puts in and wants out.

    Attributes
    ----------
    embeds : array (B, n, D) or None
        Input of the first layer, instead of the embedded (and, by Gemma, scaled) ids.
    stop : bool
        Go no further than to the first layer.
    """

    want_hidden: frozenset[int] = frozenset()
    want_attentions: frozenset[int] = frozenset()
    embeds: Array | None = None
    hidden: dict[int, Array] = field(default_factory=dict)
    attentions: dict[int, Array] = field(default_factory=dict)
    stop: bool = False
    layer: int = -1


class _Reached(Exception):
    """Carries the first layer's input out of a call that stops there."""

    def __init__(self, x: Array) -> None:
        self.x = x


class _Active(threading.local):
    record: Record | None = None


_active = _Active()


@contextmanager
def recording(record: Record) -> Iterator[Record]:
    """Make ``record`` the one that this thread's calls fill."""
    _active.record = record
    try:
        yield record
    finally:
        _active.record = None


def embedded(model: nn.Module, ids: Array) -> Array:
    """Return what the first layer gets for ``ids`` (B, n): (B, n, D), in the model's own scale."""
    try:
        with recording(Record(stop=True)):
            model.model(ids)
    except _Reached as reached:
        return reached.x
    raise AssertionError("the taps are not installed")


def install(model: nn.Module, module: ModuleType) -> None:
    """Prepare a freshly built mlx-lm model and the module that defines its attention.

    Parameters
    ----------
    model : nn.Module
        With ``model.layers`` and ``layer.self_attn.rope``.
    module : module
        Where the attention class looks up ``scaled_dot_product_attention``.
    """
    for index, layer in enumerate(model.model.layers):
        _subclass(layer, _layer_call(index))
        _subclass(layer.self_attn.rope, _rope_call)
    if not hasattr(module.scaled_dot_product_attention, "steersman_original"):
        module.scaled_dot_product_attention = _attention(  # type: ignore[attr-defined]
            module.scaled_dot_product_attention
        )


def _subclass(target: nn.Module, make_call: Any) -> None:
    base = type(target)
    body = {"__call__": make_call(base), "__module__": base.__module__}
    target.__class__ = type(base.__name__, (base,), body)


def _layer_call(index: int) -> Any:
    def make(base: type) -> Any:
        original = base.__call__

        def __call__(self: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
            record = _active.record
            if record is None:
                return original(self, x, *args, **kwargs)
            record.layer = index
            if index == 0:
                if record.stop:
                    raise _Reached(x)
                if record.embeds is not None:
                    x = mx.array(record.embeds)  # a new object: some layers compute in place
                if 0 in record.want_hidden:
                    record.hidden[0] = mx.array(x)
            out = original(self, x, *args, **kwargs)
            if index + 1 in record.want_hidden:
                record.hidden[index + 1] = mx.array(out)
            return out

        return __call__

    return make


def _rope_call(base: type) -> Any:
    original = base.__call__

    def __call__(self: Any, x: Array, offset: Any = 0) -> Array:
        if isinstance(offset, int) or offset.ndim < 2:
            return original(self, x, offset=offset)
        # mx.fast.rope takes one offset per row. A draft tree has one per token: make rows of them.
        batch, heads, count, width = x.shape
        flat = x.transpose(0, 2, 1, 3).reshape(batch * count, heads, 1, width)
        turned = original(self, flat, offset=offset.reshape(-1))
        return turned.reshape(batch, count, heads, width).transpose(0, 2, 1, 3)

    return __call__


def _attention(original: Any) -> Any:
    def scaled_dot_product_attention(
        queries: Array,
        keys: Array,
        values: Array,
        cache: Any,
        scale: float,
        mask: Any = None,
        **kwargs: Any,
    ) -> Array:
        record = _active.record
        if record is not None and record.layer in record.want_attentions:
            record.attentions[record.layer] = attention_weights(queries, keys, scale, mask)
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **kwargs)

    scaled_dot_product_attention.steersman_original = original  # type: ignore[attr-defined]
    return scaled_dot_product_attention


def attention_weights(queries: Array, keys: Array, scale: float, mask: Any) -> Array:
    """Return softmax(scale · q kᵀ), float32 (B, H, n, S).

    Parameters
    ----------
    queries : array (B, H, n, d)
    keys : array (B, H_kv, S, d)
        Each is shared by ``H / H_kv`` heads.
    scale : float
    mask : None, "causal", bool array (True: visible) or additive array, broadcast to (B, 1, n, S)
    """
    batch, heads, count, width = queries.shape
    groups, size = keys.shape[1], keys.shape[2]
    q = queries.astype(mx.float32).reshape(batch, groups, heads // groups, count, width)
    k = keys.astype(mx.float32)[:, :, None]
    scores = (scale * (q @ k.swapaxes(-1, -2))).reshape(batch, heads, count, size)
    if isinstance(mask, str):
        mask = mx.arange(size)[None, :] <= mx.arange(size - count, size)[:, None]
    if mask is not None:
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, -mx.inf)
        else:
            scores = scores + mask
    return mx.softmax(scores, axis=-1, precise=True)
