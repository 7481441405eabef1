"""Building the native step's layers from a folder, with weights stored as the dtype says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steersman.core.errors import InvalidInput
from steersman.core.locate import ModelSource
from steersman.core.model import ModelInfo, Tokenizer

from ..files.gguf import GGUFHeader, raw_tensor, read_header
from .config import LlamaConfig
from .linear import Dense, HalfStored, Linear, Padded, Q4Blocks, Q4Linear, row_unit
from .native import Layer, NativeModel
from .weights import Weights

# Names in a GGUF file of the projections of one block.
_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_Q4 = ("Q4_0", "Q4_1")


def build_native(
    source: ModelSource,
    folder: Path,
    config: LlamaConfig,
    info: ModelInfo,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    kept: Sequence[int] | None = None,
    strict: bool = False,
) -> NativeModel:
    """Read the weights of ``folder`` and return the native model, of the kept layers alone.

    Raises
    ------
    InvalidInput
        A tensor is missing or has another shape than ``config.json`` says.
    """
    builder = _Builder(source, folder, config, info.dtype, device, strict=strict)
    try:
        return builder.model(info, tokenizer, range(config.layers) if kept is None else kept)
    except OverflowError as error:
        raise InvalidInput(f"{folder}: --dtype float16: {error}; use float32") from None


class _Builder:
    def __init__(
        self,
        source: ModelSource,
        folder: Path,
        config: LlamaConfig,
        dtype: str,
        device: torch.device,
        *,
        strict: bool,
    ) -> None:
        self.strict = strict
        self.unit: int | None = None
        self.weights = Weights(folder)
        self.config = config
        self.device = device
        self.half = HalfStored.supported() and device.type == "cpu"
        self.dtype = dtype
        on_cpu = device.type == "cpu"
        # float16 and q4 on CPU store weights small and compute in float32.
        self.compute = (
            torch.float32 if on_cpu and dtype in ("float16", "q4") else getattr(torch, dtype)
        )
        self.gguf = read_header(source.path) if dtype == "q4" else None
        if self.gguf is not None and not any(
            t.type_name in _Q4 for t in self.gguf.tensors.values()
        ):
            kinds = sorted({t.type_name for t in self.gguf.tensors.values()})
            raise InvalidInput(
                f"{source.path}: --dtype q4: no Q4_0 or Q4_1 blocks (it has {', '.join(kinds)}); "
                "use float32 or bfloat16"
            )

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.compute)

    def _vector(self, name: str, size: int) -> Tensor:
        return self._place(self.weights.get(name, size))

    def _optional(self, name: str, size: int) -> Tensor | None:
        return self._vector(name, size) if name in self.weights else None

    def _store(self, weight: Callable[[], Tensor], bias: Tensor | None = None) -> Linear:
        """Return a projection with its weights stored as the dtype asks."""
        linear = self._stored(weight, bias)
        if not self.strict:
            return linear
        if self.unit is None:
            self.unit = row_unit(linear, weight().shape[1]) or 1
        return Padded(linear, self.unit)

    def _stored(self, weight: Callable[[], Tensor], bias: Tensor | None) -> Linear:
        if self.dtype in ("float16", "q4") and self.half:
            return HalfStored(weight(), bias)
        if self.dtype == "q4":  # no FBGEMM: bfloat16 weights, activations cast for the product
            return _Cast(Dense(weight().to(torch.bfloat16), bias), self.compute)
        return Dense(self._place(weight()).contiguous(), bias)

    def _linear(self, layer: int, parts: dict[str, int], width: int) -> Linear:
        """Fuse projections of the same input into one; ``parts`` maps names to output sizes."""
        prefix = f"model.layers.{layer}."

        def stacked() -> Tensor:
            weights = [self.weights.get(f"{prefix}{p}.weight", n, width) for p, n in parts.items()]
            return weights[0] if len(weights) == 1 else torch.cat([self._place(w) for w in weights])

        biases = [self._optional(f"{prefix}{p}.bias", n) for p, n in parts.items()]
        bias = None
        if any(b is not None for b in biases):
            pairs = zip(biases, parts.values())
            zero = torch.zeros((), device=self.device, dtype=self.compute)
            bias = torch.cat([zero.expand(n) if b is None else b for b, n in pairs])
        if self.gguf is not None:
            blocks = self._blocks(self.gguf, layer, parts, width)
            if blocks is not None:
                return Q4Linear(blocks, bias)
        return self._store(stacked, bias)

    def _blocks(
        self, header: GGUFHeader, layer: int, parts: dict[str, int], width: int
    ) -> Q4Blocks | None:
        """Return the file's own 4-bit blocks, or None when a part is stored otherwise."""
        if not Q4Linear.fits(sum(parts.values()), width):
            return None
        out = []
        for part, size in parts.items():
            name = f"blk.{layer}.{_GGUF[part]}.weight"
            info = header.tensors.get(name)
            if info is None or info.type_name not in _Q4:
                return None
            if info.shape != (size, width):
                raise InvalidInput(
                    f"{header.path}: tensor {name!r} has shape {info.shape}, expected "
                    f"{(size, width)}"
                )
            blocks = Q4Blocks.read(raw_tensor(header, name), info.type_name)
            if header.architecture == "llama" and part.endswith(("q_proj", "k_proj")):
                blocks = blocks.rows(_half_split_order(size, self.config.head_size))
            out.append(blocks)
        return Q4Blocks.stack(out)

    def _layer(self, i: int) -> Layer:
        config = self.config
        query, key = config.heads * config.head_size, config.kv_heads * config.head_size
        prefix = f"model.layers.{i}."
        return Layer(
            attention_norm=self._vector(prefix + "input_layernorm.weight", config.width),
            qkv=self._linear(
                i,
                {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key},
                config.width,
            ),
            q_norm=self._optional(prefix + "self_attn.q_norm.weight", config.head_size),
            k_norm=self._optional(prefix + "self_attn.k_norm.weight", config.head_size),
            out=self._linear(i, {"self_attn.o_proj": config.width}, query),
            mlp_norm=self._vector(prefix + "post_attention_layernorm.weight", config.width),
            gate_up=self._linear(
                i, {"mlp.gate_proj": config.inner, "mlp.up_proj": config.inner}, config.width
            ),
            down=self._linear(i, {"mlp.down_proj": config.width}, config.inner),
        )

    def model(self, info: ModelInfo, tokenizer: Tokenizer, kept: Sequence[int]) -> NativeModel:
        config = replace(self.config, layers=len(kept))
        shape = (config.vocab_size, config.width)
        embedding = self.weights.get("model.embed_tokens.weight", *shape)
        head = embedding if config.tied else self.weights.get("lm_head.weight", *shape)
        small = self.dtype in ("float16", "q4") and self.device.type == "cpu"
        table = embedding.to(torch.float16) if small else self._place(embedding)
        if config.tied and not small:
            head = table  # one copy on the device
        return NativeModel(
            info,
            tokenizer,
            self.device,
            self.compute,
            config=config,
            embedding=table,
            layers=[self._layer(i) for i in kept],
            norm=self._vector("model.norm.weight", config.width),
            project=self._store(lambda: head),
            strict=self.strict,
        )


class _Cast:
    """A projection in bfloat16 between activations of another dtype."""

    def __init__(self, linear: Dense, dtype: torch.dtype) -> None:
        self._linear, self._dtype = linear, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x.to(torch.bfloat16)).to(self._dtype)


def _half_split_order(rows: int, head_size: int) -> np.ndarray:
    """Return which row of a GGUF q or k projection each of our rows is.

    Files of architecture ``llama`` interleave the two halves that a rotation pairs.
    """
    order = np.arange(rows).reshape(-1, head_size // 2, 2).swapaxes(1, 2)
    return np.ascontiguousarray(order).reshape(-1)
