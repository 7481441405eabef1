"""The values that travel between a strategy, the loop and whoever listens.

A strategy never runs a model. It *asks* (:class:`Step.ask`) and is told the answer; it never prints
either, it *edits* the visible text (:class:`Edit`). The loop does both, so going back, drafting
ahead and forking are ordinary values instead of special engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..model import Capability, Forward, IntArray, Model, Output
from .rng import Rng


@dataclass(frozen=True, kw_only=True)
class Token:
    """One chosen token and what was known about it.

    Attributes
    ----------
    id : int
    raw_logprob : float or None
        Natural-log probability under the model's own, untouched distribution.
    logprob : float or None
        Natural-log probability under the distribution it was drawn from (after the chain).
    top : tuple of (id, raw logprob)
        The model's most likely tokens here, best first; empty unless asked for.
    piece : bytes or None
        Bytes to show instead of the token's own: a token that overlaps the prompt's end shows only
        what is new.
    trace : mapping or None
        JSON-able record of how the token came about (``Chain.explain``); None unless asked for.
    """

    id: int
    raw_logprob: float | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    piece: bytes | None = None
    trace: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Keep the first ``keep`` generated tokens, then append ``tokens``.

    A ``keep`` smaller than what stands withdraws text that was already shown.
    """

    keep: int
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a strategy wants next.

    Attributes
    ----------
    ask : mapping of role to Forward
        Calls to make before the next step; empty when finished.
    edit : Edit or None
        Change to the visible text, applied now.
    finish : str or None
        "eos" or "length" when the strategy is done; then ``ask`` is ignored.
    note : mapping
        Small JSON-able facts for the decision trace (drafted, accepted, rewound ...).
    """

    ask: Mapping[str, Forward] = field(default_factory=dict)
    edit: Edit | None = None
    finish: str | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a strategy is told about the text it continues.

    Attributes
    ----------
    prompt : int64 (T,)
    models : mapping of role to Model
        For pure functions (``head``, ``embed``, ``norm``, tokenizer); calls go through ``ask``.
    eos_ids : frozenset of int
        Ids that end the text; they are never part of an edit.
    max_tokens : int
        Most tokens that may be generated.
    context : int
        Positions that a row can hold, prompt included; no call may go beyond.
    logprobs : int or None
        None: no log-probabilities wanted; n: raw and final ones, and the n most likely tokens.
    row : int
        First key of the random numbers, so that texts of one batch differ.
    trace : int or None
        n: record in ``Token.trace`` what each stage changed, with the n likeliest tokens.
    evidence : tuple of (begin, end)
        Token ranges of the prompt that hold evidence (retrieved passages, a document).
    clock : callable
        Seconds from any fixed moment; strategies that adapt to the engine's speed read it.
    """

    prompt: IntArray
    models: Mapping[str, Model]
    eos_ids: frozenset[int]
    max_tokens: int
    context: int
    logprobs: int | None = None
    row: int = 0
    trace: int | None = None
    evidence: tuple[tuple[int, int], ...] = ()
    clock: Callable[[], float] = time.perf_counter


S = TypeVar("S")


class Strategy(Protocol[S]):
    """A way to decode. Its fields are hyperparameters; its state is an immutable value.

    ``requires`` maps roles ("target", "draft", ...) to capabilities; ``max_rows`` is the most rows
    each session must hold.
    """

    @property
    def requires(self) -> Mapping[str, Capability]: ...

    @property
    def max_rows(self) -> int: ...

    def init(self, request: Request, rng: Rng) -> tuple[S, Step]:
        """Return the first state and the first step."""

    def step(self, state: S, out: Mapping[str, Output], rng: Rng) -> tuple[S, Step]:
        """Return the next state and step, given the answers to the last ``ask``."""


class Resumable(Strategy[S], Protocol[S]):
    """A strategy that can go on from any text, so that another one may wrap it and rewind it.

    When it resumes, the target's cache holds the prompt and all of ``tokens`` but the last. A
    strategy that keeps soft tokens or several rows there is told by what it requires, one with open
    blocks has ``cached(state)``, and one that reads the prompt as other tokens says so by
    ``own_prompt = True``.
    """

    def resume(self, state: S, tokens: Sequence[Token], rng: Rng) -> tuple[S, Step]:
        """Return the state and step that go on after ``tokens``, the whole generated text.

        ``state`` is any state of the same request; what it learned (tables, costs) is kept. The
        step makes no edit, since the caller's text holds ``tokens`` already. Stages with a state of
        their own (mirostat) begin anew.
        """


def resumable(strategy: Any) -> bool:
    """Return whether ``strategy`` can go on from any text."""
    return callable(getattr(strategy, "resume", None))


def rewindable(strategy: Any) -> bool:
    """Return whether another strategy may ask the target about the text of ``strategy``.

    That takes one that can resume, and a cache that holds the text's own tokens, in one row, or
    tells how many of them it holds (:func:`cached_for_certain`).
    """
    if not resumable(strategy) or getattr(strategy, "own_prompt", False):
        return False
    needs = strategy.requires.get("target", Capability.NONE)
    if needs & Capability.BLOCK and not hasattr(strategy, "cached"):
        return False
    return not needs & (Capability.EMBEDS | Capability.FORK)


def cached_for_certain(strategy: Any, state: Any, otherwise: int) -> int:
    """Return how many positions of the target's cache hold the text as causal calls leave them.

    ``otherwise``, unless the strategy has a method ``cached(state)`` that knows of fewer: one that
    shows tokens of a block whose cached positions were computed with masks among them.
    """
    known = getattr(strategy, "cached", None)
    return otherwise if known is None else min(otherwise, int(known(state)))
