"""Beam search: keep the likeliest few texts at every length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..array import array_namespace, asarray_like, to_numpy
from ..errors import UsageError
from ..logits import Chain
from ..model import Array, Capability, Forward, IntArray, Output
from ..ops import log_softmax, top_k
from .rng import Rng
from .types import Edit, Request, Step, Token


@dataclass(frozen=True, kw_only=True)
class Beam:
    """A text under construction: its tokens and the sum of their log-probabilities."""

    tokens: tuple[Token, ...] = ()
    logprob: float = 0.0

    def normalised(self, length_penalty: float, ended: bool) -> float:
        """Return the score that finished texts are compared by; the end token counts as one."""
        length = len(self.tokens) + ended
        return self.logprob / max(length, 1) ** length_penalty


@dataclass(frozen=True, kw_only=True)
class _State:
    request: Request
    beams: tuple[Beam, ...]
    done: tuple[tuple[float, Beam], ...]  # finished texts, best first
    shown: int


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
        state = _State(request=request, beams=(Beam(),), done=(), shown=0)
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        request = state.request
        logprobs, candidates = self._candidates(state, out["target"].logits, rng)
        live: list[tuple[int, Beam]] = []
        done = list(state.done)
        for rank, (row, token, total) in enumerate(candidates):
            parent = state.beams[row]
            if token in request.eos_ids:
                # An end that is not among the best few would not have been kept as a text either.
                if rank < self.beams:
                    ended = Beam(tokens=parent.tokens, logprob=total)
                    done.append((ended.normalised(self.length_penalty, True), ended))
                continue
            if len(live) < self.beams:
                gained = total - parent.logprob
                piece = Token(id=token, raw_logprob=logprobs[row, token], logprob=gained)
                live.append((row, Beam(tokens=(*parent.tokens, piece), logprob=total)))
        done = sorted(done, key=lambda pair: -pair[0])[: self.beams]
        if request.trace is not None and live:
            live = self._traced(state, live, out["target"].logits, rng)
        beams = tuple(beam for _, beam in live)
        state = replace(state, beams=beams, done=tuple(done))
        length = len(beams[0].tokens) if beams else 0
        # At the limit the live texts are cut and compete as they are, however many have ended.
        if length >= request.max_tokens:
            return self._finish(state, cut=beams)
        if not beams or self._settled(state):
            return self._finish(state)
        return self._go_on(state, [row for row, _ in live])

    def _candidates(
        self, state: _State, logits: Array, rng: Rng
    ) -> tuple[_Rawness, list[tuple[int, int, float]]]:
        """Return the best (row, token, total log-probability).

        Enough of them that ``beams`` go on even if every end token of every text is among them.
        """
        request, beams = state.request, state.beams
        texts = _texts(state)
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
        width = min(max(2, 1 + len(request.eos_ids)) * self.beams, vocab * len(beams))
        values, places = top_k(xp.reshape(total, (-1,)), width)
        pairs = zip(to_numpy(places).tolist(), to_numpy(values).tolist(), strict=True)
        best = [(at // vocab, at % vocab, value) for at, value in pairs if value > -np.inf]
        return _Rawness(logits if request.logprobs is not None else None), best

    def _traced(
        self, state: _State, live: list[tuple[int, Beam]], logits: Array, rng: Rng
    ) -> list[tuple[int, Beam]]:
        """Return the live texts, the last token of each with an account of the chain."""
        request, texts = state.request, _texts(state)
        position = len(texts[0])
        rows = [row for row, _ in live]
        traces = self.chain.explain(
            to_numpy(logits)[rows],
            history=[texts[row] for row in rows],
            uniforms=lambda at, key: rng.uniform(request.row + rows[at], position, draw=key),
            n=request.trace or 0,
            tokens=[beam.tokens[-1].id for _, beam in live],
        )
        return [
            (row, replace(b, tokens=(*b.tokens[:-1], replace(b.tokens[-1], trace=trace))))
            for (row, b), trace in zip(live, traces, strict=True)
        ]

    def _settled(self, state: _State) -> bool:
        if len(state.done) < self.beams:
            return False
        if self.early_stopping:
            return True
        best_live = max(b.normalised(self.length_penalty, False) for b in state.beams)
        return state.done[-1][0] >= best_live

    def _finish(self, state: _State, cut: tuple[Beam, ...] = ()) -> tuple[_State, Step]:
        ends = [(score, "eos", beam) for score, beam in state.done]
        ends += [(b.normalised(self.length_penalty, False), "length", b) for b in cut]
        _, reason, best = max(ends, key=lambda end: end[0])
        edit = Edit(keep=state.shown, tokens=best.tokens[state.shown :])
        return state, Step(edit=edit, finish=reason)

    def _go_on(self, state: _State, rows: list[int]) -> tuple[_State, Step]:
        first = state.beams[0].tokens
        shared = len(first)
        for other in [b.tokens for b in state.beams[1:]] + [b.tokens for _, b in state.done]:
            ids = zip(first[:shared], other, strict=False)
            same = next((i for i, (x, y) in enumerate(ids) if x.id != y.id), None)
            shared = min(shared, len(other)) if same is None else same
        edit = None
        if shared > state.shown:
            edit = Edit(keep=state.shown, tokens=first[state.shown : shared])
            state = replace(state, shown=shared)
        keep = len(state.request.prompt) + len(first) - 1
        ask = Forward(
            keep=keep,
            tokens=np.array([[b.tokens[-1].id] for b in state.beams]),
            rows=np.asarray(rows),
        )
        return state, Step(ask={"target": ask}, edit=edit)


def _texts(state: _State) -> list[IntArray]:
    """Return prompt and tokens of each live text, (T,) each."""
    prompt = state.request.prompt
    tokens = [np.array([t.id for t in beam.tokens], np.int64) for beam in state.beams]
    return [np.concatenate([prompt, ids]) for ids in tokens]


class _Rawness:
    """Raw log-probabilities of single tokens, computed only when somebody asks."""

    def __init__(self, logits: Array | None) -> None:
        self._host = None if logits is None else to_numpy(log_softmax(logits))

    def __getitem__(self, place: tuple[int, int]) -> float | None:
        return None if self._host is None else float(self._host[place])
