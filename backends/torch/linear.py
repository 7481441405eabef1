"""Projections: callables from (T, K) to (T, N), one kind per way of storing the weights.

Inputs are always two-dimensional. In bfloat16 on CPU a strided three-dimensional slice of hidden
states would make ``linear`` copy the whole weight on every call, 20 times the cost of the product.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
_UNITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_UNIT_ROWS = 96
BLOCK = 32  # weights per block of GGUF's Q4_0 and Q4_1


class Dense:
    """Weights (N, K) in the dtype they compute in."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class HalfStored:
    """Weights in float16, arithmetic in float32 (FBGEMM, x86 only).

    Decoding on a CPU waits for weights from memory, so half the bytes is nearly half the time; and
    unlike bfloat16 it needs no processor support beyond AVX2.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        limit = torch.finfo(torch.float16).max
        low, high = weight.aminmax()
        if max(-float(low), float(high)) > limit:  # FBGEMM would saturate without a word
            raise OverflowError(f"a weight is larger than {limit:.0f}")
        weight = weight.float().contiguous()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self._run = torch.ops.quantized.linear_dynamic_fp16

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x.contiguous(), self._packed)

    @staticmethod
    def supported() -> bool:
        """Whether this torch build and processor can do it."""
        return "fbgemm" in torch.backends.quantized.supported_engines


@dataclass(frozen=True, kw_only=True)
class Q4Blocks:
    """Rows of GGUF Q4_0 or Q4_1 blocks: weight = scale * nibble + minimum.

    Attributes
    ----------
    nibbles : uint8 (N, K/32, 16)
        Byte ``j`` of a block holds weight ``j`` in its low half and ``j + 16`` in its high half.
    scale, minimum : float32 (N, K/32)
    """

    nibbles: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray

    @classmethod
    def read(cls, raw: np.ndarray, kind: str) -> Q4Blocks:
        """Split a tensor's bytes (N, bytes per row).

        References
        ----------
        ``block_q4_0`` and ``block_q4_1`` in ggml: float16 scale (and minimum), then 16 bytes.
        """
        head = {"Q4_0": 2, "Q4_1": 4}[kind]
        blocks = raw.reshape(raw.shape[0], -1, head + BLOCK // 2)
        floats = np.ascontiguousarray(blocks[..., :head]).view(np.float16).astype(np.float32)
        scale = floats[..., 0]
        minimum = floats[..., 1] if kind == "Q4_1" else -8 * scale
        return cls(nibbles=blocks[..., head:], scale=scale, minimum=minimum)

    def rows(self, order: np.ndarray) -> Q4Blocks:
        """Return the rows in another order."""
        return Q4Blocks(
            nibbles=self.nibbles[order], scale=self.scale[order], minimum=self.minimum[order]
        )

    @classmethod
    def stack(cls, parts: Sequence[Q4Blocks]) -> Q4Blocks:
        """Return the rows of all parts, one after the other."""
        return cls(
            nibbles=np.concatenate([p.nibbles for p in parts]),
            scale=np.concatenate([p.scale for p in parts]),
            minimum=np.concatenate([p.minimum for p in parts]),
        )

    def dense(self) -> Tensor:
        """Return float32 weights (N, K)."""
        return _unpack(*self.by_column()).T.contiguous()

    def by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return nibbles (K/32, 16, N), scale and minimum (K/32, N), as :func:`_unpack` takes."""
        nibbles = torch.from_numpy(np.ascontiguousarray(self.nibbles.transpose(1, 2, 0)))
        scale, minimum = (
            torch.from_numpy(np.ascontiguousarray(a.T)) for a in (self.scale, self.minimum)
        )
        return nibbles, scale, minimum


class Q4Linear:
    """GGUF 4-bit blocks, not requantised: few rows multiply them as they are.

    The 4-bit kernel takes bfloat16 activations and grows slow with the number of rows; from
    ``wide`` rows on, unpacking the weights for the call and multiplying them densely is faster
    (1.0 ms for 1.8 million weights against 9 ms of product for 130 rows on one thread). Both
    routes round scales, minima and activations to bfloat16, so that a prompt gives nearly the
    same numbers however it is cut into calls.
    """

    def __init__(self, blocks: Q4Blocks, bias: Tensor | None = None) -> None:
        out, groups = blocks.scale.shape
        nibbles = torch.from_numpy(np.ascontiguousarray(blocks.nibbles))
        # The kernel computes (q - 8) * scale + zero.
        scale = torch.from_numpy(np.ascontiguousarray(blocks.scale)).to(torch.bfloat16)
        minimum = torch.from_numpy(np.ascontiguousarray(blocks.minimum))
        zero = (minimum + 8 * scale).to(torch.bfloat16)
        self._scale_zero = torch.stack((scale.T, zero.T), dim=2).contiguous()
        minimum = zero.float() - 8 * scale.float()
        quants = torch.empty(out, groups, 2, BLOCK // 2, dtype=torch.int32)
        quants[:, :, 0] = nibbles & 15
        quants[:, :, 1] = nibbles >> 4
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            quants.view(out, groups * BLOCK), 1
        )
        rounded = Q4Blocks(
            nibbles=blocks.nibbles, scale=scale.float().numpy(), minimum=minimum.numpy()
        )
        self._by_column = rounded.by_column()
        self._bias = bias
        fast_bf16 = _fast_bfloat16()
        self._wide_dtype = torch.bfloat16 if fast_bf16 else torch.float32
        self._wide = 64 if fast_bf16 else 16

    @staticmethod
    def fits(out: int, width: int) -> bool:
        """Whether the kernel takes weights of this shape."""
        return out % 16 == 0 and width % BLOCK == 0

    def __call__(self, x: Tensor) -> Tensor:
        rounded = x.to(torch.bfloat16).contiguous()
        if x.shape[0] < self._wide:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rounded, self._packed, BLOCK, self._scale_zero
            )
        else:
            weight = _unpack(*self._by_column, reuse=True).to(self._wide_dtype)
            y = (rounded.to(self._wide_dtype) @ weight).to(torch.bfloat16)
        y = y.to(x.dtype)
        return y if self._bias is None else y + self._bias


class Padded:
    """A projection that always multiplies a multiple of ``unit`` rows, zeros after the real ones.

    Matrix kernels handle the last few rows in another order of summation than full groups of
    rows; with whole groups only, a row's result does not depend on how many others there are.
    """

    def __init__(self, linear: Linear, unit: int) -> None:
        self._linear, self._unit = linear, unit

    def __call__(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        rest = -count % self._unit
        if rest == 0:
            return self._linear(x)
        return self._linear(F.pad(x, (0, 0, 0, rest)))[:count]


def row_unit(linear: Linear, width: int) -> int | None:
    """Return the smallest number of rows whose multiples give a row the same bits, if any does.

    Parameters
    ----------
    linear : (T, width) to (T, N)
    """
    x = torch.randn(_UNIT_ROWS, width, generator=torch.Generator().manual_seed(0))
    whole = linear(x)
    for unit in _UNITS:
        counts = range(unit, _UNIT_ROWS + 1, unit)
        if all(torch.equal(linear(x[:n]), whole[:n]) for n in counts):
            return unit
    return None


_scratch = threading.local()


def _unpack(nibbles: Tensor, scale: Tensor, minimum: Tensor, *, reuse: bool = False) -> Tensor:
    """Return float32 weights (K, N): transposed, so that scales are multiplied along whole rows.

    Parameters
    ----------
    nibbles : uint8 (K/32, 16, N)
    scale, minimum : float32 (K/32, N)
    reuse : bool
        Write into memory of this thread that the next such call overwrites: fresh pages for each
        call cost as much as the arithmetic.
    """
    groups, half, out = nibbles.shape
    count = groups * BLOCK * out
    if reuse:
        if getattr(_scratch, "size", 0) < count:
            _scratch.size = count
            _scratch.weight = torch.empty(count)
            _scratch.half = torch.empty(count // 2, dtype=torch.uint8)
        weight, part = _scratch.weight[:count], _scratch.half[: count // 2]
    else:
        weight, part = torch.empty(count), torch.empty(count // 2, dtype=torch.uint8)
    weight, part = weight.view(groups, BLOCK, out), part.view(nibbles.shape)
    # Converting and multiplying apart is faster than a product of mixed dtypes.
    weight[:, :half].copy_(torch.bitwise_and(nibbles, 15, out=part))
    weight[:, half:].copy_(torch.bitwise_right_shift(nibbles, 4, out=part))
    weight.mul_(scale[:, None]).add_(minimum[:, None])
    return weight.view(groups * BLOCK, out)


def _fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX-512 BF16, AMX)."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())
