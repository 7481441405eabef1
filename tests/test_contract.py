"""The contract suite: passed by the toys and by every engine, failed by every faulty copy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToySession, ToyTokenizer, ToyTransformer, byte_tokenizer

from steersman.core.contract import CHECKS, Check, bound_for, run_contract
from steersman.core.errors import UsageError
from steersman.core.model import Capability, Forward, Model, Output, Plan

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


class KeepsOneMore(ToySession):
    def kept(self, plan: Plan, row: int) -> list[Any]:
        old, base = self.rows[plan.rows[row]], int(plan.base[row])
        if 0 < base < len(old) and plan.path is None and self.tree_base[plan.rows[row]] > base:
            return old[: base + 1]
        return super().kept(plan, row)


class ForksMerge(ToySession):
    """Rows that continue the same row write into the same memory."""

    def _run(self, plan: Plan) -> Output:
        self._shared: dict[int, list[Any]] = {}
        return super()._run(plan)

    def kept(self, plan: Plan, row: int) -> list[Any]:
        return self._shared.setdefault(int(plan.rows[row]), super().kept(plan, row))


class MovesRowsInPlace(ToySession):
    def _run(self, plan: Plan) -> Output:
        for b, row in enumerate(plan.rows):
            if b < len(self.rows):
                self.rows[b] = self.rows[row]
        return super()._run(replace(plan, rows=np.minimum(np.arange(plan.batch), plan.rows.max())))


class ContinuesFirstRow(ToySession):
    def _run(self, plan: Plan) -> Output:
        return super()._run(replace(plan, rows=np.zeros_like(plan.rows)))


class RestartsPositions(ToySession):
    def position(self, plan: Plan, row: int, i: int) -> int:
        return i


class NoDepthPositions(ToySession):
    def position(self, plan: Plan, row: int, i: int) -> int:
        return int(plan.start[row]) + i


class TreeIsAChain(ToySession):
    def sees(self, plan: Plan, row: int, i: int, j: int) -> bool:
        return j <= i


class KeepsFirstNodes(ToySession):
    def kept(self, plan: Plan, row: int) -> list[Any]:
        return self.rows[plan.rows[row]][: plan.start[row]]


class NeverDropsTrees(ToySession):
    def kept(self, plan: Plan, row: int) -> list[Any]:
        old = self.rows[plan.rows[row]]
        if plan.path is None and int(plan.base[row]) == self.tree_base[plan.rows[row]]:
            return list(old)
        return super().kept(plan, row)


class TreesShareOneMask(ToySession):
    def sees(self, plan: Plan, row: int, i: int, j: int) -> bool:
        return super().sees(plan, 0, i, j)


class AnswersFromPadding(ToySession):
    """Last logits are taken from the last column, whatever stands there."""

    def _run(self, plan: Plan) -> Output:
        if plan.logits != "last" or plan.tokens is None:
            return super()._run(plan)
        out = super()._run(replace(plan, logits="all"))
        return replace(out, logits=out.logits[:, -1])


class AlwaysCausal(ToySession):
    def sees(self, plan: Plan, row: int, i: int, j: int) -> bool:
        return super().sees(replace(plan, causal=True), row, i, j)


class OutputsChanged(ToySession):
    def change(self, plan: Plan, out: Output) -> Output:
        raise NotImplementedError

    def _run(self, plan: Plan) -> Output:
        return self.change(plan, super()._run(plan))


class ShiftsAllLogits(OutputsChanged):
    def change(self, plan: Plan, out: Output) -> Output:
        if plan.logits != "all":
            return out
        return replace(out, logits=np.roll(out.logits, 1, axis=1))


class WideLogits(OutputsChanged):
    def change(self, plan: Plan, out: Output) -> Output:
        return replace(out, logits=None if out.logits is None else out.logits.astype(np.float64))


class BorrowsSilently(OutputsChanged):
    """Last logits are a view of one buffer, though ``borrowed_logits`` is False."""

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)
        self.buffer = np.zeros((8, 300), np.float32)

    def change(self, plan: Plan, out: Output) -> Output:
        if plan.logits != "last":
            return out
        view = self.buffer[: plan.batch, : out.logits.shape[1]]
        view[:] = out.logits
        return replace(out, logits=view)


class LayerBefore(ToySession):
    """The top state is one layer short, and state 0 is that of layer 1."""

    def _run(self, plan: Plan) -> Output:
        top = self.model.info.layers
        shifted = {i: 1 if i == 0 else i - (i == top) for i in plan.hidden}
        out = super()._run(replace(plan, hidden=tuple(sorted(set(shifted.values())))))
        return replace(out, hidden={i: out.hidden[j] for i, j in shifted.items()})


class LosesAttention(OutputsChanged):
    def change(self, plan: Plan, out: Output) -> Output:
        return replace(out, attentions={i: w * (w < 0.4) for i, w in out.attentions.items()})


class TransposesAttention(OutputsChanged):
    def change(self, plan: Plan, out: Output) -> Output:
        flipped = {i: w[..., ::-1].copy() for i, w in out.attentions.items()}
        return replace(out, attentions=flipped)


class ScalesInPlace(ToySession):
    def _run(self, plan: Plan) -> Output:
        out = super()._run(plan)
        if plan.embeds is not None:
            plan.embeds[...] *= 2
        return out


class NoChecks(ToySession):
    """Plans without the base class's checks of tokens and threads."""

    def forward(self, ask: Forward) -> Output:
        try:
            plan = self._plan(ask)
        except UsageError:
            self.rows = [row[:-1] for row in self.rows]
            self._rows = [row[:-1] for row in self._rows]
            raise
        out = self._run(plan)
        self._record(plan)
        return out


class NoLock(ToySession):
    def forward(self, ask: Forward) -> Output:
        plan = self._plan(ask)
        out = self._run(plan)
        self._record(plan)
        return out


class SharedByAll(ToySession):
    """One memory for all sessions: right in turn, wrong beside each other."""

    memory: tuple[Any, list[list[Any]]] = (None, [[]])

    @property
    def rows(self) -> list[list[Any]]:
        return SharedByAll.memory[1]

    @rows.setter
    def rows(self, rows: list[list[Any]]) -> None:
        SharedByAll.memory = (self, rows)


class Interleaved(SharedByAll):
    """The same, with threads that take turns."""

    turns = threading.Barrier(2, timeout=10)

    def _run(self, plan: Plan) -> Output:
        if threading.current_thread() is not threading.main_thread():
            self.turns.wait()
        return super()._run(plan)


class StatesOfFirstCall(OutputsChanged):
    """States of later calls stand one position late."""

    def change(self, plan: Plan, out: Output) -> Output:
        late = {i: np.roll(h, 1, axis=1) if plan.start[0] else h for i, h in out.hidden.items()}
        return replace(out, hidden=late)


class HugeContext(ToySession):
    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **{**options, "context": 100_000})


class OneTooMany(ToySession):
    """Holds one position fewer than it says."""

    def _run(self, plan: Plan) -> Output:
        if (plan.end >= self.context).any():
            raise RuntimeError("no cell left")
        return super()._run(plan)


class ClosesOnce(ToySession):
    def close(self) -> None:
        if self._closed:
            raise RuntimeError("freed twice")
        super().close()


FAULTY_SESSIONS: dict[type[ToySession], set[str]] = {
    KeepsOneMore: {"rollback"},
    ForksMerge: {"fork"},
    MovesRowsInPlace: {"reorder"},
    ContinuesFirstRow: {"merge", "reorder"},
    RestartsPositions: {"chunks", "rollback"},
    NoDepthPositions: {"tree"},
    TreeIsAChain: {"tree"},
    KeepsFirstNodes: {"tree-keep"},
    NeverDropsTrees: {"tree-drop"},
    TreesShareOneMask: {"tree-rows"},
    AnswersFromPadding: {"rows"},
    AlwaysCausal: {"block"},
    ShiftsAllLogits: {"last", "alignment"},
    WideLogits: {"shapes"},
    BorrowsSilently: {"shapes"},
    LayerBefore: {"head", "hidden-0"},
    LosesAttention: {"attentions"},
    TransposesAttention: {"attentions"},
    ScalesInPlace: {"embeds"},
    NoChecks: {"bad-calls"},
    NoLock: {"one-session"},
    SharedByAll: {"close"},
    Interleaved: {"two-sessions"},
    StatesOfFirstCall: {"hidden"},
    HugeContext: {"overflow"},
    OneTooMany: {"overflow"},
    ClosesOnce: {"close"},
}


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
