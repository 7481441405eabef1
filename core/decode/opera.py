"""OPERA: beam search that distrusts texts which lean on one of their own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..array import array_namespace, asarray_like, to_numpy
from ..errors import UsageError
from ..logits import Chain
from ..logits.stage import check_integer, check_number
from ..model import Array, Capability, Forward, Output
from ..ops import log_softmax, top_k
from .beams import Beams, Candidate, candidates_needed, edit_to
from .overtrust import FloatRow, grown_columns, most_frequent, overtrust, strongest_heads
from .retrospection import Moment, Probe, Search, inherited, rewound
from .rng import Rng
from .types import Request, Step, Token

MAX_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Opera:
    """Beam search with an over-trust penalty and retrospection, from the last layer's attention.

    In every step the ``candidates`` likeliest tokens of each beam are tried. A candidate after
    which one earlier token of the response draws the attention of all later ones is penalised by
    that column's score. When the same column stands out more than ``threshold`` times in every
    beam, the search goes back to just behind it and chooses otherwise. During the first tokens,
    candidates that look at the evidence (``Request.evidence``) get a bonus instead.

    Parameters
    ----------
    beams : int
        Texts kept, 1..64. The paper's search needs 2 or more; 1 is our greedy variant.
    candidates : int
        Tokens tried per beam, 1..64. With 1 the penalty has no effect: greedy search with
        retrospection, the authors' cheap setting (with ``threshold`` 25).
    alpha : float >= 0
        Weight of penalty and bonus.
    sigma : float > 0
        Scale of attention weights: a column grows where they exceed ``1 / sigma``.
    scale : float > 0
        Factor of a column's score, as in the released code; the paper has none (1).
    window : int
        Only the last so many tokens of the response can stand out.
    threshold : int or None
        Retrospection happens above this many times; None: never.
    max_rewinds : int
        Times that one position may be chosen again, 0..15.
    first_column : int
        Columns before this one cause no retrospection.
    bonus_steps : int
        Tokens for which the bonus replaces the penalty.
    bonus_weight : float >= 0
        Factor of the bonus, the attention that a candidate pays to the evidence.
    renormalise : {"candidates", "full"}
        Compare beams by probabilities among their candidates, as the released code does (this
        hides how much probability those hold), or by their whole distributions less the penalty.
    faithful_history : bool
        Count columns per place in the beam, as the released code does, not per text.
    length_penalty, early_stopping
        As for beam search.
    chain : Chain
        Stages applied to the logits before candidates are taken. A stage with a state of its own
        (mirostat) begins anew at every token.

    Notes
    -----
    Trying a candidate is already the next step for the one that is kept, so a token costs one call
    of ``beams * candidates`` rows. A rewind costs two small calls more. All calls together are at
    most ``max_tokens * (1 + max_rewinds)``; no rewind is begun that could go beyond. Every position
    keeps a record for going back (texts, column scores, history), in all about 16 bytes times
    ``beams * n * n`` for ``n`` tokens: 20 MB for 5 beams of 512. No logits or keys are kept: what a
    restored text lacks in the cache is computed again.

    A (beam, token) pair once taken back is never chosen at that position again.

    References
    ----------
    Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via
    Over-Trust Penalty and Retrospection-Allocation", arXiv:2311.17911.
    """

    beams: int = 5
    candidates: int = 5
    alpha: float = 1.0
    sigma: float = 50.0
    scale: float = 1e-7
    window: int = 512
    threshold: int | None = 15
    max_rewinds: int = 5
    first_column: int = 10
    bonus_steps: int = 10
    bonus_weight: float = 1.0
    renormalise: Literal["candidates", "full"] = "candidates"
    faithful_history: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        name = "opera"
        check_integer(name, "beams", self.beams, 1, 64)
        check_integer(name, "candidates", self.candidates, 1, 64)
        if self.beams * self.candidates > MAX_ROWS:
            raise UsageError(
                f"opera: beams times candidates must be at most {MAX_ROWS}, "
                f"got {self.beams * self.candidates}"
            )
        check_number(name, "alpha", self.alpha, 0, 1e6)
        check_number(name, "sigma", self.sigma, 0, 1e6, low_open=True)
        check_number(name, "scale", self.scale, 0, 1e6, low_open=True)
        check_integer(name, "window", self.window, 1)
        if self.threshold is not None:
            check_integer(name, "threshold", self.threshold, 0)
        check_integer(name, "max_rewinds", self.max_rewinds, 0, 15)
        check_integer(name, "first_column", self.first_column, 0)
        check_integer(name, "bonus_steps", self.bonus_steps, 0)
        check_number(name, "bonus_weight", self.bonus_weight, 0, 1e6)
        if self.renormalise not in ("candidates", "full"):
            raise UsageError(
                f"opera: renormalise must be candidates or full, got {self.renormalise!r}"
            )
        check_number(name, "length_penalty", self.length_penalty, -10, 10)

    @property
    def requires(self) -> Mapping[str, Capability]:
        needs = Capability.LAST_LOGITS | Capability.ROLLBACK | Capability.ATTENTIONS
        return {"target": needs | Capability.ROWS | Capability.FORK}

    @property
    def max_rows(self) -> int:
        # The first step tries at least as many tokens as there are beams.
        return self.beams * self.candidates

    def init(self, request: Request, rng: Rng) -> tuple[Search, Step]:
        empty = np.empty(0, np.float64)
        first = Moment(beams=Beams(), columns=(empty,), history=((),), sources=(0,))
        state = Search(request=request, moments=(first,))
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: Search, out: Mapping[str, Output], rng: Rng) -> tuple[Search, Step]:
        answer = out["target"]
        if state.phase == "probe":
            return self._judge(state, answer, rng)
        if state.phase == "rewound":
            return self._choose_again(state, answer, rng)
        if state.phase == "chosen":
            rows = self._attention(state, answer)
            columns = tuple(
                self._grown(state, state.moments[-2].columns[source], row)
                for source, row in zip(state.now.sources, rows, strict=True)
            )
            now = replace(state.now, columns=columns)
            state = replace(state, moments=(*state.moments[:-1], now))
        assert answer.logits is not None
        return self._try(state, answer.logits, range(len(state.now.beams.live)), rng)

    # -- one position ----------------------------------------------------------------------------

    def _try(
        self, state: Search, logits: Array, rows: Sequence[int], rng: Rng
    ) -> tuple[Search, Step]:
        """Ask for every candidate that may follow the live texts; show what these share.

        ``logits`` (b, V) follow the texts; ``rows`` are the texts' rows in the cache.
        """
        live = state.now.beams.live
        scores = self._scores(state, logits, rng)
        first = not live[0].tokens
        width = max(self.beams, self.candidates) if first else self.candidates
        values, ids = (to_numpy(part) for part in top_k(scores, width))
        probes = tuple(
            Probe(beam=b, token=token, score=float(value))
            for b in range(len(live))
            for token, value in zip(
                self._tokens(state, logits, b, ids[b][values[b] > -np.inf], rng),
                values[b],
                strict=False,
            )
        )
        ask = state.feed(
            rows=[rows[probe.beam] for probe in probes],
            tokens=[probe.token.id for probe in probes],
        )
        shared = state.now.beams.shared()
        edit = edit_to(state.shown, shared)
        state = replace(state, probes=probes, phase="probe", shown=shared, calls=state.calls + 1)
        return state, Step(ask={"target": ask}, edit=edit)

    def _judge(self, state: Search, answer: Output, rng: Rng) -> tuple[Search, Step]:
        """Penalise the candidates that were tried; go back, or keep the best texts."""
        request, now = state.request, state.now
        rows = self._attention(state, answer)
        grown, penalties, standing = [], np.empty(len(rows)), []
        for i, (probe, row) in enumerate(zip(state.probes, rows, strict=True)):
            columns = self._grown(state, now.columns[probe.beam], row)
            penalty, column = overtrust(columns, window=self.window, scale=self.scale)
            if len(columns) <= self.bonus_steps:
                looked = sum(row[begin:end].sum() for begin, end in request.evidence)
                penalty = -self.bonus_weight * float(looked)
            grown.append(columns)
            standing.append(column)
            penalties[i] = penalty
        members = [
            [i for i, probe in enumerate(state.probes) if probe.beam == b]
            for b in range(len(now.beams.live))
        ]
        columns_now = [most_frequent([standing[i] for i in group]) for group in members]
        history = tuple(
            (*past, column) for past, column in zip(now.history, columns_now, strict=True)
        )
        back = self._back_to(state, history, columns_now)
        if back is not None:
            return rewound(state, back)
        candidates, by_pair = self._ranked(state, members, penalties)
        beams, chosen = now.beams.grow(
            candidates,
            lambda pick, gained: replace(
                state.probes[by_pair[pick[0], pick[1]]].token, logprob=gained
            ),
            width=self.beams,
            eos_ids=request.eos_ids,
            length_penalty=self.length_penalty,
        )
        kept = [by_pair[beam, token] for beam, token, _ in chosen]
        moment = Moment(
            beams=beams,
            columns=tuple(grown[i] for i in kept),
            history=inherited(
                history, [beam for beam, _, _ in chosen], by_place=self.faithful_history
            ),
            sources=tuple(beam for beam, _, _ in chosen),
        )
        state = replace(state, moments=(*state.moments, moment))
        if self._ends(state):
            return self._finish(state)
        assert answer.logits is not None
        places = asarray_like(np.array(kept), answer.logits)
        logits = array_namespace(answer.logits).take(answer.logits, places, axis=0)
        return self._try(state, logits, kept, rng)

    def _ranked(
        self, state: Search, members: Sequence[Sequence[int]], penalties: FloatRow
    ) -> tuple[list[Candidate], dict[tuple[int, int], int]]:
        """Return the best continuations, and which probe each pair of beam and token was."""
        candidates: list[Candidate] = []
        by_pair: dict[tuple[int, int], int] = {}
        for b, group in enumerate(members):
            beam = state.now.beams.live[b]
            scores = np.array([state.probes[i].score for i in group])
            scores = scores - self.alpha * penalties[list(group)]
            if self.renormalise == "candidates":
                scores = log_softmax(scores)
            for i, score in zip(group, scores.tolist(), strict=True):
                token = state.probes[i].token.id
                by_pair[b, token] = i
                candidates.append((b, token, beam.logprob + score))
        candidates.sort(key=lambda pick: (-pick[2], pick[0], pick[1]))
        needed = candidates_needed(self.beams, state.request.eos_ids)
        return candidates[:needed], by_pair

    # -- going back ------------------------------------------------------------------------------

    def _back_to(
        self, state: Search, history: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> int | None:
        """Return the position to choose again, or None to go on."""
        if self.threshold is None:
            return None
        column = most_frequent(columns)
        if column < self.first_column:
            return None
        if any(list(past).count(column) <= self.threshold for past in history):
            return None
        limit = state.request.max_tokens
        for position in (column + 1, column):
            if state.rewinds.get(position, 0) < self.max_rewinds:
                fits = state.calls + 1 + limit - position <= limit * (1 + self.max_rewinds)
                return position if fits and 1 <= position < state.position else None
        return None

    def _choose_again(self, state: Search, answer: Output, rng: Rng) -> tuple[Search, Step]:
        """Choose the best pairs not taken before, over the whole vocabulary, without penalty."""
        request, now = state.request, state.now
        assert answer.logits is not None
        scores = self._scores(state, answer.logits, rng)
        needed = candidates_needed(self.beams, request.eos_ids)
        values, ids = (to_numpy(part) for part in top_k(scores, needed))
        candidates = [
            (b, int(token), beam.logprob + float(value))
            for b, beam in enumerate(now.beams.live)
            for token, value in zip(ids[b], values[b], strict=True)
            if value > -np.inf
        ]
        candidates.sort(key=lambda pick: (-pick[2], pick[0], pick[1]))

        def token(pick: Candidate, gained: float) -> Token:
            (made,) = self._tokens(state, answer.logits, pick[0], np.array([pick[1]]), rng)
            return replace(made, logprob=gained)

        beams, chosen = now.beams.grow(
            candidates[:needed],
            token,
            width=self.beams,
            eos_ids=request.eos_ids,
            length_penalty=self.length_penalty,
        )
        parents = [beam for beam, _, _ in chosen]
        moment = Moment(
            beams=beams,
            columns=(),  # known once the chosen tokens have been fed
            history=inherited(now.history, parents, by_place=self.faithful_history),
            sources=tuple(parents),
        )
        ask = state.feed(rows=parents, tokens=[pick[1] for pick in chosen])
        state = replace(
            state, moments=(*state.moments, moment), phase="chosen", calls=state.calls + 1
        )
        if self._ends(state):
            return self._finish(state)
        return state, Step(ask={"target": ask})

    # -- pieces ----------------------------------------------------------------------------------

    def _scores(self, state: Search, logits: Array, rng: Rng) -> Array:
        """Return log-probabilities (b, V) after the chain, without what was taken back here."""
        request, live = state.request, state.now.beams.live
        position = len(request.prompt) + state.position
        scores = log_softmax(
            self.chain.apply(
                logits,
                history=[beam.text(request) for beam in live],
                uniforms=lambda row, key: rng.uniform(request.row + row, position, draw=key),
            )
        )
        taken = state.excluded.get(state.position, frozenset())
        pairs = [(b, token) for b, token in taken if b < len(live)]
        if not pairs:
            return scores
        bans = np.zeros(tuple(scores.shape), np.float32)
        for b, token in pairs:
            bans[b, token] = -np.inf
        left = log_softmax(scores + asarray_like(bans, scores))
        # A chain that leaves few tokens may have none to offer but those taken back.
        return left if bool((to_numpy(left) > -np.inf).any(axis=-1).all()) else scores

    def _tokens(self, state: Search, logits: Array, b: int, ids: Any, rng: Rng) -> Sequence[Token]:
        """Return tokens that may follow text ``b``, with what was asked about them."""
        request, chosen = state.request, [int(i) for i in ids]
        row = logits[b : b + 1, :]
        raw = to_numpy(log_softmax(row))[0] if request.logprobs is not None else None
        traces: Sequence[Mapping[str, Any] | None] = [None] * len(chosen)
        if request.trace is not None and chosen:
            text = state.now.beams.live[b].text(request)
            traces = self.chain.explain(
                np.repeat(to_numpy(row), len(chosen), axis=0),
                history=[text] * len(chosen),
                uniforms=lambda _, key: rng.uniform(request.row + b, len(text), draw=key),
                n=request.trace,
                tokens=chosen,
            )
        return [
            Token(id=i, raw_logprob=None if raw is None else float(raw[i]), trace=trace)
            for i, trace in zip(chosen, traces, strict=True)
        ]

    @staticmethod
    def _attention(state: Search, answer: Output) -> FloatRow:
        """Return each row's newest attention over its text, (rows, T) on the host."""
        (attention,) = answer.attentions.values()
        return to_numpy(strongest_heads(attention)).astype(np.float64)

    def _grown(self, state: Search, columns: FloatRow, row: FloatRow) -> FloatRow:
        """Return a text's column scores after a token with attention ``row`` (T,)."""
        begin = len(state.request.prompt)
        return grown_columns(columns, row[begin : begin + len(columns) + 1], self.sigma)

    def _ends(self, state: Search) -> bool:
        beams = state.now.beams
        return (
            not beams.live
            or beams.length >= state.request.max_tokens
            or beams.settled(self.beams, self.length_penalty, early_stopping=self.early_stopping)
        )

    def _finish(self, state: Search) -> tuple[Search, Step]:
        beams = state.now.beams
        cut = beams.length >= state.request.max_tokens
        reason, best = beams.best(self.length_penalty, cut=cut)
        note = {"opera": {"calls": state.calls, "rewinds": sum(state.rewinds.values())}}
        return state, Step(edit=edit_to(state.shown, best.tokens), finish=reason, note=note)
