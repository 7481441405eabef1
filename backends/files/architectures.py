"""From a GGUF header to a Hugging Face config and a plan of tensors, per architecture.

Three things differ between the two formats: names, the row order of llama's query and key
projections (GGUF interleaves the two halves of a rotated head), and Gemma's norms (GGUF stores
``1 + weight``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from steersman.core.errors import InvalidInput, UsageError

from .gguf import GGUFHeader, read_tensor

Change = Literal["", "unpermute", "minus one"]


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """One output tensor: which GGUF tensor it comes from and what is undone."""

    source: str
    shape: tuple[int, ...]
    change: Change = ""
    heads: int = 0

    def read(self, header: GGUFHeader) -> npt.NDArray[np.float32]:
        """Return the float32 values in Hugging Face's order."""
        values = read_tensor(header, self.source)
        if self.change == "minus one":
            values -= 1
        elif self.change == "unpermute":
            half = values.shape[0] // self.heads // 2
            parts = values.reshape(self.heads, half, 2, -1).swapaxes(1, 2)
            values = np.ascontiguousarray(parts).reshape(values.shape)
        return values

    def restore(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return values in Hugging Face's order as GGUF keeps them: the inverse of ``read``."""
        if self.change == "minus one":
            return values + 1
        if self.change == "unpermute":
            half = values.shape[0] // self.heads // 2
            parts = values.reshape(self.heads, 2, half, -1).swapaxes(1, 2)
            return np.ascontiguousarray(parts).reshape(values.shape)
        return values


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """``config.json`` and the tensors of ``model.safetensors``, by their Hugging Face names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorPlan]


@dataclass
class _Draft:
    """Collects a plan and checks every shape on the way."""

    header: GGUFHeader
    tensors: dict[str, TensorPlan] = field(default_factory=dict)

    def add(self, name: str, source: str, shape: tuple[int, ...], **change: Any) -> None:
        found = self.header.tensors.get(source)
        if found is None:
            raise InvalidInput(f"{self.header.path}: tensor {source!r} is missing")
        if found.shape != shape:
            raise InvalidInput(
                f"{self.header.path}: tensor {source!r} has shape {found.shape}, "
                f"the metadata say {shape}"
            )
        self.tensors[name] = TensorPlan(source=source, shape=shape, **change)

    def has(self, source: str) -> bool:
        return source in self.header.tensors


def plan_model(header: GGUFHeader) -> ModelPlan:
    """Return config and tensor plan of a GGUF model.

    Raises
    ------
    UsageError
        The architecture, or a variant of it, is opened only by the llamacpp backend.
    InvalidInput
        Metadata and tensors contradict each other.
    """
    name = header.architecture
    if name not in _ARCHITECTURES:
        raise UsageError(
            f"{header.path}: architecture {name!r} is opened only by the llamacpp backend; "
            f"use --backend llamacpp (torch and mlx open {', '.join(sorted(_ARCHITECTURES))})"
        )
    if not header.tensors:
        raise InvalidInput(f"{header.path}: holds a vocabulary but no weights")
    draft = _Draft(header)
    config = _ARCHITECTURES[name](header, draft)
    unused = set(header.tensors) - {plan.source for plan in draft.tensors.values()}
    unused.discard("rope_freqs.weight")
    if unused:
        raise UsageError(
            f"{header.path}: this variant of {name} has tensors that torch and mlx do not know "
            f"({min(unused)}); use --backend llamacpp"
        )
    return ModelPlan(config=config, tensors=draft.tensors)


def _key(header: GGUFHeader, name: str) -> str:
    return f"{header.architecture}.{name}"


def _positive(header: GGUFHeader, name: str, default: int | None = None) -> int:
    key = _key(header, name)
    value = header.get(key, int, default)
    if value is None or not 0 < value < 1 << 31:
        raise InvalidInput(f"{header.path}: {key}: expected a positive number, found {value}")
    return int(value)


def _real(header: GGUFHeader, name: str, default: float) -> float:
    value = header.get(_key(header, name), (float, int))
    if value is None:
        return default
    # The file holds a float32; its shortest decimal form is the number that was meant.
    return float(str(np.float32(value)))


def _decoder(
    header: GGUFHeader, draft: _Draft, *, norms: Mapping[str, str], **how: Any
) -> dict[str, Any]:
    """Plan the parts that all supported architectures share; return the common config keys."""
    width = _positive(header, "embedding_length")
    layers = _positive(header, "block_count")
    heads = _positive(header, "attention.head_count")
    kv_heads = _positive(header, "attention.head_count_kv", heads)
    head_dim = _positive(header, "attention.key_length", max(1, width // heads))
    inner = _positive(header, "feed_forward_length")
    if _positive(header, "attention.value_length", head_dim) != head_dim:
        raise UsageError(f"{header.path}: keys and values differ in width; use --backend llamacpp")
    if _positive(header, "rope.dimension_count", head_dim) != head_dim:
        raise UsageError(f"{header.path}: heads are rotated in part; use --backend llamacpp")
    if header.get(_key(header, "expert_count"), int, 0):
        raise UsageError(f"{header.path}: mixture of experts; use --backend llamacpp")
    if layers > 1024:
        raise InvalidInput(f"{header.path}: {layers} layers")
    embedding = header.tensors.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding is not None else 0
    norm: dict[str, Any] = {"change": how["norm"]} if "norm" in how else {}
    draft.add("model.embed_tokens.weight", "token_embd.weight", (vocab, width))
    draft.add("model.norm.weight", "output_norm.weight", (width,), **norm)
    tied = not draft.has("output.weight")
    if not tied:
        draft.add("lm_head.weight", "output.weight", (vocab, width))
    for i in range(layers):
        here, there = f"model.layers.{i}.", f"blk.{i}."
        for hf, gguf, rows, columns, count in (
            ("self_attn.q_proj", "attn_q", heads * head_dim, width, heads),
            ("self_attn.k_proj", "attn_k", kv_heads * head_dim, width, kv_heads),
            ("self_attn.v_proj", "attn_v", kv_heads * head_dim, width, 0),
            ("self_attn.o_proj", "attn_output", width, heads * head_dim, 0),
            ("mlp.gate_proj", "ffn_gate", inner, width, 0),
            ("mlp.up_proj", "ffn_up", inner, width, 0),
            ("mlp.down_proj", "ffn_down", width, inner, 0),
        ):
            change: dict[str, Any] = {}
            if how.get("permuted") and count:
                change = {"change": "unpermute", "heads": count}
            draft.add(f"{here}{hf}.weight", f"{there}{gguf}.weight", (rows, columns), **change)
            if draft.has(f"{there}{gguf}.bias"):
                draft.add(f"{here}{hf}.bias", f"{there}{gguf}.bias", (rows,), **change)
        for hf, gguf in norms.items():
            size = head_dim if hf.startswith("self_attn") else width
            draft.add(f"{here}{hf}.weight", f"{there}{gguf}.weight", (size,), **norm)
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _positive(header, "context_length"),
        "rms_norm_eps": _real(header, "attention.layer_norm_rms_epsilon", 1e-6),
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _rope(header: GGUFHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the rotary parameters in the form that transformers 5 and mlx-lm both read."""
    kind = header.get(_key(header, "rope.scaling.type"), str, "none")
    factors = header.tensors.get("rope_freqs.weight")
    if factors is not None and kind in ("none", ""):
        return {"rope_theta": theta, **_llama3_rope(header, theta, head_dim)}
    if kind in ("none", ""):
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear" and factors is None:
        factor = _real(header, "rope.scaling.factor", 1.0)
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    raise UsageError(
        f"{header.path}: rope scaling {kind!r} is known only to the llamacpp backend; "
        "use --backend llamacpp"
    )


def _llama3_rope(header: GGUFHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from the table of factors that the file holds instead.

    The published models share all parameters but the factor, which is the table's largest entry;
    the table computed from them must equal the one in the file.
    """
    table = read_tensor(header, "rope_freqs.weight").reshape(-1)
    factor, low, high, context = float(table.max()), 1.0, 4.0, 8192
    rates = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    waves = 2 * math.pi / rates
    smooth = (context / waves - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(
        waves < context / high, 1.0, np.where(waves > context / low, factor, middle)
    )
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-4):
        raise UsageError(
            f"{header.path}: this table of rope factors is known only to the llamacpp backend; "
            "use --backend llamacpp"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _with_rope(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 reads rope_parameters; mlx-lm's llama reads rope_theta and rope_scaling, and
    # takes 10,000 without a word when rope_theta is missing.
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": rope,
    }


_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def _llama(header: GGUFHeader, draft: _Draft) -> dict[str, Any]:
    config = _decoder(header, draft, norms=_NORMS, permuted=True)
    theta = _real(header, "rope.freq_base", 10_000.0)
    biased = any(name.endswith("attn_q.bias") for name in header.tensors)
    return _with_rope(config, _rope(header, theta, config["head_dim"])) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": biased,
        "mlp_bias": False,
    }


def _qwen2(header: GGUFHeader, draft: _Draft) -> dict[str, Any]:
    config = _decoder(header, draft, norms=_NORMS)
    theta = _real(header, "rope.freq_base", 10_000.0)
    return _with_rope(config, _rope(header, theta, config["head_dim"])) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen3(header: GGUFHeader, draft: _Draft) -> dict[str, Any]:
    config = _decoder(header, draft, norms=_NORMS | _QK_NORMS)
    theta = _real(header, "rope.freq_base", 10_000.0)
    return _with_rope(config, _rope(header, theta, config["head_dim"])) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _gemma3(header: GGUFHeader, draft: _Draft) -> dict[str, Any]:
    norms = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    config = _decoder(header, draft, norms=norms | _QK_NORMS, norm="minus one")
    if header.get(_key(header, "final_logit_softcapping"), float, 0.0):
        raise UsageError(f"{header.path}: soft-capped logits; use --backend llamacpp")
    rope = _rope(header, _real(header, "rope.freq_base", 1_000_000.0), config["head_dim"])
    local = _real(header, "rope.freq_base_swa", 10_000.0)
    layers, period = config["num_hidden_layers"], 6
    kinds = ("sliding_attention", "full_attention")
    # Only the 27B model (62 layers) scales queries by the width per head.
    scalar = config["head_dim"]
    if layers == 62:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return _with_rope(config, rope) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": _positive(header, "attention.sliding_window", 512),
        "sliding_window_pattern": period,
        "layer_types": [kinds[(i + 1) % period == 0] for i in range(layers)],
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "attention_bias": False,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }


_ARCHITECTURES: Mapping[str, Callable[[GGUFHeader, _Draft], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}
