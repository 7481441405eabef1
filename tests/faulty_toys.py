"""Sessions with one fault each, and the checks of the contract suite that must find it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
from toys import ToySession

from steersman.core.errors import UsageError
from steersman.core.model import Forward, Model, Output, Plan


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
