"""The contract suite: passed by the toys and by every engine, failed by every faulty copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from faulty_toys import FAULTY_SESSIONS
from toys import TableModel, ToySession, ToyTokenizer, ToyTransformer, byte_tokenizer

from steersman.core.contract import CHECKS, Check, bound_for, run_contract
from steersman.core.errors import UsageError
from steersman.core.model import Capability, Model, Output, Plan

C = Capability


def failures(checks: list[Check]) -> dict[str, str]:
    return {c.name: f"{c.value} > {c.bound}: {c.detail}" for c in checks if c.result == "failed"}


# -- what must pass -------------------------------------------------------------------------------


def test_toy_transformer_passes(xp: Any) -> None:
    layers = 1 if "strict" in xp.__name__ else 2  # the strict library is slow
    checks = run_contract(ToyTransformer(xp, layers=layers), length=32)
    assert not failures(checks)
    assert all(check.result == "passed" for check in checks)
    assert len(checks) == len(CHECKS)


@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer()])
def test_table_model_passes(tokenizer: ToyTokenizer | None) -> None:
    checks = run_contract(TableModel(order=2 if tokenizer is None else 1, tokenizer=tokenizer))
    assert not failures(checks)
    skipped = {check.name for check in checks if check.result == "skipped"}
    assert skipped == {
        "embeds",
        "embedding",
        "hidden-0",
        "hidden",
        "head",
        "attentions",
        "block",
    }


@pytest.mark.parametrize("gone", list(Capability), ids=lambda c: c.name)
def test_a_missing_capability_skips_its_checks_and_no_other_fails(gone: Capability) -> None:
    checks = run_contract(ToyTransformer(layers=1, width=8, without=gone), length=32)
    assert not failures(checks)
    for check in checks:
        assert (check.result == "skipped") == bool(check.capability & gone)
        if check.result == "skipped":
            assert gone.names()[0] in check.detail


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHECKS))
def test_engine_passes(engine_model: Model, name: str) -> None:
    # 72 tokens: longer than the 63 that llama.cpp computes at a time.
    check = run_contract(engine_model, only=[name], length=72)[0]
    assert check.result == "passed", check


# -- what must fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["exact", "float32", "bfloat16"])
@pytest.mark.parametrize("faulty", FAULTY_SESSIONS, ids=lambda c: c.__name__)
def test_a_faulty_session_fails(faulty: type[ToySession], dtype: str) -> None:
    """Each fault is found even where answers are only compared as distributions."""
    model = ToyTransformer()
    model.session_class = faulty
    if dtype != "exact":
        model.info = replace(model.info, dtype=dtype, batch_invariant=False)
    names = FAULTY_SESSIONS[faulty]
    assert set(failures(run_contract(model, length=32, only=names))) == names


def test_every_check_is_seen_to_fail() -> None:
    assert set().union(*FAULTY_SESSIONS.values()) | set(FAULTY_MODELS) == set(CHECKS)


class OffByOneToken(ToyTokenizer):
    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token).replace(b"\xd8", b"\xd9")


class AlwaysSpecial(ToyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return super().encode(text, special=True)


def _recast(tokenizer: ToyTokenizer, kind: type[ToyTokenizer]) -> ToyTokenizer:
    tokenizer.__class__ = kind
    return tokenizer


class RawEmbedding(ToyTransformer):
    """The matrix lacks the scale of ``embed``."""

    @property
    def embedding(self) -> Any:
        return super().embedding / self.scale


class HeadWithoutNorm(ToyTransformer):
    def head(self, hidden: Any) -> Any:
        return (hidden @ self.weights["head"].T).astype(np.float32)


class UnscaledEmbed(ToyTransformer):
    def embed(self, tokens: Any) -> Any:
        return super().embed(tokens) / np.float32(self.scale)


def _no_end() -> ToyTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.eos_ids = frozenset()
    return tokenizer


FAULTY_MODELS: dict[str, Callable[[], Model]] = {
    "bytes": lambda: ToyTransformer(tokenizer=_recast(byte_tokenizer(), OffByOneToken)),
    "special": lambda: ToyTransformer(tokenizer=_recast(byte_tokenizer(), AlwaysSpecial)),
    "vocabulary": lambda: ToyTransformer(tokenizer=_no_end()),
    "embedding": RawEmbedding,
    "head": HeadWithoutNorm,
    "hidden-0": UnscaledEmbed,
    "embeds": UnscaledEmbed,
}


@pytest.mark.parametrize("name", FAULTY_MODELS)
def test_a_faulty_model_fails(name: str) -> None:
    assert set(failures(run_contract(FAULTY_MODELS[name](), length=32, only=[name]))) == {name}


class Noisy(ToySession):
    """Adds noise to every logit."""

    noise = 0.0

    def _run(self, plan: Plan) -> Output:
        out = super()._run(plan)
        if out.logits is None:
            return out
        noise = np.random.default_rng().normal(size=out.logits.shape) * self.noise
        return replace(out, logits=(out.logits + noise).astype(np.float32))


@pytest.mark.parametrize(
    ("noise", "passing"),
    [(1e-5, {"float32", "bfloat16"}), (1e-2, {"bfloat16"}), (1.0, set())],
)
def test_noise_is_judged_by_the_number_type(noise: float, passing: set[str]) -> None:
    found = set()
    for dtype in ("exact", "float32", "bfloat16"):
        model = ToyTransformer(seed=1, layers=1)
        model.session_class = type("Session", (Noisy,), {"noise": noise})
        if dtype != "exact":
            model.info = replace(model.info, dtype=dtype, batch_invariant=False)
        if not failures(run_contract(model, length=32, only=["rollback", "fork"])):
            found.add(dtype)
    assert found == passing


def test_bounds() -> None:
    info = ToyTransformer(layers=1).info
    assert bound_for(info, invariance=True).logit == 0
    assert bound_for(info, invariance=False).logit == 1e-5
    loose = replace(info, batch_invariant=False, dtype="float32")
    assert bound_for(loose, invariance=True).logit == 1e-3
    assert bound_for(replace(loose, dtype="Q4_1"), invariance=True).logit is None


def test_unknown_check_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'rollback'"):
        run_contract(TableModel(), only=["rolback"])
    with pytest.raises(UsageError, match="at least 32"):
        run_contract(TableModel(), length=8)


def test_progress_names_each_check() -> None:
    seen: list[tuple[str, int, int]] = []
    run_contract(TableModel(), only=["last", "fork"], progress=lambda *x: seen.append(x))
    assert seen == [(CHECKS["last"].title, 0, 2), (CHECKS["fork"].title, 1, 2)]
