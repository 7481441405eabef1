"""The one decode loop.

A strategy yields a step; the loop makes the calls it asks for, hands back the answers, applies its
edit to the visible text and reports events. Everything that all strategies share lives here:
prompt chunks, prefix reuse, cancelling, stop strings, the step cap, incremental UTF-8 and timing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..array import array_namespace
from ..errors import BackendError
from ..model import Forward, Output, Session
from .events import (
    Alternative,
    Event,
    Finished,
    Note,
    Prefilled,
    Timings,
    TokenEvent,
    Withdrawn,
)
from .rng import Rng
from .sessions import reuse_prefix
from .text import TextAssembler, token_piece
from .types import Edit, Request, Strategy, Token


def decode(
    strategy: Strategy[Any],
    sessions: Mapping[str, Session],
    request: Request,
    rng: Rng,
    *,
    stop: Sequence[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Run ``strategy`` until it finishes, and yield what happens.

    Parameters
    ----------
    strategy : Strategy
    sessions : mapping of role to Session
        One per role in ``strategy.requires``; what they hold of the prompt is reused.
    request : Request
    rng : Rng
    stop : sequence of str
        Strings that end the text and are cut from it.
    cancelled : callable
        Polled before every call to a model, so between tokens and between prompt chunks.

    Yields
    ------
    Event
        The last one is :class:`Finished`, also after a cancel.

    Raises
    ------
    BackendError
        The strategy went on for more steps than any sound one needs.
    """
    run = _Run(sessions, request, stop, cancelled)
    state, step = strategy.init(request, rng)
    # Rewinding strategies take more steps than tokens; none that makes progress takes 50 times.
    for _ in range(1000 + 50 * request.max_tokens):
        if step.note:
            yield Note(values=step.note)
        if step.edit is not None:
            yield from run.edit(step.edit)
        reason = run.reason or step.finish
        if reason is None and cancelled():
            reason = "cancelled"
        if reason is not None or not step.ask:
            yield from run.finish(reason or "eos")
            return
        out: dict[str, Output] = {}
        for role, ask in step.ask.items():
            answer = yield from run.ask(role, ask)
            if answer is None:
                yield from run.finish("cancelled")
                return
            out[role] = answer
        run.answered()
        state, step = strategy.step(state, out, rng)
    raise BackendError(
        f"strategy {type(strategy).__name__}: no end after "
        f"{1000 + 50 * request.max_tokens} steps; it makes no progress"
    )


class _Run:
    """Bookkeeping of one call to :func:`decode`."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        request: Request,
        stop: Sequence[str],
        cancelled: Callable[[], bool],
    ) -> None:
        self._sessions = sessions
        self._request = request
        self._cancelled = cancelled
        self._text = TextAssembler(stop)
        self._tokenizer = request.models["target"].tokenizer
        self._ids: list[int] = []
        self._calls: Counter[str] = Counter()
        self._fresh = set(sessions)  # roles that have not seen the prompt yet
        self._cached = 0
        self._begun = time.perf_counter()
        self._prefilled: float | None = None
        self.reason: str | None = None

    def ask(self, role: str, ask: Forward) -> Generator[Event, None, Output | None]:
        """Make one call, a long prompt in chunks; None when cancelled in between."""
        session = self._sessions[role]
        first = role in self._fresh
        if not first:
            self._calls[role] += 1
            width = 0 if ask.tokens is None else len(ask.tokens[0])
            if width <= session.model.prefill_chunk:
                return session.forward(ask)
        self._fresh.discard(role)
        if first:
            ask, cached = reuse_prefix(session, ask)
            if role == "target":
                self._cached = cached
        report = first and role == "target"
        total = len(self._request.prompt)
        outputs: list[Output] = []
        for chunk in prompt_chunks(session, ask):
            if self._cancelled():
                return None
            outputs.append(session.forward(chunk))
            if report:
                done = min(total, int(session.lengths.max()))
                yield Prefilled(done=done, total=total, cached=self._cached)
        return _join(outputs, ask)

    def answered(self) -> None:
        """Note when the prompt was done."""
        if self._prefilled is None:
            self._prefilled = time.perf_counter()

    def edit(self, edit: Edit) -> Iterator[Event]:
        """Apply an edit to the visible text."""
        if not 0 <= edit.keep <= len(self._ids):
            raise BackendError(f"strategy: edit keeps {edit.keep} of {len(self._ids)} tokens")
        if edit.keep < len(self._ids):
            gone = len(self._ids) - edit.keep
            del self._ids[edit.keep :]
            yield Withdrawn(keep=edit.keep, tokens=gone, text=self._text.keep(edit.keep))
        for token in edit.tokens:
            yield self._append(token)
            if self._text.stopped_by is not None:
                self.reason = "stop"
                return

    def _append(self, token: Token) -> TokenEvent:
        piece = token_piece(token, self._tokenizer)
        self._ids.append(token.id)
        return TokenEvent(
            index=len(self._ids) - 1,
            id=token.id,
            bytes=piece,
            text=self._text.append(piece),
            raw_logprob=token.raw_logprob,
            logprob=token.logprob,
            top=tuple(
                Alternative(id=i, text=self._tokenizer.token_name(i), raw_logprob=lp)
                for i, lp in token.top
            ),
            trace=token.trace,
        )

    def finish(self, reason: str) -> Iterator[Event]:
        """Release held text and report the end."""
        now = time.perf_counter()
        prefilled = self._prefilled if self._prefilled is not None else now
        tail = self._text.finish()
        yield Finished(
            reason=reason,
            text=self._text.shown,
            tail=tail,
            token_ids=tuple(self._ids),
            stop=self._text.stopped_by,
            timings=Timings(
                prompt_tokens=len(self._request.prompt),
                cached_tokens=self._cached,
                prefill_s=prefilled - self._begun,
                generated_tokens=len(self._ids),
                decode_s=now - prefilled,
                calls=dict(self._calls),
            ),
        )


def prompt_chunks(session: Session, ask: Forward) -> Iterator[Forward]:
    """Cut a long one-row prompt into calls; anything else is one call.

    Attention weights of a prompt cannot be cut: later positions look at all earlier ones.
    """
    size = session.model.prefill_chunk
    tokens = None if ask.tokens is None else np.asarray(ask.tokens, np.int64)
    plain = (
        tokens is not None
        and len(tokens) == 1
        and ask.parents is None
        and ask.causal
        and not ask.attentions
    )
    if not plain or tokens is None or tokens.shape[1] <= size:
        yield ask
        return
    keep = int(np.asarray(ask.keep).reshape(-1)[0])
    path_length = 0 if ask.path is None else int((np.asarray(ask.path) >= 0).sum())
    for begin in range(0, tokens.shape[1], size):
        ends = begin + size >= tokens.shape[1]
        piece = Forward(
            keep=keep,
            tokens=tokens[:, begin : begin + size],
            logits="none" if ask.logits == "last" and not ends else ask.logits,
            hidden=ask.hidden,
        )
        if begin == 0:
            yield replace(piece, rows=ask.rows, path=ask.path)
        else:
            yield replace(piece, keep=keep + path_length + begin)


def _join(outputs: Sequence[Output], ask: Forward) -> Output:
    """Return the answers to the chunks of one call as the answer to that call."""
    if len(outputs) == 1:
        return outputs[0]
    logits = outputs[-1].logits
    if ask.logits == "all":
        logits = _concat([out.logits for out in outputs])
    hidden = {layer: _concat([out.hidden[layer] for out in outputs]) for layer in ask.hidden}
    return Output(logits=logits, hidden=hidden)


def _concat(parts: Sequence[Any]) -> Any:
    return array_namespace(*parts).concat(parts, axis=1)
