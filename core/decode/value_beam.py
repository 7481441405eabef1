"""Value-guided beam search: sample on, keep the texts that look most likely to end well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..array import Array, array_namespace
from ..errors import UsageError
from ..logits import Chain
from ..model import PAD, Capability, Forward, Output
from ..values import ValueHead, read_value_head
from .beams import common, edit_to
from .rng import Rng
from .sample import token_of
from .types import Request, Step, Token


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A candidate of the running step.

    Attributes
    ----------
    tokens : tuple of Token
        Generated so far, the end token included.
    begun : int
        How many of them are older than this step.
    key : int
        Row of its random numbers.
    row : int
        Row of the cache that holds it; -1 when it had ended before this step.
    score : float
        At its last token.
    waits : bool
        Its step is done; others' may not be.
    finish : str or None
        Why it ended.
    logits : float array (1, V) or None
        What comes after its step.
    """

    tokens: tuple[Token, ...] = ()
    begun: int = 0
    key: int = 0
    row: int = 0
    score: float = -np.inf
    waits: bool = False
    finish: str | None = None
    logits: Array | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)

    @property
    def visible(self) -> tuple[Token, ...]:
        return self.tokens[:-1] if self.finish == "eos" else self.tokens

    @property
    def mean_logprob(self) -> float:
        return float(np.mean([t.raw_logprob for t in self.tokens if t.raw_logprob is not None]))


@dataclass(frozen=True, kw_only=True)
class _State:
    request: Request
    texts: tuple[_Text, ...] = ()
    shown: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ValueBeam:
    """Sample ``candidates`` continuations, keep the ``beams`` of highest value, and go on.

    Each of the kept texts is continued by ``candidates / beams`` sampled steps; a step ends with
    ``step_tokens`` tokens, with a token that holds ``delimiter``, or with the text. The value of a
    candidate is that of its last token. Ended texts compete with the value at their end token and
    are carried unchanged. The search ends when all kept texts have, and the one of highest value
    is shown; what all of them share is shown before.

    Parameters
    ----------
    value_file : str, optional
        A value head, made by ``steersman train value`` for the target's weights. In a profile the
        path is relative to the profile's file. None: the mean log-probability of the text under
        the model itself stands in for the value, a baseline that needs no training.
    candidates : int
        Texts continued at a time, 1..256; a multiple of ``beams``.
    beams : int
        Texts kept after each step.
    step_tokens : int
        Most tokens of a step, from 1: a search token by token.
    delimiter : str
        A token that holds it ends a step; empty: none does. Use "\\n" with some hundred
        ``step_tokens`` for a search line by line.
    dedup : bool
        True: of equal candidates all but the first rank after all others.
    chain : Chain
        Stages that continuations are drawn with. A stage with a state of its own (mirostat) begins
        anew at every token.

    Notes
    -----
    Candidate ``i`` draws as row ``i``: with one candidate this is plain sampling, number for
    number. Of equal values the earlier candidate wins. One call per token with ``candidates`` rows;
    texts whose step has ended wait for the others. A head knows the sampling it was trained on
    (temperature, truncation); another chain asks it about texts it has not seen the like of.

    References
    ----------
    Lee et al., "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving
    Capabilities of Large Language Models", arXiv:2407.12863; the search is that of Yu et al.,
    "OVM, Outcome-supervised Value Models for Planning in Mathematical Reasoning",
    arXiv:2311.09724, of which steps of one token are a case.
    """

    value_file: str | None = field(default=None, metadata={"path": True})
    candidates: int = 20
    beams: int = 4
    step_tokens: int = 1
    delimiter: str = ""
    dedup: bool = False
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= 256:
            raise UsageError(f"value_beam: candidates must be in 1..256, got {self.candidates}")
        if self.beams < 1 or self.candidates % self.beams:
            raise UsageError(
                f"value_beam: beams must divide candidates, got {self.beams} and {self.candidates}"
            )
        if self.step_tokens < 1:
            raise UsageError(f"value_beam: step_tokens must be at least 1, got {self.step_tokens}")

    @property
    def requires(self) -> Mapping[str, Capability]:
        needs = Capability.LAST_LOGITS | Capability.ROWS | Capability.FORK
        if self.value_file is not None:
            needs |= Capability.HIDDEN | Capability.HEAD
        return {"target": needs}

    @property
    def max_rows(self) -> int:
        return self.candidates

    @cached_property
    def head(self) -> ValueHead | None:
        """The value head, read from its file when first needed."""
        return None if self.value_file is None else read_value_head(Path(self.value_file))

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        if self.head is not None:
            self.head.check(request.models["target"].info, where=str(self.value_file))
        else:
            request = replace(request, logprobs=request.logprobs or 0)
        state = _State(request=request)
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        answer = out["target"]
        if not state.texts:
            start = _Text(logits=answer.logits)
            return self._branch(state, [start] * self.beams, rng)
        texts = self._judged(state, answer)
        if all(text.waits for text in texts):
            return self._select(state, texts, rng)
        going = [text for text in texts if not text.waits]
        logits = _joined([_row(answer.logits, text.row) for text in going])
        drawn = iter(self._drawn(state.request, going, logits, rng))
        texts = [text if text.waits else next(drawn) for text in texts]
        return replace(state, texts=tuple(texts)), self._feed(state.request, texts)

    def _branch(
        self, state: _State, kept: Sequence[_Text], rng: Rng, **shown: Any
    ) -> tuple[_State, Step]:
        """Begin a step: draw the first token of several candidates per live text."""
        share = self.candidates // self.beams
        pool: list[_Text] = []
        for place, text in enumerate(kept):
            if text.finish is not None:
                pool.append(replace(text, row=-1))
                continue
            fresh = replace(text, begun=len(text.tokens), waits=False)
            pool += [replace(fresh, key=place * share + i) for i in range(share)]
        live = [text for text in pool if text.row >= 0]
        logits = _joined([text.logits for text in live])
        drawn = self._drawn(state.request, live, logits, rng)
        sources = [text.row for text in live]
        numbered = iter([replace(text, row=row, logits=None) for row, text in enumerate(drawn)])
        texts = tuple(text if text.row < 0 else next(numbered) for text in pool)
        step = self._feed(state.request, texts, sources=sources)
        return replace(state, texts=texts), replace(step, **shown)

    def _drawn(
        self, request: Request, texts: Sequence[_Text], logits: Array, rng: Rng
    ) -> list[_Text]:
        """Return texts one token longer; row ``i`` of the logits is that of text ``i``."""
        histories = [
            np.concatenate([request.prompt, np.array(text.ids, np.int64)]) for text in texts
        ]
        selection = self.chain.select(
            logits,
            history=histories,
            uniforms=lambda row, key: rng.uniform(
                request.row + texts[row].key, len(histories[row]), draw=key
            ),
            logprobs=request.logprobs,
            trace=request.trace,
        )
        return [
            replace(text, tokens=(*text.tokens, token_of(selection, row)))
            for row, text in enumerate(texts)
        ]

    def _feed(
        self, request: Request, texts: Sequence[_Text], *, sources: list[int] | None = None
    ) -> Step:
        """Return the step that feeds the last token of every text whose step goes on."""
        live = [text for text in texts if text.row >= 0]
        begun = len(request.prompt)
        lengths = [begun + len(text.tokens) - (not text.waits) for text in live]
        ask = Forward(
            keep=np.array(lengths),
            tokens=np.array([[PAD if text.waits else text.tokens[-1].id] for text in live]),
            rows=None if sources is None else np.array(sources),
            hidden=() if self.head is None else (self.head.layer,),
        )
        return Step(ask={"target": ask})

    def _judged(self, state: _State, answer: Output) -> list[_Text]:
        """Return the texts with the values of the tokens just fed, and whether their step ends."""
        request, head = state.request, self.head
        values = None
        if head is not None:
            hidden = answer.hidden[head.layer][:, 0, :]
            values = head.values(request.models["target"], hidden)
        judged = []
        for text in state.texts:
            if not text.waits:
                score = text.mean_logprob if values is None else float(values[text.row])
                text = replace(text, score=score, finish=self._end(request, text))
                text = replace(text, waits=text.finish is not None or self._step_ends(state, text))
            judged.append(text)
        # What the engine returned may be gone after its next call, so a text that waits for the
        # others takes a copy; where nobody waits, the logits are used at once.
        own = not all(text.waits for text in judged)
        return [
            replace(text, logits=_row(answer.logits, text.row, own=own))
            if text.waits and text.finish is None and text.logits is None
            else text
            for text in judged
        ]

    @staticmethod
    def _end(request: Request, text: _Text) -> str | None:
        if text.tokens[-1].id in request.eos_ids:
            return "eos"
        return "length" if len(text.tokens) >= request.max_tokens else None

    def _step_ends(self, state: _State, text: _Text) -> bool:
        if len(text.tokens) - text.begun >= self.step_tokens:
            return True
        if not self.delimiter:
            return False
        tokenizer = state.request.models["target"].tokenizer
        return self.delimiter.encode() in tokenizer.token_bytes(text.tokens[-1].id)

    def _select(self, state: _State, texts: Sequence[_Text], rng: Rng) -> tuple[_State, Step]:
        """Keep the best candidates; show what they share, or the best one when all have ended."""
        copies, seen = [], set()
        for text in texts:
            copies.append(self.dedup and text.ids in seen)
            seen.add(text.ids)
        # Sorting is stable: of equal values the earlier candidate stands first.
        order = sorted(range(len(texts)), key=lambda i: (copies[i], -texts[i].score))[: self.beams]
        kept = [texts[i] for i in order]
        values = [round(text.score, 6) for text in kept]
        note = {"value_beam": {"kept": order, "values": values}}
        if all(text.finish is not None for text in kept):
            # A copy that ranks behind a distinct text may have the higher value.
            best = max(kept, key=lambda text: text.score)
            edit = edit_to(state.shown, best.visible)
            return state, Step(edit=edit, finish=best.finish, note=note)
        shared = kept[0].visible
        for text in kept[1:]:
            shared = shared[: common(shared, text.visible)]
        edit = edit_to(state.shown, shared)
        state = replace(state, shown=shared)
        return self._branch(state, kept, rng, edit=edit, note=note)


def _row(logits: Array, row: int, *, own: bool = False) -> Array:
    """Return one row (1, V) of logits (B, V); ``own``: as a copy."""
    part = logits[row : row + 1, :]
    return array_namespace(part).asarray(part, copy=True) if own else part


def _joined(parts: Sequence[Array]) -> Array:
    """Return rows (1, V) as one array (n, V)."""
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(list(parts), axis=0)
