"""Sampling: feed one token, draw the next from the chain's distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..logits import Chain, Selection
from ..model import Array, Capability, Forward, IntArray, Output
from .rng import Rng
from .types import Edit, Request, Step, Token


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What every strategy that grows one text token by token has to remember.

    Attributes
    ----------
    request : Request
    history : int64 (T,)
        Prompt and generated tokens.
    chain : object
        State of the logit chain.
    """

    request: Request
    history: IntArray
    chain: Any

    @property
    def count(self) -> int:
        """Number of generated tokens."""
        return len(self.history) - len(self.request.prompt)


def begin(request: Request, chain: Chain) -> Progress:
    """Return the progress of a text of which only the prompt is there."""
    return Progress(request=request, history=request.prompt, chain=chain.init(1))


def resumed(progress: Progress, chain: Chain, tokens: Sequence[Token]) -> Progress:
    """Return the progress of the same request's text when it reads ``tokens``."""
    generated = np.array([token.id for token in tokens], np.int64)
    history = np.concatenate([progress.request.prompt, generated])
    return Progress(request=progress.request, history=history, chain=chain.init(1))


def draw(
    progress: Progress,
    chain: Chain,
    logits: Array,
    rng: Rng,
    *,
    raw: Array | None = None,
    name: str = "strategy",
) -> tuple[Token, Progress]:
    """Choose the next token of one text from logits (1, V).

    Random numbers are keyed by the request's row and the token's position, so that going back to a
    position draws the same number again.

    Parameters
    ----------
    raw : float array (1, V), optional
        The model's own logits, where ``logits`` are what a strategy made of them: the trace then
        tells what it changed, under ``name``.
    """
    request, position = progress.request, len(progress.history)
    selection = chain.select(
        logits,
        history=[progress.history],
        state=progress.chain,
        uniforms=lambda row, key: rng.uniform(request.row + row, position, draw=key),
        logprobs=request.logprobs,
        trace=request.trace,
        raw=raw,
        name=name,
    )
    token = token_of(selection, 0)
    grown = Progress(
        request=request,
        history=np.append(progress.history, token.id),
        chain=selection.state,
    )
    return token, grown


def feed_last(progress: Progress) -> Forward:
    """Return the call that feeds the text's last token and asks what comes next."""
    return Forward(keep=len(progress.history) - 1, tokens=progress.history[None, -1:])


def token_of(selection: Selection, row: int) -> Token:
    """Return one row of a selection as a Token."""
    return Token(
        id=int(selection.tokens[row]),
        raw_logprob=None if selection.raw_logprobs is None else float(selection.raw_logprobs[row]),
        logprob=None if selection.logprobs is None else float(selection.logprobs[row]),
        top=selection.top[row] if selection.top else (),
        trace=selection.traces[row] if selection.traces else None,
    )


def appended(progress: Progress, token: Token, ask: Mapping[str, Forward]) -> Step:
    """Return the step that shows ``token`` and goes on with ``ask`` unless the text ends here.

    ``progress`` already holds the token.
    """
    request = progress.request
    if token.id in request.eos_ids:
        return Step(finish="eos")
    edit = Edit(keep=progress.count - 1, tokens=(token,))
    if progress.count >= request.max_tokens:
        return Step(edit=edit, finish="length")
    return Step(ask=ask, edit=edit)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw each token from the chain's distribution; an empty chain samples the model as it is.

    Parameters
    ----------
    chain : Chain
        Stages applied to the logits, in order.
    """

    chain: Chain = field(default_factory=Chain)

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS}

    @property
    def max_rows(self) -> int:
        return 1

    def init(self, request: Request, rng: Rng) -> tuple[Progress, Step]:
        progress = begin(request, self.chain)
        if request.max_tokens == 0:
            return progress, Step(finish="length")
        return progress, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: Progress, out: Mapping[str, Output], rng: Rng) -> tuple[Progress, Step]:
        token, state = draw(state, self.chain, out["target"].logits, rng)
        return state, appended(state, token, {"target": feed_last(state)})

    def resume(self, state: Progress, tokens: Sequence[Token], rng: Rng) -> tuple[Progress, Step]:
        state = resumed(state, self.chain, tokens)
        return state, Step(ask={"target": feed_last(state)})
