"""The mlx adapter: its model families against transformers.

What every engine must do is in the contract suite; here is what only this one can get wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx")
pytest.importorskip("mlx_lm")


from steersman.backends.mlx import open_model
from steersman.core.array import to_numpy
from steersman.core.contract import run_contract
from steersman.core.model import Forward

from ..tiny_torch import tokens
from .mlx_support import EVERYTHING, Opener, changed, close, fresh

FAMILIES = (
    "llama",
    "llama-base",
    "llama3-rope",
    "linear-rope",
    "yarn-rope",
    "mistral",
    "qwen2",
    "qwen2-base",
    "qwen3",
    "smollm3",
    "gemma3",
    "olmo2",
    "granite",
)


# -- the right numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_transformers(
    name: str, tiny_folder: Callable[[str], Path], opened: Opener
) -> None:
    import torch
    import transformers

    ids = tokens(40)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder(name), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        want = module(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    model = opened(name)
    layers = model.info.layers
    with model.session(needs=EVERYTHING) as session:
        got = session.forward(
            Forward(
                keep=0,
                tokens=[ids],
                logits="all",
                hidden=tuple(range(layers + 1)),
                attentions=tuple(range(layers)),
            )
        )
    close(got.logits, want.logits)
    assert float(want.logits.abs().max()) > 1  # the comparison is of numbers that matter
    for i in range(layers):
        close(got.hidden[i], want.hidden_states[i])
        close(got.attentions[i], want.attentions[i])
    close(model.norm(got.hidden[layers]), want.hidden_states[layers])
    np.testing.assert_array_equal(to_numpy(model.head(got.hidden[layers])), to_numpy(got.logits))


def test_the_rope_base_decides(
    tiny_folder: Callable[[str], Path], opened: Opener, tmp_path: Path
) -> None:
    """Guards the test above: a wrong base is far outside its tolerance."""
    other = {"rope_type": "default", "rope_theta": 10000.0}
    source = changed(tiny_folder("llama-base"), tmp_path / "other", rope_parameters=other)
    with open_model(source, threads=1) as model:
        difference = fresh(model, tokens(40)) - fresh(opened("llama-base"), tokens(40))
    assert np.abs(difference).max() > 0.05


def test_older_spelling_of_rope(
    tiny_folder: Callable[[str], Path], opened: Opener, tmp_path: Path
) -> None:
    source = changed(
        tiny_folder("gemma3"),
        tmp_path / "older",
        rope_parameters=None,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        layer_types=None,
        sliding_window_pattern=2,
    )
    with open_model(source, threads=1) as model:
        close(fresh(model, tokens(30)), fresh(opened("gemma3"), tokens(30)), 0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
def test_contract(name: str, opened: Opener) -> None:
    model = opened(name)
    # Random weights: no chat template, and a vocabulary of bytes.
    skip = {"bytes", "vocabulary", "special"}
    from steersman.core.contract import CHECKS

    checks = run_contract(model, length=40, only=set(CHECKS) - skip)
    assert not [c for c in checks if c.result == "failed"]
    assert [c for c in checks if c.result == "passed"]
