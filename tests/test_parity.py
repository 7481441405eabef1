"""The same weights on three engines, over 512 tokens of WikiText."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToySession, ToyTransformer, reference, small_tokenizer

from steersman.core.contract import Parity, compare_models, parity_checks
from steersman.core.errors import InvalidInput
from steersman.core.model import Capability, Model, Output, Plan

LENGTH = 512


@pytest.fixture(scope="module")
def tokens(data_dir: Path, torch_model: Model) -> list[int]:
    text = (data_dir / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:8000]
    ids = torch_model.tokenizer.encode(text)
    assert len(ids) >= LENGTH
    return ids[:LENGTH]


@pytest.fixture(scope="module")
def compared(tokens: list[int], torch_model: Model, request: pytest.FixtureRequest) -> Any:
    """Compare an engine with torch, once."""

    @cache
    def compare(backend: str) -> Parity:
        return compare_models(request.getfixturevalue(f"{backend}_model"), torch_model, tokens)

    return compare


@pytest.mark.weights
@pytest.mark.parametrize("backend", ["llamacpp", "mlx"])
def test_engines_give_the_same_ids(backend: str, data_dir: Path, request: Any) -> None:
    text = (data_dir / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:8000]
    model, torch = (request.getfixturevalue(f"{name}_model") for name in (backend, "torch"))
    assert model.tokenizer.encode(text) == torch.tokenizer.encode(text)


@pytest.mark.weights
@pytest.mark.slow
def test_mlx_and_torch_agree_in_float32(compared: Any) -> None:
    found = compared("mlx")
    assert found.positions == LENGTH
    assert found.max_abs < 1e-3
    assert found.top1 == 1.0
    assert len(found.cosine) == 31
    assert min(found.cosine) > 0.9999


@pytest.mark.weights
@pytest.mark.slow
def test_llamacpp_and_torch_agree_as_distributions(compared: Any) -> None:
    found = compared("llamacpp")
    assert found.kl_mean < 0.01
    assert found.top1 > 0.96
    assert abs(found.nll - found.reference_nll) < 0.02
    assert len(found.cosine) == 31
    assert min(found.cosine) > 0.98
    # llama.cpp rounds activations to 8 bits: exactly equal logits would mean a mixed-up fixture.
    assert found.max_abs > 1e-3


# -- the measurement itself, on toys -------------------------------------------------------------


def test_a_model_agrees_with_itself_and_its_own_formula() -> None:
    model = ToyTransformer()
    tokens = model.tokenizer.encode("the same again, 🙂")
    found = compare_models(model, ToyTransformer(), tokens, chunk=4)
    assert (found.max_abs, found.kl_mean, found.kl_max, found.top1) == (0, 0, 0, 1)
    assert len(found.cosine) == 3
    assert min(found.cosine) == pytest.approx(1)
    logits = reference(model, tokens)[0]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = -np.log(probs[np.arange(len(tokens) - 1), tokens[1:]]).mean()
    assert found.nll == found.reference_nll == pytest.approx(nll, abs=1e-5)


def test_figures_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    tables = [rng.dirichlet(np.ones(13), size=14) for _ in range(2)]
    model, other = (TableModel(table=table) for table in tables)
    tokens = rng.integers(0, 13, 40).tolist()
    found = compare_models(model, other, tokens, chunk=7)
    p = np.array([other.probs(tokens[: i + 1]) for i in range(40)])
    q = np.array([model.probs(tokens[: i + 1]) for i in range(40)])
    kl = (p * np.log(p / q)).sum(-1)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.max_abs == pytest.approx(np.abs(np.log(p) - np.log(q)).max(), rel=1e-4)
    assert found.cosine == ()


class WrongLayer(ToySession):
    """Hidden state 1 is another one."""

    def _run(self, plan: Plan) -> Output:
        out = super()._run(plan)
        return replace(out, hidden={i: out.hidden[2 if i == 1 else i] for i in out.hidden})


def test_checks_fail_on_another_model_and_on_another_layer() -> None:
    model = ToyTransformer()
    tokens = model.tokenizer.encode("one and the other")
    checks = parity_checks(ToyTransformer(seed=1), model, tokens)
    assert {c.name for c in checks if c.result == "failed"} == {
        "parity-kl",
        "parity-top1",
        "parity-hidden",
    }
    wrong = ToyTransformer()
    wrong.session_class = WrongLayer
    checks = parity_checks(wrong, model, tokens)
    assert [c.name for c in checks if c.result == "failed"] == ["parity-hidden"]
    assert "layer 1" in checks[-1].detail


def test_hidden_states_are_left_out_where_one_has_none() -> None:
    model = ToyTransformer()
    tokens = model.tokenizer.encode("none")
    lean = ToyTransformer(without=Capability.HIDDEN)
    assert compare_models(lean, model, tokens).cosine == ()
    assert compare_models(model, model, tokens, hidden=False).cosine == ()


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"268 token ids.*13"):
        compare_models(ToyTransformer(), ToyTransformer(tokenizer=small_tokenizer()), [1, 2])


def test_engines_name_the_same_weights_alike(
    llamacpp_model: Any, torch_model: Any, mlx_model: Any
) -> None:
    prints = {m.info.fingerprint for m in (llamacpp_model, torch_model, mlx_model)}
    assert len(prints) == 1
    assert len(prints.pop()) == 64
