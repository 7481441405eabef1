"""Weights as mlx arrays: safetensors folders, and GGUF files read without conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from steersman.core.errors import InvalidInput

from ..files.hf_folder import weight_files

Weights = dict[str, mx.array]


def load_folder(folder: Path) -> Weights:
    """Return the tensors of a Hugging Face folder's safetensors files, not read yet.

    Raises
    ------
    MissingFile, InvalidInput
        There are none, one is damaged, or only pickled weights are there.
    """
    weights: Weights = {}
    for file in (folder / name for name in weight_files(folder)):
        try:
            tensors: Any = mx.load(str(file), format="safetensors")
            weights.update(tensors)
        except (RuntimeError, ValueError) as error:
            raise InvalidInput(f"{file}: not a usable safetensors file ({error})") from None
    return weights


def quantised_names(weights: Mapping[str, mx.array]) -> list[str]:
    """Return the parameters that stand as weight, scales and biases."""
    return [name[: -len(".scales")] for name in weights if name.endswith(".scales")]


def widen_scales(weights: Weights) -> None:
    """Make scales and biases float32, in place: with half-precision ones logits are 0.03 off."""
    for name in quantised_names(weights):
        for part in (f"{name}.scales", f"{name}.biases"):
            weights[part] = weights[part].astype(mx.float32)


def dequantise(weights: Weights, group: int) -> None:
    """Replace every quantised triple by its float32 matrix, in place.

    Parameters
    ----------
    weights : dict
    group : int
        Weights that share one scale.
    """
    for name in quantised_names(weights):
        packed, scales = weights[f"{name}.weight"], weights.pop(f"{name}.scales")
        weights[f"{name}.weight"] = mx.dequantize(
            packed,
            scales.astype(mx.float32),
            weights.pop(f"{name}.biases").astype(mx.float32),
            group_size=group,
            bits=bits_of(packed, scales, group),
        )


def bits_of(packed: mx.array, scales: mx.array, group: int) -> int:
    """Return the bits per weight of a triple (packed into uint32 words)."""
    return int(packed.shape[-1] * 32 // (scales.shape[-1] * group))


def quantise_like(net: nn.Module, weights: Mapping[str, mx.array], group: int) -> None:
    """Give ``net`` quantised layers wherever ``weights`` hold a triple."""

    def params(path: str, module: nn.Module) -> bool | dict[str, Any]:
        scales = weights.get(f"{path}.scales")
        if scales is None or not hasattr(module, "to_quantized"):
            return False
        return {
            "group_size": group,
            "bits": bits_of(weights[f"{path}.weight"], scales, group),
            "mode": "affine",
        }

    nn.quantize(net, group_size=group, bits=4, class_predicate=params)


def evaluate(net: nn.Module) -> None:
    """Compute every array of a model now.

    Also those that are no parameters (RoPE frequencies): a lazy array could not be used from
    another thread than the one that made it.
    """
    arrays = [net.parameters()]
    for _, module in net.named_modules():
        arrays.extend(v for v in [*module.values(), *vars(module).values()] if _is_array(v))
    mx.eval(arrays)


def _is_array(value: Any) -> bool:
    return isinstance(value, mx.array)
