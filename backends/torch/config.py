"""The Llama family's ``config.json``, and whether the native step can compute it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steersman.core.errors import InvalidInput

NATIVE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LIMIT = 1 << 24  # no width, layer count or context is larger


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shapes and constants of a Llama-like decoder.

    Attributes
    ----------
    inner : int
        Width of the MLP.
    rope : mapping
        ``rope_theta``, ``rope_type`` and the numbers that type needs.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    context: int
    eps: float
    tied: bool
    rope: Mapping[str, Any]

    def frequencies(self) -> torch.Tensor:
        """Return the angle per position of each pair of dimensions, float32 (head_size / 2,).

        References
        ----------
        Su et al., "RoFormer", arXiv:2104.09864; type "llama3": Grattafiori et al., "The Llama 3
        Herd of Models", arXiv:2407.21783 and its released code.
        """
        exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size
        inverse = 1.0 / (self.rope["rope_theta"] ** exponent)
        kind = self.rope["rope_type"]
        if kind == "linear":
            return inverse / self.rope["factor"]
        if kind == "llama3":
            old = self.rope["original_max_position_embeddings"]
            low, high = self.rope["low_freq_factor"], self.rope["high_freq_factor"]
            turns = old * inverse / (2 * math.pi)  # whole turns over the original context
            mix = ((turns - low) / (high - low)).clamp(0, 1)
            return (1 - mix) * inverse / self.rope["factor"] + mix * inverse
        return inverse


class Keys:
    """Typed look-ups in a ``config.json`` with errors that name file and key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of sensible size."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < _LIMIT:
            raise InvalidInput(f"{self.path}: {key}: expected a positive integer, found {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
            raise InvalidInput(f"{self.path}: {key}: expected a positive number, found {value!r}")
        return float(value)  # type: ignore[arg-type]


def architecture(path: Path, values: Mapping[str, Any]) -> str:
    """Return the first of ``architectures``."""
    names = values.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise InvalidInput(f"{path}: architectures: expected a list of names, found {names!r}")


def why_not_native(values: Mapping[str, Any]) -> str | None:
    """Return why the native step cannot compute this model; None when it can."""
    name = (values.get("architectures") or [""])[0]
    if name not in NATIVE:
        return f"architecture {name} is not of the Llama family"
    # Mistral's window is 4096 where the key is absent; Qwen's counts only when switched on.
    if name.startswith("Mistral") and values.get("sliding_window", 4096) is not None:
        return "it uses a sliding window"
    if name.startswith("Qwen") and values.get("use_sliding_window", False):
        return "it uses a sliding window"
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        return "not all of its layers use full attention"
    if values.get("hidden_act", "silu") != "silu":
        return f"activation {values['hidden_act']!r}"
    kind = _rope(values).get("rope_type")
    if kind not in ("default", "linear", "llama3"):
        return f"rope type {kind!r}"
    partial = _rope(values).get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        return "rotary embedding on part of the head"
    if values.get("quantization_config") is not None:
        return "its weights are quantised"
    return None


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope parameters in transformers 5 form, from that form or from the older one."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(key), dict):
            rope.update(values[key])
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    return rope


def read_config(path: Path, values: Mapping[str, Any]) -> LlamaConfig:
    """Check ``config.json`` of a model that ``why_not_native`` has no objection to.

    Raises
    ------
    InvalidInput
        A key is missing or makes no sense.
    """
    keys = Keys(path, values)
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads", heads)
    qwen3 = architecture(path, values).startswith("Qwen3")
    head_size = keys.integer("head_dim", 128 if qwen3 else max(1, width // heads))
    if heads % kv_heads:
        raise InvalidInput(f"{path}: {heads} heads cannot share {kv_heads} key/value heads")
    if head_size % 2:
        raise InvalidInput(f"{path}: head_dim: {head_size} is odd, rotary embedding needs pairs")
    rope = _rope(values)
    needed = {
        "default": ("rope_theta",),
        "linear": ("rope_theta", "factor"),
        "llama3": (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }[rope["rope_type"]]
    numbers = Keys(path, rope)
    return LlamaConfig(
        layers=keys.integer("num_hidden_layers"),
        width=width,
        inner=keys.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=keys.integer("vocab_size"),
        context=keys.integer("max_position_embeddings"),
        eps=keys.number("rms_norm_eps", 1e-6),
        tied=bool(values.get("tie_word_embeddings", False)),
        rope={"rope_type": rope["rope_type"], **{key: numbers.number(key) for key in needed}},
    )
