"""Best-of-n: sample several texts side by side and keep the one the model likes best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..array import array_namespace
from ..errors import UsageError
from ..logits import Chain
from ..model import Capability, Forward, IntArray, Output
from .rng import Rng
from .sample import token_of
from .types import Edit, Request, Step, Token


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """One text: its key for random numbers, its tokens, and why it ended (None: it goes on)."""

    index: int
    tokens: tuple[Token, ...] = ()
    finish: str | None = None

    def score(self, by: str) -> float:
        logprobs = [t.raw_logprob for t in self.tokens if t.raw_logprob is not None]
        total = float(np.sum(logprobs)) if logprobs else -np.inf
        return total / len(logprobs) if by == "mean_logprob" and logprobs else total


@dataclass(frozen=True, kw_only=True)
class _State:
    request: Request
    candidates: tuple[_Candidate, ...]
    live: tuple[int, ...]  # candidates that go on, in the order of the session's rows
    chain: Any


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Sample ``n`` texts from one prompt in a batch; show the best.

    The prompt is computed once and forked. A text's score is the model's own log-probability of
    it, before the chain; the end-of-text token counts, so that a text is not favoured for
    stopping where the model would not. Nothing is shown until all texts have ended.

    Parameters
    ----------
    n : int
        Number of texts, 1..256; 1 is plain sampling.
    by : {"mean_logprob", "sum_logprob"}
        "sum_logprob" prefers short texts.
    chain : Chain
        Stages applied to the logits, in order.

    References
    ----------
    Stiennon et al., "Learning to summarize from human feedback", arXiv:2009.01325 (best-of-n).
    """

    n: int = 4
    by: Literal["mean_logprob", "sum_logprob"] = "mean_logprob"
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 256:
            raise UsageError(f"best_of_n: n must be in 1..256, got {self.n}")
        if self.by not in ("mean_logprob", "sum_logprob"):
            raise UsageError(f"best_of_n: by must be mean_logprob or sum_logprob, got {self.by!r}")

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS | Capability.ROWS | Capability.FORK}

    @property
    def max_rows(self) -> int:
        return self.n

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        state = _State(
            request=replace(request, logprobs=request.logprobs or 0),
            candidates=tuple(_Candidate(index=i) for i in range(self.n)),
            live=tuple(range(self.n)),
            chain=self.chain.init(self.n),
        )
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        request, live = state.request, state.live
        logits = out["target"].logits
        first = not state.candidates[live[0]].tokens
        if first and len(live) > 1:  # the prompt has one row; every text starts from it
            logits = _repeat(logits, len(live))
        texts = [self._text(request, state.candidates[i]) for i in live]
        position = len(texts[0])
        selection = self.chain.select(
            logits,
            history=texts,
            state=state.chain,
            uniforms=lambda row, key: rng.uniform(request.row + live[row], position, draw=key),
            logprobs=request.logprobs,
            trace=request.trace,
        )
        candidates = list(state.candidates)
        rows: list[int] = []
        for row, i in enumerate(live):
            token = token_of(selection, row)
            finish = "eos" if token.id in request.eos_ids else None
            tokens = (*candidates[i].tokens, token)
            if finish is None and len(tokens) >= request.max_tokens:
                finish = "length"
            candidates[i] = _Candidate(index=i, tokens=tokens, finish=finish)
            if finish is None:
                rows.append(row)
        goes_on = tuple(live[row] for row in rows)
        state = _State(
            request=request,
            candidates=tuple(candidates),
            live=goes_on,
            chain=self.chain.rows(selection.state, np.asarray(rows, np.int64)),
        )
        if not goes_on:
            return state, self._show_best(state)
        source = [0] * len(rows) if first else rows
        ask = Forward(
            keep=position,
            tokens=np.array([[candidates[i].tokens[-1].id] for i in goes_on]),
            rows=np.asarray(source),
        )
        return state, Step(ask={"target": ask})

    def _show_best(self, state: _State) -> Step:
        scores = [c.score(self.by) for c in state.candidates]
        best = state.candidates[int(np.argmax(scores))]
        tokens = best.tokens[:-1] if best.finish == "eos" else best.tokens
        return Step(
            edit=Edit(keep=0, tokens=tokens),
            finish=best.finish,
            note={"best_of_n": {"scores": scores, "chosen": best.index}},
        )

    @staticmethod
    def _text(request: Request, candidate: _Candidate) -> IntArray:
        fresh = np.array([t.id for t in candidate.tokens], np.int64)
        return np.concatenate([request.prompt, fresh])


def _repeat(logits: Any, times: int) -> Any:
    return array_namespace(logits).concat([logits] * times, axis=0)
