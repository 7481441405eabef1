"""What the mlx adapter refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx")
pytest.importorskip("mlx_lm")

import mlx.core as mx

from steersman.backends.mlx import families, open_model
from steersman.core.errors import InvalidInput, MissingDependency, UsageError
from steersman.core.model import Forward

from ..tiny_torch import hf_source
from .mlx_support import Opener, changed


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", {"model_type": "lama"}, "did you mean 'llama'"),
        ("llama", {"model_type": "../llama"}, "not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_theta": 77.0}, "rope_theta is 77.0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"vocab_size": 321}, "embed_tokens"),
        ("llama", {"num_hidden_layers": 4}, "Missing"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"quantization": {"group_size": 7, "bits": 4}}, "quantization"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"head_dim": 32}, "head_dim 32"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"layer_types": ["full_attention"] + ["sliding_attention"] * 2}, "period"),
    ],
)
def test_configs_that_would_be_computed_wrongly(
    name: str,
    config: dict[str, Any],
    message: str,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        open_model(changed(tiny_folder(name), tmp_path / "other", **config))
    assert "\n" not in str(caught.value)


def test_what_mlx_lm_understood_is_compared() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 100000.0}
    args = SimpleNamespace(rope_theta=10000.0, head_dim=16)
    with pytest.raises(InvalidInput, match="reads rope_theta as 10000.0, not 100000.0"):
        families.check_args(args, config, "config.json")
    rope = SimpleNamespace(base=10000.0, traditional=False)
    layer = SimpleNamespace(self_attn=SimpleNamespace(rope=rope))
    net = SimpleNamespace(model=SimpleNamespace(layers=[layer]))
    with pytest.raises(InvalidInput, match="RoPE with base 10000.0"):
        families.check_rope(net, config, "config.json")
    families.check_rope(net, config | {"rope_theta": 10000.0}, "config.json")


def test_an_ignored_window_limits_the_context(tiny_folder: Callable[[str], Path]) -> None:
    with open_model(hf_source(tiny_folder("mistral-window")), threads=1) as model:
        assert model.info.context == model.info.trained_context == 8
    with pytest.raises(UsageError, match="takes 1 to 8"):
        open_model(hf_source(tiny_folder("mistral-window")), context=9)


def test_options_and_arguments_are_checked(
    tiny_folder: Callable[[str], Path], opened: Opener
) -> None:
    source = hf_source(tiny_folder("llama"))
    with pytest.raises(UsageError, match="--dtype 'int8'"):
        open_model(source, dtype="int8")
    with pytest.raises(UsageError, match="keep quantised"):
        open_model(source, dtype="q4")
    with pytest.raises(UsageError, match="--device 'tpu'"):
        open_model(source, device="tpu")
    with pytest.raises(UsageError, match="threads"):
        open_model(source, threads=0)
    if not mx.device_count(mx.gpu):
        with pytest.raises(MissingDependency, match="no GPU"):
            open_model(source, device="gpu")
    model = opened("llama")
    with pytest.raises(UsageError, match="outside 0..319"):
        model.embed([320])
    with pytest.raises(UsageError, match="integers"):
        model.embed([0.5])
    with pytest.raises(UsageError, match=r"expected \(\.\.\., 64\)"):
        model.head(np.zeros((2, 63), np.float32))
    with pytest.raises(UsageError, match="context"):
        model.session(context=513)


def test_a_closed_model_says_so(tiny_folder: Callable[[str], Path]) -> None:
    model = open_model(hf_source(tiny_folder("llama")), threads=1)
    session = model.session()
    model.close()
    for call in (
        lambda: session.forward(Forward(keep=0, tokens=[[3]])),
        lambda: model.embed([3]),
        lambda: model.session(),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()
