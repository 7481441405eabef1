"""Beam search: keep the likeliest few texts at every length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..array import array_namespace, asarray_like, to_numpy
from ..errors import UsageError
from ..logits import Chain
from ..model import Array, Capability, Forward, Output
from ..ops import log_softmax, top_k
from .beams import Beams, Candidate, candidates_needed, edit_to
from .rng import Rng
from .types import Request, Step, Token


@dataclass(frozen=True, kw_only=True)
class _State:
    request: Request
    beams: Beams
    shown: tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Keep the ``beams`` likeliest texts; return the finished one with the best score.

    A finished text's score is the sum of its log-probabilities, that of the end token included,
    over its length to the power of ``length_penalty``. What all surviving texts share is shown at
    once; the rest when the search ends.

    Parameters
    ----------
    beams : int
        Texts kept, 1..128; 1 is greedy decoding.
    length_penalty : float
        0: none, short texts win; 1: mean log-probability; above 1: favours long texts.
    early_stopping : bool
        True: stop as soon as ``beams`` texts have ended. False: go on while a live text could
        still overtake the worst of them, judged by its present score.
    chain : Chain
        Stages applied to the logits before the log-probabilities are taken (penalties, bias).
        A stage with a state of its own (mirostat) begins anew at every token.

    Notes
    -----
    Scores and stopping follow transformers' ``generate(num_beams=..., do_sample=False)``, so the
    texts are equal on equal logits. A chain that removes tokens (top-k) limits the search to what
    it leaves.

    References
    ----------
    Graves, "Sequence transduction with recurrent neural networks", arXiv:1211.3711.
    """

    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        if not 1 <= self.beams <= 128:
            raise UsageError(f"beam: beams must be in 1..128, got {self.beams}")
        if not -10 <= self.length_penalty <= 10:
            raise UsageError(
                f"beam: length_penalty must be in [-10, 10], got {self.length_penalty}"
            )

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS | Capability.ROWS | Capability.FORK}

    @property
    def max_rows(self) -> int:
        return self.beams

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        state = _State(request=request, beams=Beams(), shown=())
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        request = state.request
        logprobs, candidates = self._candidates(state, out["target"].logits, rng)

        def token(candidate: Candidate, gained: float) -> Token:
            row, chosen, _ = candidate
            return Token(id=chosen, raw_logprob=logprobs[row, chosen], logprob=gained)

        beams, chosen = state.beams.grow(
            candidates,
            token,
            width=self.beams,
            eos_ids=request.eos_ids,
            length_penalty=self.length_penalty,
        )
        if request.trace is not None and chosen:
            traces = self._traces(state, chosen, out["target"].logits, rng)
            beams = beams.with_traces(traces)
        state = replace(state, beams=beams)
        # At the limit the live texts are cut and compete as they are, however many have ended.
        cut = beams.length >= request.max_tokens
        early = self.early_stopping
        if cut or not beams.live:
            return self._finish(state, cut=cut)
        if beams.settled(self.beams, self.length_penalty, early_stopping=early):
            return self._finish(state, cut=False)
        return self._go_on(state, [row for row, _, _ in chosen])

    def _candidates(
        self, state: _State, logits: Array, rng: Rng
    ) -> tuple[_Rawness, list[Candidate]]:
        """Return the best continuations, enough that ``beams`` go on whatever ends."""
        request, beams = state.request, state.beams.live
        texts = [beam.text(request) for beam in beams]
        position = len(texts[0])
        filtered = self.chain.apply(
            logits,
            history=texts,
            uniforms=lambda row, key: rng.uniform(request.row + row, position, draw=key),
        )
        xp = array_namespace(logits)
        total = log_softmax(filtered) + asarray_like(
            np.array([[b.logprob] for b in beams], np.float32), filtered
        )
        vocab = int(total.shape[-1])
        width = min(candidates_needed(self.beams, request.eos_ids), vocab * len(beams))
        values, places = top_k(xp.reshape(total, (-1,)), width)
        pairs = zip(to_numpy(places).tolist(), to_numpy(values).tolist(), strict=True)
        best = [(at // vocab, at % vocab, value) for at, value in pairs if value > -np.inf]
        return _Rawness(logits if request.logprobs is not None else None), best

    def _traces(
        self, state: _State, chosen: list[Candidate], logits: Array, rng: Rng
    ) -> Sequence[Mapping[str, Any]]:
        """Return an account of the chain for each text that goes on."""
        request = state.request
        rows = [row for row, _, _ in chosen]
        texts = [state.beams.live[row].text(request) for row in rows]
        position = len(texts[0])
        return self.chain.explain(
            to_numpy(logits)[rows],
            history=texts,
            uniforms=lambda at, key: rng.uniform(request.row + rows[at], position, draw=key),
            n=request.trace or 0,
            tokens=[token for _, token, _ in chosen],
        )

    def _finish(self, state: _State, *, cut: bool) -> tuple[_State, Step]:
        reason, best = state.beams.best(self.length_penalty, cut=cut)
        return state, Step(edit=edit_to(state.shown, best.tokens), finish=reason)

    def _go_on(self, state: _State, rows: list[int]) -> tuple[_State, Step]:
        shared = state.beams.shared()
        edit = edit_to(state.shown, shared)
        state = replace(state, shown=shared)
        ask = Forward(
            keep=len(state.request.prompt) + state.beams.length - 1,
            tokens=np.array([[b.tokens[-1].id] for b in state.beams.live]),
            rows=np.asarray(rows),
        )
        return state, Step(ask={"target": ask}, edit=edit)


class _Rawness:
    """Raw log-probabilities of single tokens, computed only when somebody asks."""

    def __init__(self, logits: Array | None) -> None:
        self._host = None if logits is None else to_numpy(log_softmax(logits))

    def __getitem__(self, place: tuple[int, int]) -> float | None:
        return None if self._host is None else float(self._host[place])
