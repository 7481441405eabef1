"""How a chain runs: rows of logits become short lists of candidates, then tokens.

On the host (and in unified memory) each row is handled by NumPy from the first stage on. On another
device the stages up to the first truncation run there, and one array with the survivors, and all
else that is asked, comes back. From then on both are the same code, so engines agree.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace, to_numpy
from ..errors import BackendError
from ..model import IntArray
from ..ops import categorical, logsumexp, mask_out, top_k
from ..ops.categorical import draw_1d
from .stage import Context, Stage
from .top_k import TopK

DRAW_TOKEN = 0
"""``draw`` key of the random number that picks the token."""

DRAW_STAGES = 1000
"""``draw`` key of a stage's own random number: this plus the stage's place in the chain."""

Uniforms = Callable[[int, int], float]
Top = tuple[tuple[int, float], ...]
Active = Sequence[tuple[int, Stage]]
FloatRow = npt.NDArray[np.float32]

FEW = 96  # candidates up to this number are plain floats where all later stages allow it
SHORT = 4096  # candidates above this number stay in the layout of the vocabulary
WIDE = 256  # candidates that come back from a device after a truncation of unknown size


class Picked(NamedTuple):
    """One token per row, with its final and raw log-probability and the raw alternatives."""

    tokens: IntArray
    finals: npt.NDArray[np.float64]
    raws: npt.NDArray[np.float64]
    top: tuple[Top, ...]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the stages of one call may ask for.

    Attributes
    ----------
    history : sequence of B int64 arrays
    state : tuple with one state per stage of the chain
    uniforms : callable (row, draw) -> float
    """

    history: Sequence[IntArray]
    state: tuple[Any, ...]
    uniforms: Uniforms

    def draws(self, rows: Sequence[int], draw: int) -> npt.NDArray[np.float64]:
        """Return one random number per row."""
        return np.array([self.uniforms(row, draw) for row in rows], np.float64)

    def whole(self, place: int, stage: Stage, rows: int) -> Context:
        """Return the context of a stage that is called on all rows at once."""
        return Context(
            history=self.history,
            uniforms=self.draws(range(rows), DRAW_STAGES + place) if stage.needs_uniform else None,
            state=self.state[place],
        )

    def single(self, place: int, stage: Stage, row: int, *, ordered: bool) -> Context:
        """Return the context of a stage that is called on one row."""
        state = self.state[place]
        return Context(
            history=(self.history[row],) if stage.needs_history else (),
            uniforms=self.draws((row,), DRAW_STAGES + place) if stage.needs_uniform else None,
            state=stage.fork(state, np.array([row])) if stage.has_state else state,
            ordered=ordered,
        )


def check_peak(peak: float, row: int) -> None:
    """Raise BackendError if the largest logit of a row is not a finite number."""
    if not math.isfinite(peak):
        what = "only -inf" if peak == -np.inf else str(peak)
        raise BackendError(f"logits: row {row} holds {what}; the model's output is not usable")


def check_left(values: FloatRow, row: int) -> None:
    """Raise BackendError if the chain left no token, or made NaN."""
    if len(values) == 0 or not math.isfinite(values.max()):
        raise BackendError(
            f"logits: the chain left no token in row {row}; check logit_bias and processors"
        )


def narrow(
    values: FloatRow, keep: npt.NDArray[np.bool_] | None = None
) -> tuple[FloatRow, IntArray | None]:
    """Return what is left of one row (V,), most likely first, and the ids.

    Where so many are left that sorting them costs more than it saves, the row stays as long as it
    was, with None for the ids.
    """
    ids = (values > -np.inf if keep is None else keep).nonzero()[0]
    if len(ids) > SHORT:
        return values if keep is None else mask_out(values, keep), None
    left = values[ids]
    order = (-left).argsort(kind="stable")
    return left[order], ids[order]


def run_row(
    values: FloatRow, ids: IntArray | None, stages: Active, inputs: Inputs, row: int, size: int
) -> tuple[FloatRow, IntArray | None]:
    """Run ``stages`` on one row.

    Parameters
    ----------
    values : float32 (V,), or (n,) sorted from most to least likely with ``ids``
    ids : int64 (n,) or None
    size : int
        V.

    Returns
    -------
    values, ids : in either layout
    """
    for done, (place, stage) in enumerate(stages):
        if ids is not None and len(ids) <= FEW and all(s.listwise for _, s in stages[done:]):
            left: Any = values.tolist()
            for _, listwise in stages[done:]:
                left = listwise.on_list(left)
            return np.array(left, np.float32), ids[: len(left)]
        if ids is not None and stage.by_id:
            full = np.full(size, -np.inf, np.float32)
            full[ids] = values
            context = inputs.single(place, stage, row, ordered=False)
            values, ids = narrow(stage(full[None], context)[0])
            continue
        if ids is None and type(stage) is TopK and stage.k < min(size, SHORT):
            values, ids = top_k(values, stage.k)
            continue
        context = inputs.single(place, stage, row, ordered=ids is not None)
        if stage.truncates:
            left = stage.keep(values[None], context)[0]
            if ids is None:
                values, ids = narrow(values, left)
                continue
        else:
            values = stage(values[None], context)[0]
            if ids is None:
                continue
            left = values > -np.inf
        if not left.all():
            values, ids = values[left], ids[left]
    return values, ids


def draw_row(values: FloatRow, ids: IntArray | None, uniform: float) -> tuple[int, float]:
    """Return the token drawn from one row and its log-probability.

    Candidates are put in the order of their ids first: the same order as over the vocabulary, and
    one that near-equal logits do not disturb.
    """
    if ids is None:
        return draw_1d(values, uniform)
    if len(ids) == 1:
        return int(ids[0]), 0.0
    if len(ids) <= FEW:
        return _draw_few(values.tolist(), ids.tolist(), uniform)
    order = ids.argsort()
    index, logprob = draw_1d(values[order], uniform)
    return int(ids[order[index]]), logprob


def _draw_few(values: list[float], ids: list[int], uniform: float) -> tuple[int, float]:
    peak = max(values)
    weighted = ((i, math.exp(value - peak)) for i, value in zip(ids, values))
    pairs = sorted((i, weight) for i, weight in weighted if weight > 0)
    totals = list(accumulate([weight for _, weight in pairs]))
    # A uniform of 1 gives the last candidate.
    chosen, weight = pairs[min(bisect_right(totals, uniform * totals[-1]), len(pairs) - 1)]
    return chosen, math.log(weight / totals[-1])


def split_greedy(stages: Active, greedy: bool) -> tuple[Active, bool]:
    """Return the stages to run before an argmax, if the chain ends in temperature 0.

    Truncations that keep the most likely token cannot matter then.
    """
    if not greedy:
        return stages, False
    stages = list(stages[:-1])
    while stages and stages[-1][1].truncates and not stages[-1][1].changes_argmax:
        stages.pop()
    return stages, True


def rows_on_host(
    logits: Array, stages: Active, greedy: bool, inputs: Inputs, logprobs: int | None
) -> Picked:
    """Choose a token per row of ``logits`` (B, V) with NumPy."""
    host = np.asarray(to_numpy(logits), np.float32)
    rows, size = host.shape
    stages, greedy = split_greedy(stages, greedy)
    tokens = np.empty(rows, np.int64)
    finals = np.zeros(rows)
    raws = np.full(rows, np.nan)
    top: list[Top] = []
    for row in range(rows):
        raw = host[row]
        if greedy and not stages:
            best = int(raw.argmax())
            check_peak(float(raw[best]), row)
            tokens[row] = best
        else:
            # NaN and infinities spread into a sum, which is made faster than a maximum is found.
            if not math.isfinite(np.add.reduce(raw)):
                check_peak(float(raw.max()), row)
            values, ids = run_row(raw, None, stages, inputs, row, size)
            check_left(values, row)
            if greedy:
                index = int(values.argmax())
                tokens[row] = index if ids is None else ids[index]
            else:
                uniform = inputs.uniforms(row, DRAW_TOKEN)
                tokens[row], finals[row] = draw_row(values, ids, uniform)
        if logprobs is None:
            top.append(())
            continue
        total = float(logsumexp(raw))
        raws[row] = float(raw[tokens[row]]) - total
        most, where = top_k(raw, logprobs) if logprobs else (raw[:0], ())
        top.append(tuple((int(i), float(v) - total) for i, v in zip(where, most)))
    return Picked(tokens, finals, raws, tuple(top))


class _Pack:
    """Columns of one array, so that a single copy brings all of them to the host."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.columns: list[Array] = []
        self.slices: dict[str, slice] = {}
        self.width = 0

    def add(self, name: str, column: Array) -> None:
        """Add a column (B, n); integers below 2**24 are exact in float32."""
        self.columns.append(self.xp.astype(column, self.xp.float32))
        self.slices[name] = slice(self.width, self.width + column.shape[-1])
        self.width += column.shape[-1]

    def read(self) -> dict[str, npt.NDArray[np.float32]]:
        """Copy everything to the host."""
        host = to_numpy(self.xp.concat(self.columns, axis=-1))
        return {name: host[:, part] for name, part in self.slices.items()}


def rows_on_device(
    logits: Array, stages: Active, greedy: bool, inputs: Inputs, logprobs: int | None
) -> Picked:
    """Choose a token per row of ``logits`` (B, V) that live on a device.

    Stages up to the first truncation run on the device, for all rows at once. One copy brings the
    survivors; a second one is needed only for rows in which more than 256 survive a truncation
    other than top-k.
    """
    xp = array_namespace(logits)
    logits = xp.astype(logits, xp.float32)
    rows, size = logits.shape
    stages, greedy = split_greedy(stages, greedy)
    pack = _Pack(xp)
    pack.add("peak", xp.max(logits, axis=-1, keepdims=True))
    if logprobs is not None:
        pack.add("total", logsumexp(logits, keepdims=True))
    if logprobs:
        most, where = top_k(logits, logprobs)
        pack.add("top", most)
        pack.add("top_ids", where)

    x, rest = logits, list(stages)
    ids = None
    while rest and ids is None:
        place, stage = rest.pop(0)
        if isinstance(stage, TopK) and stage.k < min(size, SHORT):
            values, ids = top_k(x, stage.k)
            alive = xp.sum(xp.astype(values > -xp.inf, xp.float32), axis=-1, keepdims=True)
            break
        x = stage(x, inputs.whole(place, stage, rows))
        if stage.truncates:
            values, ids = top_k(x, WIDE)
            alive = xp.sum(xp.astype(x > -xp.inf, xp.float32), axis=-1, keepdims=True)
    uniforms = np.zeros(rows) if greedy else inputs.draws(range(rows), DRAW_TOKEN)
    if ids is None:
        if greedy:
            ids = xp.argmax(x, axis=-1, keepdims=True)
        else:
            ids = categorical(x, uniforms)[:, None]
        # A row without any token gives -1; what stands there is told from its value.
        values = xp.take_along_axis(x, xp.where(ids < 0, 0, ids), axis=-1)
        pack.add("final_total", logsumexp(x, keepdims=True))
    else:
        pack.add("alive", alive)
    pack.add("ids", ids)
    pack.add("values", values)
    if logprobs is not None:
        pack.add("raw", xp.take_along_axis(logits, xp.where(ids < 0, 0, ids), axis=-1))
    host = pack.read()

    tokens = np.empty(rows, np.int64)
    finals = np.zeros(rows)
    raws = np.full(rows, np.nan)
    top: list[Top] = []
    for row in range(rows):
        check_peak(float(host["peak"][row, 0]), row)
        row_ids = host["ids"][row].astype(np.int64)
        row_values = host["values"][row]
        check_left(row_values, row)
        chosen_raw = None
        if "alive" not in host:
            tokens[row] = row_ids[0]
            if not greedy:
                finals[row] = float(row_values[0]) - float(host["final_total"][row, 0])
        else:
            alive = int(host["alive"][row, 0])
            if alive > len(row_ids):
                row_values, left_ids = narrow(to_numpy(x[row, :]))
            else:
                row_values, left_ids = row_values[:alive], row_ids[:alive]
            row_values, left_ids = run_row(row_values, left_ids, rest, inputs, row, size)
            check_left(row_values, row)
            if greedy:
                index = int(row_values.argmax())
                tokens[row] = index if left_ids is None else left_ids[index]
            else:
                tokens[row], finals[row] = draw_row(row_values, left_ids, uniforms[row])
        if logprobs is None:
            top.append(())
            continue
        total = float(host["total"][row, 0])
        found = np.flatnonzero(row_ids == tokens[row])
        if len(found):
            chosen_raw = float(host["raw"][row, found[0]])
        else:
            chosen_raw = float(to_numpy(logits[row, int(tokens[row])]))
        raws[row] = chosen_raw - total
        if logprobs:
            pairs = zip(host["top_ids"][row], host["top"][row])
            top.append(tuple((int(i), float(v) - total) for i, v in pairs))
        else:
            top.append(())
    return Picked(tokens, finals, raws, tuple(top))
