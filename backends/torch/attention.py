"""Attention over a session's cache: fused, fused in fixed blocks of keys, and as plain weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import STRICT_QUERIES, Layout


def attend(query: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Scaled dot-product attention of (B, H, n, d) over (B, KV, stop, d); (B, H, n, d)."""
    bias = layout.bias(query.dtype)
    if layout.strict:
        assert bias is not None
        return _attend_in_blocks(query, keys, values, bias, layout)
    grouped = query.shape[1] != keys.shape[1]
    if grouped and bias is not None and query.is_cuda:
        # The fast CUDA kernels take a mask or shared key/value heads, not both.
        repeat = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=bias,
        is_causal=layout.triangle and layout.width > 1,
        enable_gqa=grouped,
    )


def _attend_in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, layout: Layout
) -> Tensor:
    """Attention whose bits do not depend on how positions are cut into calls (CPU).

    Each block of keys has its own fused softmax; their results are weighted by its normaliser, one
    block after the other. Blocks stand at fixed places, and one that a query does not see weighs
    exactly nothing, so it may be computed (for another query's sake) or left out.
    """
    count = query.shape[2]
    query = F.pad(query, (0, 0, 0, -count % STRICT_QUERIES))
    parts = []
    for begin, end, first in layout.blocks:
        # Not F.scaled_dot_product_attention, which calls this and drops the normaliser.
        mixed, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, first:],
            keys[:, :, begin:end],
            values[:, :, begin:end],
            attn_mask=bias[:, :, first:, begin:end],
        )
        parts.append((first, mixed, normaliser))
    if len(parts) == 1:
        return parts[0][1][:, :, :count]
    top = parts[0][2].clone()
    for first, _, normaliser in parts[1:]:
        torch.maximum(top[:, :, first:], normaliser, out=top[:, :, first:])
    total, sums = torch.zeros_like(top), torch.zeros_like(parts[0][1])
    for first, mixed, normaliser in parts:
        weight = (normaliser - top[:, :, first:]).exp_()
        total[:, :, first:] += weight
        sums[:, :, first:].addcmul_(mixed, weight[..., None])
    return sums.div_(total[..., None])[:, :, :count]


def attention_weights(
    query: Tensor,
    keys: Tensor,
    visible: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the softmax that fused attention uses but does not show.

    Parameters
    ----------
    query : (B, H, n, d)
    keys : (B, KV, S, d)
    visible : bool, broadcastable to (B, H, n, S)
    scale : float, optional
        Default ``1 / sqrt(d)``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).

    Returns
    -------
    float32 (B, H, n, S)
    """
    batch, heads, count, size = query.shape
    kv_heads = keys.shape[1]
    split = query.float().reshape(batch, kv_heads, heads // kv_heads * count, size)
    scores = split @ keys.float().transpose(2, 3) * (scale or 1 / math.sqrt(size))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, heads, count, keys.shape[2])
    return scores.masked_fill(~visible, -math.inf).softmax(-1)
