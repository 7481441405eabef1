"""What the transformers model calls back into: our cache layers, masks and attention.

The library builds each layer's mask from a function of query and key *index*; for ragged rows and
draft trees we call that function with *positions* instead, so that windows are measured in the
text, not in slots. Everything is registered once under the name ``steersman`` and finds the call
under way in a thread-local, so that several threads can use one model.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from steersman.core.errors import BackendError

from .attention import attention_weights
from .cache import KVCache, Layout
from .model import Captured


@dataclass
class Call:
    """The forward call under way in this thread; hooks and masks read it."""

    layout: Layout
    captured: Captured
    final: Tensor | None = None


class Active(threading.local):
    call: Call | None = None


ACTIVE = Active()


@contextlib.contextmanager
def active(call: Call) -> Iterator[None]:
    ACTIVE.call = call
    try:
        yield
    finally:
        ACTIVE.call = None


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a call's view on the session's buffers."""

    def __init__(self, index: int, cache: KVCache, layout: Layout) -> None:
        super().__init__()
        self.index, self.cache, self.layout = index, cache, layout
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pack = self.layout.pack
        return self.cache.write(
            self.index,
            pack(key_states.transpose(1, 2)),
            pack(value_states.transpose(1, 2)),
            self.layout,
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layout.stop, 0

    def get_seq_length(self) -> int:
        # Only read for aligned rows; for all others positions and masks are given explicitly.
        return self.layout.begin or 0

    def get_max_length(self) -> int:
        return -1


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Build a layer type's mask: bool (B, 1, n, stop), or None for a kernel's own causal mask."""
    call = ACTIVE.call
    if call is None or (call.layout.chain and call.layout.begin is not None):
        extra = {} if mask_function is None else {"mask_function": mask_function}
        mask: Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, use_vmap=use_vmap, **extra,
            **kwargs,
        )  # fmt: skip
        return mask
    if use_vmap or mask_function is None:
        raise BackendError("torch: this architecture's mask is no function of positions")
    layout = call.layout
    query = layout.grid_positions()[:, None, :, None]
    key = torch.arange(layout.stop, device=layout.device).expand(layout.batch, -1)
    if layout.plan.ancestors is not None:
        # A tree node stands in the slot of its number, at the position of its depth.
        key = key.clone()
        grid = layout.grid_positions()
        for b, (start, count) in enumerate(zip(layout.plan.start, layout.plan.counts)):
            key[b, start : start + count] = grid[b, :count]
    key = key[:, None, None, :]
    if not layout.plan.causal:
        query = torch.maximum(query, key)  # what lies ahead counts as no further than itself
    batch = torch.arange(layout.batch, device=layout.device)[:, None, None, None]
    allowed = mask_function(batch, torch.zeros_like(batch[:1]), query, key)
    return (allowed & layout.visible).expand(layout.batch, 1, layout.width, layout.stop)


_sdpa: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """sdpa, plus the weights of the layers somebody asked for, plus soft-capped scores."""
    if kwargs.get("s_aux") is not None:
        raise BackendError("torch: attention sinks are not supported on the hf path")
    call = ACTIVE.call
    index: int = getattr(module, "layer_idx", -1)
    wanted = call is not None and index in call.captured.want_attentions
    if not wanted and softcap is None:
        return _sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    visible = attention_mask
    if visible is None:
        count, stop = query.shape[2], key.shape[2]
        step = torch.arange(stop - count, stop, device=query.device)
        visible = torch.arange(stop, device=query.device) <= step[:, None]
    weights = attention_weights(query, key, visible, scaling, softcap)
    if call is not None and wanted:
        call.captured.attentions[index] = weights
    if softcap is not None:
        groups = query.shape[1] // key.shape[1]
        mixed = weights.to(query.dtype) @ repeat_kv(value, groups)
        return mixed.transpose(1, 2).contiguous(), None
    return _sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def register() -> None:
    AttentionInterface.register("steersman", _attention)
    # Without this second line the library would drop every mask without a word.
    AttentionMaskInterface.register("steersman", _mask)


def call_cache(layers: int, cache: KVCache, layout: Layout) -> Cache:
    """Return a session's buffers in the form that the library's models write to."""
    return Cache(layers=[CacheLayer(i, cache, layout) for i in range(layers)])
