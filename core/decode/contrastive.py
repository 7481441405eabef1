"""Contrastive search: likely, yet unlike what was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..array import array_namespace, to_numpy
from ..errors import UsageError
from ..logits import Chain
from ..model import Array, Capability, Forward, Output
from ..ops import log_softmax, softmax, top_k
from .rng import Rng
from .sample import Progress, appended, begin
from .types import Request, Step, Token


@dataclass(frozen=True, kw_only=True)
class _State:
    """``context`` (T, D) holds unit hidden states of all fed tokens; the rest is candidates."""

    progress: Progress
    context: Array | None = None
    tokens: tuple[Token, ...] = ()
    probs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ContrastiveSearch:
    """Choose among the ``k`` likeliest tokens the one that repeats the context least.

    Each candidate ``v`` is tried, and scored
    ``(1 - alpha) * p(v) - alpha * max_j cos(h_v, h_j)`` with ``h`` the last hidden states after the
    final norm. Deterministic. One call per token, of ``k`` rows.

    Parameters
    ----------
    alpha : float in [0, 1]
        Weight of the degeneration penalty; 0 is greedy decoding.
    k : int
        Candidates, 1..64; 1 is greedy decoding.
    chain : Chain
        Stages applied to the logits before candidates are taken. One that removes tokens may
        leave fewer than ``k`` candidates; one with a state of its own (mirostat) begins anew at
        every token.

    References
    ----------
    Su et al., "A Contrastive Framework for Neural Text Generation", arXiv:2202.06417.
    """

    alpha: float = 0.6
    k: int = 4
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"contrastive: alpha must be in [0, 1], got {self.alpha}")
        if not 1 <= self.k <= 64:
            raise UsageError(f"contrastive: k must be in 1..64, got {self.k}")

    @property
    def requires(self) -> Mapping[str, Capability]:
        needs = Capability.LAST_LOGITS | Capability.ROWS | Capability.FORK
        return {"target": needs | Capability.HIDDEN | Capability.HEAD}

    @property
    def max_rows(self) -> int:
        return self.k

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        state = _State(progress=begin(request, self.chain))
        if request.max_tokens == 0:
            return state, Step(finish="length")
        last = request.models["target"].info.layers
        ask = Forward(keep=0, tokens=request.prompt[None], hidden=(last,))
        return state, Step(ask={"target": ask})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        request = state.progress.request
        model = request.models["target"]
        answer = out["target"]
        fresh = _unit(model.norm(answer.hidden[model.info.layers]))
        logits = answer.logits
        assert logits is not None
        if state.context is None:
            return self._try(replace(state, context=fresh[0, ...]), logits, 0, rng, None)
        xp = array_namespace(fresh)
        candidates = fresh[:, 0, :]  # (k, D)
        closeness = xp.max(candidates @ xp.permute_dims(state.context, (1, 0)), axis=-1)
        penalty = to_numpy(closeness).astype(np.float64)
        scores = (1 - self.alpha) * np.array(state.probs) - self.alpha * penalty
        best = int(np.argmax(scores))
        token = state.tokens[best]
        progress = replace(state.progress, history=np.append(state.progress.history, token.id))
        context = xp.concat([state.context, candidates[best : best + 1, :]], axis=0)
        tried = [t.id for t in state.tokens]
        state = replace(state, progress=progress, context=context)
        state, step = self._try(state, logits[best : best + 1, ...], best, rng, token)
        if request.trace is not None:
            rounded = [round(score, 6) for score in scores.tolist()]
            step = replace(step, note={"contrastive": {"tried": tried, "scores": rounded}})
        return state, step

    def _try(
        self, state: _State, logits: Array, row: int, rng: Rng, token: Token | None
    ) -> tuple[_State, Step]:
        """Ask for every candidate that may follow; show ``token``, which was just chosen."""
        progress = state.progress
        request, position = progress.request, len(progress.history)

        def uniforms(r: int, key: int) -> float:
            return rng.uniform(request.row, position, draw=key)

        filtered = self.chain.apply(logits, history=[progress.history], uniforms=uniforms)
        probs, ids = (to_numpy(x)[0] for x in top_k(softmax(filtered), self.k))
        raw = to_numpy(log_softmax(logits))[0] if request.logprobs is not None else None
        kept = [(int(i), float(p)) for i, p in zip(ids, probs, strict=True) if p > 0]
        traces: Sequence[Mapping[str, Any] | None] = [None] * len(kept)
        if request.trace is not None:
            traces = self.chain.explain(
                np.repeat(to_numpy(logits), len(kept), axis=0),
                history=[progress.history] * len(kept),
                uniforms=uniforms,
                n=request.trace,
                tokens=[i for i, _ in kept],
            )
        tokens = tuple(
            Token(
                id=i,
                raw_logprob=None if raw is None else float(raw[i]),
                logprob=None if raw is None else float(np.log(p)),
                trace=trace,
            )
            for (i, p), trace in zip(kept, traces, strict=True)
        )
        state = replace(state, tokens=tokens, probs=tuple(p for _, p in kept))
        ask = Forward(
            keep=position,
            tokens=np.array([[t.id] for t in tokens]),
            rows=np.full(len(tokens), row),
            hidden=(request.models["target"].info.layers,),
        )
        if token is None:
            return state, Step(ask={"target": ask})
        return state, appended(progress, token, {"target": ask})


def _unit(hidden: Array) -> Array:
    """Return hidden states (..., D) scaled to length 1."""
    xp = array_namespace(hidden)
    return hidden / xp.sqrt(xp.sum(hidden * hidden, axis=-1, keepdims=True))
