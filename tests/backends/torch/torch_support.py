"""What the tests of the torch adapter share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from steersman.core.model import Capability, Model

EVERYTHING = ~Capability.NONE
# One model per way of computing; the window of 8 is crossed by every test.
WAYS = (("llama", "native"), ("qwen3", "native"), ("gemma3", "hf"), ("mistral-window", "hf"))
Opener = Callable[..., Model]


def reference(folder: Path, ids: list[int], **options: Any) -> Any:
    """Run transformers by itself, with eager attention."""
    import torch
    import transformers

    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    norms: list[Any] = []
    decoder = module.get_decoder()
    norm = getattr(decoder, "norm", None) or decoder.ln_f
    norm.register_forward_pre_hook(lambda _, args: norms.append(args[0]))
    with torch.no_grad():
        out = module(
            torch.tensor([ids]), output_hidden_states=True, output_attentions=True, **options
        )
    # transformers' last hidden state is after the final norm; ours is before it.
    return out.logits[0], [*out.hidden_states[:-1], norms[0]], out.attentions


def everything(model: Model) -> dict[str, Any]:
    layers = model.info.layers
    return {
        "logits": "all",
        "hidden": tuple(range(layers + 1)),
        "attentions": tuple(range(layers)),
    }


def same(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance
