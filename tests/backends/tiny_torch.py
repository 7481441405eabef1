"""Tiny Hugging Face folders with random weights: every architecture in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from steersman.core.locate import ModelSource

VOCABULARY = 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# The base is far from mlx-lm's default of 10,000: a model that misses it is wrong everywhere.
_ROPE = {"rope_type": "default", "rope_theta": 1234.0}
# Architecture -> transformers' config class and what is special about it.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3-rope": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "linear-rope": (
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": False}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY},
    ),
    "llama-base": ("LlamaConfig", {"rope_parameters": _ROPE}),
    "yarn-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2-base": ("Qwen2Config", {"rope_parameters": _ROPE, "use_sliding_window": False}),
    "smollm3": ("SmolLM3Config", {"use_sliding_window": False, "no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2Config", {"rope_parameters": _ROPE}),
    "granite": (
        "GraniteConfig",
        {
            "logits_scaling": 2.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
}


def write_tiny(name: str, folder: Path) -> Path:
    """Save a random model of ``ARCHITECTURES[name]`` with a byte tokenizer; return the folder."""
    import torch
    import transformers

    kind, special = ARCHITECTURES[name]
    shape = SHAPE if kind != "GPT2Config" else {"bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, kind)(**{**shape, **special})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Large enough that attention is far from uniform and biases and norms matter.
            noise = torch.randn(parameter.shape, generator=torch.manual_seed(len(key)))
            scale = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(noise * scale + (parameter if parameter.ndim == 1 else 0))
    model.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer: two control tokens, 256 bytes, and fillers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<bos>", "<eos>", *alphabet]
    names += [f"<unused{i}>" for i in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>"), AddedToken("<eos>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"})
    )


def hf_source(folder: Path) -> ModelSource:
    """Return where such a folder is."""
    return ModelSource(name=folder.name, kind="hf", path=folder)


def tokens(count: int, seed: int = 0) -> list[int]:
    """Return random ids of real bytes."""
    return [int(i) for i in np.random.default_rng(seed).integers(2, 258, count)]
