"""The sampling chain: stages in the order that the profile gives, then one draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace, asarray_like, is_on_host, to_numpy
from ..errors import BackendError, UsageError
from ..model import IntArray, Tokenizer
from ..ops import categorical, log_softmax, top_k
from .candidates import (
    DRAW_STAGES,
    DRAW_TOKEN,
    Inputs,
    Picked,
    Top,
    Uniforms,
    check_left,
    check_peak,
    rows_on_device,
    rows_on_host,
    run_row,
)
from .explain import explain
from .mirostat import Mirostat
from .stage import Stage
from .temperature import Temperature

__all__ = ["DRAW_STAGES", "DRAW_TOKEN", "Chain", "Selection", "Uniforms"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One token per row.

    Attributes
    ----------
    tokens : int64 (B,)
    raw_logprobs : float64 (B,) or None
        Natural log under the untouched logits; None unless asked for.
    logprobs : float64 (B,) or None
        Natural log under the distribution the token was drawn from; None unless asked for.
    top : tuple of B tuples of (id, raw logprob)
        The most likely tokens before the chain, best first; empty tuples unless asked for.
    state : tuple
        For the next call.
    traces : tuple of B mappings
        What :meth:`Chain.explain` says about each row; empty unless asked for.
    """

    tokens: IntArray
    raw_logprobs: npt.NDArray[np.float64] | None
    logprobs: npt.NDArray[np.float64] | None
    top: tuple[Top, ...]
    state: tuple[Any, ...]
    traces: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Chain:
    """Stages applied in order, then a draw from what they leave.

    The draw inverts the cumulative distribution in the order of token ids, so equal logits and
    equal random numbers give the same token on every engine, and nearly equal logits nearly always
    do. Random numbers come from the caller as ``uniforms(row, draw)`` in [0, 1): ``row`` counts
    the rows of the call, ``draw`` is :data:`DRAW_TOKEN` or :data:`DRAW_STAGES` plus the place of
    the stage that asks.

    Parameters
    ----------
    stages : tuple of Stage
        Stages after a temperature of 0 have nothing left to do and are passed over.
    fused : bool
        True: go on with a short sorted list of candidates as soon as a stage truncates, on the
        host where the logits are there anyway. False: apply every stage to the whole vocabulary in
        the library of the logits. Both give the same distribution.

    Raises
    ------
    UsageError
        Mirostat is not the last stage that acts.
    """

    stages: tuple[Stage, ...] = ()
    fused: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages[:-1]:
            if isinstance(stage, Mirostat):
                raise UsageError(
                    "mirostat must be the last stage, as it steers by what is drawn after "
                    f"it; move {self.stages[-1].name} before it"
                )

    @cached_property
    def active(self) -> tuple[tuple[int, Stage], ...]:
        """The stages that do something, each with its place in ``stages``."""
        active = []
        for place, stage in enumerate(self.stages):
            if not stage.off:
                active.append((place, stage))
            if isinstance(stage, Temperature) and stage.greedy:
                break
        return tuple(active)

    @cached_property
    def greedy(self) -> bool:
        """Whether a temperature of 0 leaves one token, so that no random number picks it."""
        return any(isinstance(stage, Temperature) and stage.greedy for _, stage in self.active)

    @cached_property
    def needs_history(self) -> bool:
        """Whether any acting stage reads the history."""
        return any(stage.needs_history for _, stage in self.active)

    @cached_property
    def changes_argmax(self) -> bool:
        """Whether the most likely token can become another one."""
        return any(stage.changes_argmax for _, stage in self.active)

    def bind(self, tokenizer: Tokenizer) -> Chain:
        """Return the chain with every stage bound to ``tokenizer``."""
        return replace(self, stages=tuple(stage.bind(tokenizer) for stage in self.stages))

    def init(self, rows: int) -> tuple[Any, ...]:
        """Return the state of ``rows`` fresh rows."""
        return tuple(stage.init(rows) for stage in self.stages)

    def rows(self, state: tuple[Any, ...], rows: IntArray | Sequence[int]) -> tuple[Any, ...]:
        """Return the state of rows that continue ``rows`` (B',) of the present ones."""
        return tuple(stage.fork(part, np.asarray(rows)) for stage, part in zip(self.stages, state))

    def observe(self, state: tuple[Any, ...], logprobs: npt.NDArray[np.float64]) -> tuple[Any, ...]:
        """Return the state after tokens of final log-probability ``logprobs`` (B,) were taken.

        :meth:`select` does this itself; callers of :meth:`apply` that draw on their own do not.
        """
        if not any(stage.has_state for stage in self.stages):
            return state
        return tuple(
            stage.observe(part, logprobs) if stage.has_state else part
            for stage, part in zip(self.stages, state)
        )

    def select(
        self,
        logits: Array,
        *,
        uniforms: Uniforms,
        history: Sequence[IntArray] = (),
        state: tuple[Any, ...] | None = None,
        logprobs: int | None = None,
        trace: int | None = None,
        raw: Array | None = None,
        name: str = "strategy",
    ) -> Selection:
        """Choose one token per row.

        Parameters
        ----------
        logits : float array (B, V)
            Read only.
        uniforms : callable (row, draw) -> float in [0, 1)
        history : sequence of B int64 arrays
            Prompt and generated tokens of each row; may be left out if ``needs_history`` is False.
        state : tuple, optional
            From :meth:`init` or the last selection; fresh when None.
        logprobs : int, optional
            None: none wanted. n >= 0: raw and final ones of the token, and the n most likely
            tokens of the raw distribution.
        trace : int, optional
            n: explain the choice, with the n likeliest tokens after each stage.
        raw, name
            Those of :meth:`explain`.

        Raises
        ------
        BackendError
            A row of logits holds NaN or +inf, or the chain left no token.
        """
        inputs = self._inputs(logits, history, state, uniforms)
        if not self.fused:
            picked = self._step_by_step(logits, inputs, logprobs)
        elif is_on_host(logits):
            picked = rows_on_host(logits, self.active, self.greedy, inputs, logprobs)
        else:
            picked = rows_on_device(logits, self.active, self.greedy, inputs, logprobs)
        tokens, finals, raws, top = picked
        wanted = logprobs is not None
        return Selection(
            tokens=tokens,
            raw_logprobs=raws if wanted else None,
            logprobs=finals if wanted else None,
            top=top,
            state=self.observe(inputs.state, finals),
            traces=()
            if trace is None
            else explain(logits, self.active, inputs, n=trace, tokens=tokens, raw=raw, name=name),
        )

    def apply(
        self,
        logits: Array,
        *,
        uniforms: Uniforms,
        history: Sequence[IntArray] = (),
        state: tuple[Any, ...] | None = None,
    ) -> Array:
        """Return logits (B, V) after all stages: -inf where a token was removed.

        For strategies that need the distribution itself (beams, speculation). Parameters are those
        of :meth:`select`; state does not move, see :meth:`observe`.
        """
        inputs = self._inputs(logits, history, state, uniforms)
        if not (self.fused and is_on_host(logits)):
            return self._every_stage(logits, inputs)
        host = np.asarray(to_numpy(logits), np.float32)
        rows, size = host.shape
        out = np.full(host.shape, -np.inf, np.float32)
        for row in range(rows):
            check_peak(float(host[row].max()), row)
            values, ids = run_row(host[row], None, self.active, inputs, row, size)
            check_left(values, row)
            out[row, slice(None) if ids is None else ids] = values
        return out if isinstance(logits, np.ndarray) else asarray_like(out, logits)

    def explain(
        self,
        logits: Array,
        *,
        uniforms: Uniforms,
        history: Sequence[IntArray] = (),
        state: tuple[Any, ...] | None = None,
        n: int = 5,
        tokens: IntArray | Sequence[int] | None = None,
        raw: Array | None = None,
        name: str = "strategy",
    ) -> tuple[Mapping[str, Any], ...]:
        """Return what each acting stage did to the distribution of each row.

        The distribution after the last stage is that of :meth:`apply` on the same arguments. Costs
        several passes over the vocabulary per stage, so it is for those who asked.

        Parameters
        ----------
        logits, uniforms, history, state
            Those of :meth:`select`.
        n : int
            How many of the likeliest tokens to list, 0..100.
        tokens : int64 (B,), optional
            The tokens that were chosen: their probability is followed through the stages.
        raw : float array (B, V), optional
            The model's own logits, where a strategy made ``logits`` from them; what it did is then
            listed as the first stage, under ``name``.

        Returns
        -------
        tuple of B mappings, made of JSON values
            ``raw``: ``left`` (tokens that can be drawn), ``entropy`` (nats), ``top`` ([id,
            probability], the likeliest first), and of the chosen token ``p`` and ``rank`` (1 is the
            likeliest). ``stages``: for each one in order, besides ``left``, ``entropy``, ``top``
            and ``p`` of what it left, its ``name``, ``removed`` (probability of the tokens it
            removed, before the stage), ``tv`` (total variation, half the sum of the changes of
            probability), ``kl`` (Kullback-Leibler divergence of the distribution after from that
            before, nats; None if infinite) and ``argmax_changed``.
        """
        inputs = self._inputs(logits, history, state, uniforms)
        return explain(logits, self.active, inputs, n=n, tokens=tokens, raw=raw, name=name)

    def _inputs(
        self,
        logits: Array,
        history: Sequence[IntArray],
        state: tuple[Any, ...] | None,
        uniforms: Uniforms,
    ) -> Inputs:
        if len(logits.shape) != 2:
            raise UsageError(f"logits must be (B, V), got shape {tuple(logits.shape)}")
        rows = int(logits.shape[0])
        if self.needs_history and len(history) != rows:
            raise UsageError(f"logits has {rows} rows but history has {len(history)}")
        return Inputs(
            history=history, state=self.init(rows) if state is None else state, uniforms=uniforms
        )

    def _every_stage(self, logits: Array, inputs: Inputs) -> Array:
        """Return ``logits`` after every stage, in their own library and over the vocabulary."""
        xp = array_namespace(logits)
        x = xp.astype(logits, xp.float32)
        for place, stage in self.active:
            x = stage(x, inputs.whole(place, stage, x.shape[0]))
        return x

    def _step_by_step(self, logits: Array, inputs: Inputs, logprobs: int | None) -> Picked:
        """Choose tokens by the definition alone: the oracle for the fused paths."""
        rows = int(logits.shape[0])
        for row, peak in enumerate(to_numpy(array_namespace(logits).max(logits, axis=-1))):
            check_peak(float(peak), row)
        x = self._every_stage(logits, inputs)
        drawn = to_numpy(categorical(x, inputs.draws(range(rows), DRAW_TOKEN)))
        tokens = drawn.astype(np.int64)
        if (tokens < 0).any():
            raise BackendError(
                f"logits: the chain left no token in row {int(np.argmin(tokens))}; "
                "check logit_bias and processors"
            )
        every = np.arange(rows)
        finals = to_numpy(log_softmax(x))[every, tokens].astype(np.float64)
        raw = log_softmax(logits)
        raws = to_numpy(raw)[every, tokens].astype(np.float64)
        top: list[Top] = [()] * rows
        if logprobs:
            most, where = (to_numpy(part) for part in top_k(raw, logprobs))
            top = [tuple((int(i), float(v)) for i, v in zip(*pair)) for pair in zip(where, most)]
        return Picked(tokens, finals, raws, tuple(top))
