"""The model families that are supported, and how their config.json maps to mlx-lm's arguments.

mlx-lm takes from a config the keys it knows and silently falls back to its own defaults for the
rest. Where a key has moved (transformers 5 keeps the RoPE base inside ``rope_parameters``) that
gives a model that talks fluently and is wrong. So a config is first rewritten into the older
spelling, and what mlx-lm made of it is compared with what the config said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steersman.core.errors import InvalidInput, did_you_mean

# Rotary embeddings whose frequencies do not depend on how long the text is.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of mlx-lm.

    Attributes
    ----------
    module : str
        Module of mlx_lm.models with ``Model`` and ``ModelArgs``.
    attention : str
        Module that defines the attention class.
    defaults : mapping
        What transformers assumes where config.json is silent (mlx-lm's defaults differ).
    required : mapping of key to accepted values
        Keys whose other values mlx-lm would ignore.
    window : str or None
        Key that switches a sliding window on which mlx-lm does not compute; the context is then
        limited to the window, inside which the two are the same.
    """

    module: str
    attention: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    window: str | None = None


_SILU = {"hidden_act": ("silu", "swish", None)}
_UNTIED = {"tie_word_embeddings": False, "rope_theta": 10000.0}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(module="llama", attention="llama", defaults=_UNTIED, required=_SILU),
    "mistral": Family(
        module="llama",
        attention="llama",
        defaults=_UNTIED,
        required=_SILU,
        window="sliding_window",
    ),
    "qwen2": Family(
        module="qwen2",
        attention="qwen2",
        defaults=_UNTIED,
        required=_SILU,
        window="use_sliding_window",
    ),
    "qwen3": Family(
        module="qwen3",
        attention="qwen3",
        defaults=_UNTIED,
        required=_SILU | {"attention_bias": (False, None)},
        window="use_sliding_window",
    ),
    "smollm3": Family(
        module="smollm3",
        attention="llama",
        defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0},
        required=_SILU,
        window="use_sliding_window",
    ),
    "gemma3_text": Family(
        module="gemma3_text",
        attention="gemma3_text",
        defaults={
            "tie_word_embeddings": True,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        required={
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "attention_bias": (False, None),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
    ),
    "olmo2": Family(module="olmo2", attention="olmo2", defaults=_UNTIED, required=_SILU),
    "granite": Family(
        module="granite",
        attention="granite",
        defaults=_UNTIED | {"attention_bias": False, "mlp_bias": False},
        required=_SILU,
    ),
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.

    Raises
    ------
    InvalidInput
        ``model_type`` is missing, unknown, or comes with a setting that mlx-lm would ignore.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        hint = did_you_mean(str(name), FAMILIES)
        raise InvalidInput(f"{where}: model_type {name!r} is not supported on mlx{hint}")
    family = FAMILIES[name]
    for key, accepted in family.required.items():
        if config.get(key) not in accepted:
            raise InvalidInput(f"{where}: {key} {config[key]!r} is not supported on mlx")
    return family


def mlx_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``config`` in the spelling that mlx-lm reads, with transformers' defaults filled in.

    Raises
    ------
    InvalidInput
        Values contradict each other or mean something that mlx-lm does not compute.
    """
    family = family_of(config, where)
    out = {key: value for key, value in config.items() if value is not None}
    rope = out.pop("rope_parameters", None)
    if rope is not None:
        _unpack_rope(rope, out, where)
    for key, value in family.defaults.items():
        out.setdefault(key, value)
    scaling = out.get("rope_scaling")
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise InvalidInput(f"{where}: rope type {kind!r} is not supported on mlx")
    if float(out.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InvalidInput(f"{where}: partial_rotary_factor is not supported on mlx")
    if family.module == "gemma3_text":
        out["sliding_window_pattern"] = _window_period(out, where)
    return out


def _unpack_rope(rope: Mapping[str, Any], out: dict[str, Any], where: str) -> None:
    """Move ``rope_parameters`` to the keys that transformers 4 used."""
    if "full_attention" in rope:
        layers = dict(rope)
        local = layers.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise InvalidInput(f"{where}: scaled RoPE in sliding layers is not supported on mlx")
        _agree(out, "rope_local_base_freq", local.get("rope_theta"), where)
        rope = layers["full_attention"]
    _agree(out, "rope_theta", rope.get("rope_theta"), where)
    _agree(out, "partial_rotary_factor", rope.get("partial_rotary_factor"), where)
    rest = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_theta", "partial_rotary_factor") and value is not None
    }
    if rest.get("rope_type", "default") != "default":
        out["rope_scaling"] = rest


def _agree(out: dict[str, Any], key: str, value: Any, where: str) -> None:
    if value is None:
        return
    if key in out and out[key] != value:
        raise InvalidInput(f"{where}: {key} is {out[key]!r} and, in rope_parameters, {value!r}")
    out[key] = value


def _window_period(config: Mapping[str, Any], where: str) -> int:
    """Return the distance of layers with full attention (Gemma 3: 6)."""
    types = config.get("layer_types")
    if types is None:
        period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        return int(period)
    full = [i + 1 for i, kind in enumerate(types) if kind == "full_attention"]
    period = full[0] if full else 0
    expected = [i for i in range(1, len(types) + 1) if period and i % period == 0]
    if not period or full != expected:
        raise InvalidInput(f"{where}: layer_types without a fixed period is not supported on mlx")
    return int(period)


def context_of(config: Mapping[str, Any], where: str) -> int:
    """Return the longest text the model was trained for and that mlx-lm computes rightly."""
    longest = int(config.get("max_position_embeddings", 2048))
    family = family_of(config, where)
    if family.window is not None and config.get(family.window) and config.get("sliding_window"):
        longest = min(longest, int(config["sliding_window"]))
    return longest


def check_args(args: Any, config: Mapping[str, Any], where: str) -> None:
    """Compare what mlx-lm understood with what the config says.

    Raises
    ------
    InvalidInput
        A value differs: computing on would be wrong without an error.
    """
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "sliding_window",
        "sliding_window_pattern",
        "query_pre_attn_scalar",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "no_rope_layers",
        "logits_scaling",
        "attention_multiplier",
        "embedding_multiplier",
        "residual_multiplier",
    ):
        if key in config and hasattr(args, key) and getattr(args, key) != config[key]:
            raise InvalidInput(
                f"{where}: mlx-lm reads {key} as {getattr(args, key)!r}, not {config[key]!r}"
            )
    width = config["hidden_size"] // config["num_attention_heads"]
    if not hasattr(args, "head_dim") and config.get("head_dim", width) != width:
        raise InvalidInput(f"{where}: head_dim {config['head_dim']} is not supported on mlx")


def check_rope(net: Any, config: Mapping[str, Any], where: str) -> None:
    """Compare the bases of the rotary embeddings that were built with the config's.

    Raises
    ------
    InvalidInput
        One differs, or is interleaved.
    """
    for layer in net.model.layers:
        rope = layer.self_attn.rope
        local = getattr(layer.self_attn, "is_sliding", False)
        want = config["rope_local_base_freq" if local else "rope_theta"]
        if getattr(rope, "base", want) != want or getattr(rope, "traditional", False):
            raise InvalidInput(f"{where}: mlx-lm built a RoPE with base {rope.base}, not {want}")
