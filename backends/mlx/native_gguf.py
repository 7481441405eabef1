"""GGUF files that mlx reads by itself: no conversion, and 4- or 8-bit blocks stay as they are.

``mx.load`` understands float tensors and the blocks Q4_0, Q4_1 and Q8_0; it fails on a file that
has any other, and such files go through the converted folder. Config, names and what llama.cpp
does to the values come from the same plan as the conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from steersman.core.errors import InvalidInput

from ..files.architectures import ModelPlan, TensorPlan
from ..files.gguf import GGUFHeader

GROUP = 32  # weights per block in all three formats
_FLOATS = frozenset({"F32", "F16"})
_BLOCKS = frozenset({"Q4_0", "Q4_1", "Q8_0"})


def readable(header: GGUFHeader) -> bool:
    """Whether ``mx.load`` reads every tensor of this file."""
    return all(
        info.type_name in _FLOATS or (info.type_name in _BLOCKS and len(info.shape) == 2)
        for info in header.tensors.values()
    )


def tensors(header: GGUFHeader, plan: ModelPlan) -> dict[str, mx.array]:
    """Return the weights by their Hugging Face names; blocks as weight, scales and biases.

    Raises
    ------
    InvalidInput
        mlx cannot read the file after all.
    """
    try:
        loaded: Any = mx.load(str(header.path), format="gguf")
    except (RuntimeError, ValueError) as error:
        raise InvalidInput(f"{header.path}: not a usable GGUF file ({error})") from None
    out: dict[str, mx.array] = {}
    for name, tensor in plan.tensors.items():
        change = _change(tensor)
        out[name] = change(_take(loaded, tensor.source, header))
        if header.tensors[tensor.source].type_name in _BLOCKS:
            for part in ("scales", "biases"):
                source = f"{tensor.source.removesuffix('.weight')}.{part}"
                out[f"{name.removesuffix('.weight')}.{part}"] = change(
                    _take(loaded, source, header)
                )
    return out


def _take(loaded: dict[str, mx.array], name: str, header: GGUFHeader) -> mx.array:
    if name not in loaded:
        raise InvalidInput(f"{header.path}: mlx finds no tensor {name!r}")
    return loaded[name]


def _change(tensor: TensorPlan) -> Callable[[mx.array], mx.array]:
    """Return what undoes llama.cpp's change; rows stay whole, so packed ones are fine too."""
    if tensor.change == "minus one":
        return lambda values: values - 1
    if tensor.change == "unpermute":
        heads = tensor.heads

        def unpermute(rows: mx.array) -> mx.array:
            half = rows.shape[0] // heads // 2
            return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)

        return unpermute
    return lambda values: values
