"""Draw one cover of the prompt's end, then go on token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from ...logits import Chain
from ...logits.logit_bias import LogitBias
from ...logits.processor import Processor
from ...model import PAD, Capability, Forward, IntArray, Output
from ..rng import Rng
from ..sample import Sample
from ..types import Edit, Request, Step, Token
from .begin import begin_covers, text_after
from .checks import follows
from .covers import Covers, common_prefix
from .parts import Left, Search, Settings
from .score import needs_of
from .strategy import settings_of

TRIES = 64  # covers drawn until one is canonical
_ATTEMPT = 1 << 32  # between the draws of two tries


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A cover: all its tokens, and how many of its last token's bytes the text has already."""

    tokens: tuple[int, ...]
    inside: int | None  # None: the cover ends where the text does


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """``before`` tokens stood when the search began; ``lead`` is the one that passes the end."""

    request: Request
    covers: Covers
    asked: tuple[tuple[int, ...], ...] = ()
    before: int = 0
    lead: Token | None = None
    inner: Any = None


@dataclass(frozen=True, kw_only=True)
class Cover:
    """Complete the prompt's last token as likely as the model would have, then sample on.

    Draws one cover of the prompt's bytes with its exact share of their probability, shows what
    passes the prompt's end, and leaves the rest to another strategy. The text that follows has
    exactly the model's distribution given the prompt's bytes, wherever they end, for one or two
    calls more than plain sampling.

    Parameters
    ----------
    inner : strategy
        Goes on after the cover.
    validity, negligible, rows
        As of :class:`.strategy.ByteLevel`.
    chain : Chain
        Shapes the draw of the cover as well: temperature and truncation act on the covers'
        probabilities; stages that speak of tokens (penalties, bias) are passed over there.

    Notes
    -----
    The first token of the answer may overlap the prompt: its ``piece`` holds the new bytes alone.
    With a temperature of 0 the likeliest cover is taken, which need not begin with the likeliest
    byte.

    References
    ----------
    Phan et al., "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and
    Model Ensembles", arXiv:2410.09303 (the lemma that this draw follows from).
    """

    search: ClassVar[Search] = "exact"
    name: ClassVar[str] = "cover"
    own_prompt: ClassVar[bool] = True  # its last tokens are drawn anew

    inner: Any = field(default_factory=Sample, metadata={"strategy": True})
    validity: Literal["exact", "fast"] = "exact"
    negligible: float = 1e-3
    rows: int = 8
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        settings_of(self, self.name)

    @property
    def settings(self) -> Settings:
        """How covers are searched."""
        return replace(settings_of(self, self.name), search=self.search)

    @property
    def requires(self) -> Mapping[str, Capability]:
        needs = dict(self.inner.requires)
        needs["target"] = needs.get("target", Capability.NONE) | needs_of(self.settings)
        return needs

    @property
    def max_rows(self) -> int:
        return max(self.rows, int(self.inner.max_rows))

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        tokenizer = request.models["target"].tokenizer
        covers = begin_covers(tokenizer, request.prompt, self.settings)
        state = _State(request=request, covers=covers)
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return self._search(state, rng)

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        if state.inner is not None:
            inner, step = self.inner.step(state.inner, out, rng)
            return replace(state, inner=inner), self._shifted(state, step)
        covers = state.covers.answered(state.asked, out["target"].logits)
        return self._search(replace(state, covers=covers, asked=()), rng)

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        """Go on after ``tokens``; where they no longer begin with the cover drawn, draw again."""
        skip = state.before + (state.lead is not None)
        kept = len(tokens) > skip or (len(tokens) == skip and skip > state.before)
        if state.inner is not None and kept and hasattr(self.inner, "resume"):
            lead = tokens[state.before] if state.lead is not None else None
            if lead is None or state.lead is None or lead.id == state.lead.id:
                inner, step = self.inner.resume(state.inner, tokens[skip:], rng)
                return replace(state, inner=inner), self._shifted(state, step)
        request = state.request
        tokenizer = request.models["target"].tokenizer
        ids, more = text_after(tokenizer, request.prompt, tokens, self.settings)
        covers = begin_covers(tokenizer, ids, self.settings, more)
        covers = replace(covers, cached=state.covers.cached, counts=state.covers.counts)
        sequences = covers.missing() or ((),)
        covers, ask = covers.ask(sequences)
        state = _State(request=request, covers=covers, asked=sequences, before=len(tokens))
        return state, Step(ask={"target": ask})

    # -- the cover ---------------------------------------------------------------------------

    def _search(self, state: _State, rng: Rng) -> tuple[_State, Step]:
        covers = state.covers
        sequences = covers.missing(law=False)
        size = len(covers.history) + max(map(len, sequences), default=0)
        if sequences and size <= state.request.context:
            covers, ask = covers.ask(sequences)
            return replace(state, covers=covers, asked=sequences), Step(ask={"target": ask})
        return self._drawn(state, rng)

    def _drawn(self, state: _State, rng: Rng) -> tuple[_State, Step]:
        request, covers = state.request, state.covers
        found = draw_cover(
            covers,
            self.chain,
            row=request.row,
            position=len(request.prompt) + state.before,
            rng=rng,
            exact=self.settings.exact,
        )
        lead = None
        if found is None:  # the bytes have no cover: go on from one way of writing them
            prompt = covers.fallback().history
        else:
            candidate, share, final = found
            prompt = np.concatenate([covers.history, np.array(candidate.tokens, np.int64)])
            if candidate.inside is not None:
                piece = covers.text.vocabulary.pieces[candidate.tokens[-1]][candidate.inside :]
                wanted = request.logprobs is not None
                lead = Token(
                    id=candidate.tokens[-1],
                    piece=piece,
                    raw_logprob=share if wanted else None,
                    logprob=final if wanted else None,
                )
        shown = state.before + (lead is not None)
        limit = max(0, min(request.max_tokens - shown, request.context - len(prompt)))
        inner, step = self.inner.init(replace(request, prompt=prompt, max_tokens=limit), rng)
        state = replace(state, lead=lead, inner=inner)
        ask = dict(step.ask)
        if "target" in ask:
            ask["target"] = continued(ask["target"], covers.cached)
        edit = step.edit
        tokens = () if lead is None else (lead,)
        if edit is not None or tokens:
            tokens += () if edit is None else edit.tokens
            edit = Edit(keep=state.before, tokens=tokens)
        note = {**step.note, self.name: {"overlap": lead is not None, **covers.counts}}
        return state, replace(step, ask=ask, edit=edit, note=note)

    def _shifted(self, state: _State, step: Step) -> Step:
        skip = state.before + (state.lead is not None)
        if step.edit is None or not skip:
            return step
        return replace(step, edit=replace(step.edit, keep=step.edit.keep + skip))


@dataclass(frozen=True, kw_only=True)
class TokenHealing(Cover):
    """Draw the prompt's last token again, among those that begin with its bytes.

    The usual remedy for prompts that end in mid-token, here as a baseline: exact only where every
    way of writing the text shares all tokens before the last one.

    Parameters
    ----------
    inner, chain
        As of :class:`Cover`; ``validity``, ``negligible`` and ``rows`` play no part.

    References
    ----------
    The name is that of the ``guidance`` library; compared in arXiv:2410.09303.
    """

    search: ClassVar[Search] = "healing"
    name: ClassVar[str] = "token_healing"

    validity: Literal["exact", "fast"] = field(default="fast", metadata={"hidden": True})
    negligible: float = field(default=1e-3, metadata={"hidden": True})
    rows: int = field(default=1, metadata={"hidden": True})


def candidates(covers: Covers) -> tuple[list[Candidate], list[float], list[tuple[Left, IntArray]]]:
    """Return covers that end with the text, their weights, and places of all others by left."""
    end = len(covers.tail)
    ends: list[Candidate] = []
    weights: list[float] = []
    for part in covers.parts:
        if part.begin == end:
            ends.append(Candidate(tokens=part.tokens, inside=None))
            weights.append(part.weight)
    others = []
    for left in covers.lefts:
        if left.begin < end:
            skip = covers.beyond(left)
            places = np.flatnonzero(left.probs[skip:] > 0).astype(np.int64) + skip
            if len(places):
                others.append((left, places))
    return ends, weights, others


def draw_cover(
    covers: Covers, chain: Chain, *, row: int, position: int, rng: Rng, exact: bool
) -> tuple[Candidate, float, float] | None:
    """Return a cover drawn with its share of the probability, and its log-shares before and after.

    Parameters
    ----------
    covers : Covers
        With nothing missing for a draw.
    chain : Chain
        Its stages that need no token ids shape the draw.
    exact : bool
        Draw again while the cover is none that the tokenizer would produce; after ``TRIES`` the
        last one counts.

    Returns
    -------
    tuple or None
        None if no cover has any probability.
    """
    ends, weights, others = candidates(covers)
    parts = [np.array(weights, np.float64)]
    parts += [left.weight + np.log(left.probs[places]) for left, places in others]
    logits = np.concatenate(parts)
    if not len(logits) or not np.isfinite(logits).any():
        return None
    stages = [s for s in chain.stages if not s.needs_history]
    shaping = Chain(tuple(s for s in stages if not isinstance(s, LogitBias | Processor)))
    pieces = covers.text.vocabulary
    end = len(covers.tail)
    best = None
    for attempt in range(TRIES):
        picked = shaping.select(
            (logits - logits.max())[None],
            history=[],
            uniforms=lambda r, key, a=attempt: rng.uniform(  # type: ignore[misc]
                row + r, position, draw=key + a * _ATTEMPT
            ),
            logprobs=0,
        )
        at = int(picked.tokens[0])
        assert picked.raw_logprobs is not None and picked.logprobs is not None
        shares = min(0.0, float(picked.raw_logprobs[0])), float(picked.logprobs[0])
        if at < len(ends):
            return ends[at], *shares
        index = at - len(ends)
        for left, places in others:
            if index < len(places):
                token = int(pieces.ids[left.low + places[index]])
                found = Candidate(tokens=(*left.tokens, token), inside=end - left.begin)
                break
            index -= len(places)
        best = found, *shares
        if not exact or follows(covers, left, int(places[index])):
            return best
        logits[at] = -np.inf
        if not np.isfinite(logits).any():
            return None
    return best


def continued(ask: Forward, cached: Sequence[IntArray]) -> Forward:
    """Return a strategy's first call, on top of what the cache holds of its prompt."""
    if not cached or ask.tokens is None or ask.rows is not None or np.any(ask.keep):
        return ask
    tokens = np.asarray(ask.tokens, np.int64)
    plain = (
        len(tokens) == 1
        and ask.parents is None
        and ask.causal
        and ask.logits != "all"
        and not ask.hidden
        and not ask.attentions
    )
    if not plain:
        rows = None if len(tokens) == len(cached) else np.zeros(len(tokens), np.int64)
        return replace(ask, rows=rows)
    full = tokens[0][tokens[0] != PAD]
    held = [common_prefix(row, full) for row in cached]
    row = int(np.argmax(held))
    keep = min(held[row], len(full) - 1)
    rows = None if len(cached) == 1 else np.array([row])
    return replace(ask, keep=keep, tokens=full[None, keep:], rows=rows)
