"""Antislop: watch what another strategy writes, and go back where a banned phrase began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...errors import SteersmanError, UsageError
from ...logits import Chain
from ...logits.stage import check_integer, check_number
from ...model import Capability, Forward, Output
from ..rng import Rng
from ..sample import Sample
from ..types import Edit, Request, Step, Token, cached_for_certain, rewindable
from .matching import Hit, compile_regex, matcher, ngram_words
from .redraw import redraw
from .rules import Rule, check_lists, make_rules, openings, read_phrases
from .state import Spot, State, allow
from .transcript import Transcript

MAX_SPAN = 4000
MAX_SPENT = 4  # tokens drawn in all, as a multiple of max_tokens


@dataclass(frozen=True, kw_only=True)
class Antislop:
    """Let ``inner`` write, and where a banned phrase comes about go back and draw its begin anew.

    Nothing is banned before it has come about, so the tokens that a phrase is made of stay usable
    everywhere else. On a hit the text is cut before the token in which the phrase begins; there the
    probabilities (after the chain) of that token, and of others that may begin the phrase, are
    multiplied by the rule's factor to the power of ``strength``, and another token is drawn.
    Repeated hits at a position multiply again.

    A factor of 0 is a hard ban: the phrase never stands in the text, unless nothing else is
    possible. That is so when the other tokens have a probability below 1e-6, after ``retries``
    draws at a position, or when four times ``max_tokens`` tokens have been drawn in all; the phrase
    then stays, and a note says so ("suppressed"). Larger factors are soft: each phrase is decided
    on once per position, see ``acceptance``.

    Phrases are compared without regard to case. Where one begins or ends with a letter, mark or
    number, it is a hit only at the boundary of a word; "cat" is found once it is known that the
    word does not go on. Only generated text is searched: a phrase that begins in the prompt, or in
    a stop string's leftovers, is none.

    Parameters
    ----------
    phrases : list of str
    phrases_file : str, optional
        More phrases: one per line, or a JSON list of phrases or [phrase, factor]. In a profile the
        path is relative to the profile's file.
    regexes : list of str
        In the syntax of the ``regex`` package, ignoring case, with ``^`` and ``$`` at lines and
        ``.`` for any character.
    ngrams : list of str
        Words that follow each other once stopwords and numbers are left out: "voice barely whisper"
        is found in "her voice was barely a whisper".
    factor : float in [0, 1]
        For all rules without their own; 0 is a hard ban, 1 is none.
    factors : mapping of rule to float in [0, 1]
        Own factors, by the rule as it is written.
    strength : float in [0, 1000]
        Exponent of all factors; 0 switches everything off, hard bans included.
    acceptance : {"argmax", "draw"}
        When a soft rule's phrase stays. "argmax": its first token is still the likeliest one, or is
        drawn again. "draw": only if it is drawn again.
    variants : bool
        Penalise at the position also the other tokens that can begin the phrase (capitals, space,
        shorter beginnings). Otherwise only the token that stood there.
    force : bool
        Where the chain leaves only penalised tokens (always when it is greedy), apply the factors
        before the chain. Without it the phrase stays.
    invert : bool
        Draw the new token from the inverted distribution of the 20 likeliest that are left.
    stopwords : bool
        Let n-grams count stopwords (English).
    span : int
        Characters that regexes and n-grams look back, 1..4000; longer matches are not found.
    regex_timeout : float
        Seconds that one search may take; a regex that takes longer is switched off for the text.
    retries : int
        Draws at one position, 1..1000.
    hold_back : bool
        Show text only when it can no longer be taken back. It then comes late by the length of the
        longest phrase, or by ``span``.
    inner : strategy
        Any strategy that can resume from an arbitrary text and keeps just that text in its cache:
        sampling, speculation, routing, blocks, another antislop.
    chain : Chain
        The inner strategy's chain; tokens are drawn again from the model's own distribution through
        the same.

    Notes
    -----
    Tokens after a position that was gone back to are drawn with other random numbers than before,
    so they are independent of what went. The text is not distributed as the model's text on the
    condition that nothing is banned: a rewind changes one token and goes on from there.

    References
    ----------
    Paech et al., "Antislop: A Comprehensive Framework for Identifying and Eliminating Repetitive
    Patterns in Language Models", arXiv:2510.15061.
    """

    phrases: tuple[str, ...] = ()
    phrases_file: str | None = field(default=None, metadata={"path": True})
    regexes: tuple[str, ...] = ()
    ngrams: tuple[str, ...] = ()
    factor: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)
    strength: float = 1.0
    acceptance: Literal["argmax", "draw"] = "argmax"
    variants: bool = True
    force: bool = True
    invert: bool = False
    stopwords: bool = False
    span: int = 400
    regex_timeout: float = 2.0
    retries: int = 20
    hold_back: bool = False
    inner: Any = field(default_factory=Sample, metadata={"strategy": True})
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        for key in ("phrases", "regexes", "ngrams"):
            value = getattr(self, key)
            object.__setattr__(self, key, tuple(value) if isinstance(value, list) else value)
        check_number("antislop", "factor", self.factor, 0, 1)
        check_number("antislop", "strength", self.strength, 0, 1000)
        check_integer("antislop", "span", self.span, 1, MAX_SPAN)
        check_number("antislop", "regex_timeout", self.regex_timeout, 0.001, 60)
        check_integer("antislop", "retries", self.retries, 1, 1000)
        if self.acceptance not in ("argmax", "draw"):
            raise UsageError(
                f"antislop: acceptance must be argmax or draw, got {self.acceptance!r}"
            )
        try:
            listed = self._listed()
        except SteersmanError as exc:
            raise type(exc)(f"antislop: phrases_file {exc}") from None
        check_lists(
            "antislop",
            phrases=self.phrases,
            regexes=self.regexes,
            ngrams=self.ngrams,
            listed=listed,
            factors=self.factors,
        )
        for key, texts, check in (
            ("regexes", self.regexes, compile_regex),
            ("ngrams", self.ngrams, lambda text: ngram_words(text, self.stopwords)),
        ):
            for number, text in enumerate(texts, 1):
                try:
                    check(text)
                except UsageError as exc:
                    raise UsageError(f"antislop: {key} item {number}: {exc}") from None
        if not rewindable(self.inner):
            raise UsageError(
                f"antislop: inner {type(self.inner).__name__} cannot be sent back by another "
                f"strategy; those that can: {', '.join(_rewindable_names())}"
            )
        self._share_chain()

    def _share_chain(self) -> None:
        """Give both the same chain: this one's, or if it has none the inner strategy's."""
        own = getattr(self.inner, "chain", None)
        if own is None or own == self.chain:
            return
        if self.chain.stages:
            object.__setattr__(self, "inner", replace(self.inner, chain=self.chain))
        else:
            object.__setattr__(self, "chain", own)

    def _listed(self) -> tuple[tuple[str, float | None], ...]:
        return () if self.phrases_file is None else read_phrases(self.phrases_file)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Every rule that changes anything."""
        return make_rules(
            phrases=self.phrases,
            listed=self._listed(),
            regexes=self.regexes,
            ngrams=self.ngrams,
            factor=self.factor,
            factors=self.factors,
            strength=self.strength,
        )

    @property
    def requires(self) -> Mapping[str, Capability]:
        inner = self.inner.requires
        target = inner.get("target", Capability.NONE)
        return {**inner, "target": target | Capability.LAST_LOGITS | Capability.ROLLBACK}

    @property
    def max_rows(self) -> int:
        rows: int = self.inner.max_rows
        return rows

    # -- the strategy's own steps ----------------------------------------------------------------

    def init(self, request: Request, rng: Rng) -> tuple[State, Step]:
        inner, step = self.inner.init(request, rng)
        made = matcher(
            self.rules, stopwords=self.stopwords, span=self.span, timeout=self.regex_timeout
        )
        return self._take(State(request=request, matcher=made, inner=inner), step, rng)

    def step(self, state: State, out: Mapping[str, Output], rng: Rng) -> tuple[State, Step]:
        if state.hit is not None:
            return self._decide(state, state.hit, out["target"], rng)
        if state.refilled:
            inner, step = self.inner.resume(
                state.inner, state.text.tokens, rng.child(state.rewinds)
            )
            return replace(state, inner=inner, refilled=False), step
        inner, step = self.inner.step(state.inner, out, rng.child(state.rewinds))
        return self._take(replace(state, inner=inner), step, rng)

    def resume(self, state: State, tokens: Sequence[Token], rng: Rng) -> tuple[State, Step]:
        inner, step = self.inner.resume(state.inner, tokens, rng.child(state.rewinds))
        if state.matcher.empty:
            return replace(state, inner=inner), step
        text = Transcript().extend(tokens, state.request.models["target"].tokenizer)
        return State(
            request=state.request,
            matcher=state.matcher,
            inner=inner,
            text=text,
            since=len(text.text),
            shown=len(text),
            same=len(text),
            slow=state.slow,
            spent=state.spent,
            rewinds=state.rewinds,
        ), step

    def _take(self, state: State, step: Step, rng: Rng) -> tuple[State, Step]:
        """Look at what the inner strategy has done."""
        if state.matcher.empty or (step.edit is None and step.finish is None):
            return state, step
        edit = Edit(keep=len(state.text)) if step.edit is None else step.edit
        text, prompt = state.text.cut(edit.keep), len(state.request.prompt)
        state = replace(
            state,
            text=text,
            since=min(state.since, len(text.text)),
            same=min(state.same, edit.keep),
            # The last token before this edit may not be in the cache yet, and the edit's own may
            # be part of a tree that only the inner strategy's next call would have kept.
            cached=cached_for_certain(
                self.inner, state.inner, max(prompt + edit.keep, prompt + 1) - 1
            ),
            moved=False,
            waiting=edit.tokens,
            then=replace(step, edit=None, note={}),
            spots={at: spot for at, spot in state.spots.items() if at <= edit.keep},
        )
        return self._go_on(state, rng, dict(step.note))

    def _go_on(self, state: State, rng: Rng, note: dict[str, Any]) -> tuple[State, Step]:
        """Add the tokens that wait, until one completes something banned."""
        request = state.request
        tokenizer = request.models["target"].tokenizer
        searched = not state.moved  # what stood there before this step was searched then
        while True:
            final = state.then.finish is not None and not state.waiting
            hit = None
            if final or not searched:
                hit, late = state.matcher.find(
                    state.text, state.since, final=final, allowed=state.allowed, slow=state.slow
                )
                if late:
                    note["slow"] = [rule.text for rule in late]
                    state = replace(state, slow=state.slow | set(late))
            if hit is not None:
                why = self._why_not(state, hit)
                if why is None:
                    return self._look_again(state, hit, note)
                state = allow(state, hit, note, why)
            elif state.waiting:
                searched = False
                state = replace(
                    state,
                    since=len(state.text.text),
                    text=state.text.append(state.waiting[0], tokenizer),
                    waiting=state.waiting[1:],
                    spent=state.spent + 1,
                )
            else:
                break
        state, edit = self._edit(state)
        if state.then.finish is not None or not state.moved:
            return state, replace(state.then, edit=edit, note=note)
        # Everything but the last token is in the cache when a strategy resumes.
        begin, end = state.cached, len(request.prompt) + len(state.text) - 1
        if begin < end:
            ask = Forward(keep=begin, tokens=state.ids[None, begin:end], logits="none")
            return replace(state, refilled=True), Step(ask={"target": ask}, edit=edit, note=note)
        inner, step = self.inner.resume(state.inner, state.text.tokens, rng.child(state.rewinds))
        return replace(state, inner=inner), replace(step, edit=edit, note={**step.note, **note})

    def _why_not(self, state: State, hit: Hit) -> str | None:
        """Return why the text may not go back any more, if so."""
        spot = state.spots.get(hit.token)
        if spot is not None and spot.tries >= self.retries:
            return "retries"
        if state.spent >= MAX_SPENT * state.request.max_tokens:
            return "steps"
        return None

    def _look_again(self, state: State, hit: Hit, note: dict[str, Any]) -> tuple[State, Step]:
        """Ask what could have stood where a hit begins."""
        end = len(state.request.prompt) + hit.token
        begin = min(state.cached, end - 1)
        ask = Forward(keep=begin, tokens=state.ids[None, begin:end])
        state = replace(state, hit=hit, cached=end, moved=True)
        return state, Step(ask={"target": ask}, note=note)

    def _decide(self, state: State, hit: Hit, out: Output, rng: Rng) -> tuple[State, Step]:
        """Draw again where a hit begins, and go on from there if another token comes."""
        request, at, rule = state.request, hit.token, hit.rule
        old = state.text.tokens[at].id
        spot = state.spots.get(at, Spot())
        penalised = {old}
        if self.variants and rule.kind == 0:
            penalised |= openings(rule.text, request.models["target"].tokenizer)
        factors = dict(spot.factors)
        for token in penalised:
            factors[token] = factors.get(token, 1.0) * rule.factor
        state = replace(state, hit=None, rewinds=state.rewinds + 1)
        fresh, position = rng.child(state.rewinds), len(request.prompt) + at
        found = redraw(
            out.logits,
            hit=old,
            factors=factors,
            keep_likeliest=self.acceptance == "argmax" and not rule.hard,
            force=self.force,
            invert=self.invert,
            chain=self.chain,
            history=state.ids[:position],
            uniforms=lambda row, key: fresh.uniform(request.row + row, position, draw=key),
            logprobs=request.logprobs,
            trace=request.trace,
        )
        spot = replace(spot, factors=factors, tries=spot.tries + 1)
        note: dict[str, Any] = {}
        if found.token is None:
            state = replace(state, spots={**state.spots, at: spot})
            state = allow(state, hit, note, "mass" if found.exhausted else None)
            return self._go_on(state, rng, note)
        note["rewind"] = {
            "to": at,
            "rule": rule.text,
            "token": old,
            "drawn": found.token.id,
            "dropped": len(state.text) - at,
        }
        text = state.text.cut(at)
        ended = found.token.id in request.eos_ids
        full = at + 1 >= request.max_tokens
        state = replace(
            state,
            text=text,
            since=len(text.text),
            same=min(state.same, at),
            waiting=() if ended else (found.token,),
            then=Step(finish="eos" if ended else "length" if full else None),
            spots={i: kept for i, kept in state.spots.items() if i < at} | {at: spot},
            spent=state.spent + ended,
        )
        return self._go_on(state, rng, note)

    def _edit(self, state: State) -> tuple[State, Edit | None]:
        """Return the change to the caller's text that is due."""
        end = len(state.text)
        if self.hold_back and state.then.finish is None:
            safe = state.text.settled(len(state.text.text) - state.matcher.reach)
            end = max(safe, state.same)
        if end == state.same == state.shown:
            return state, None
        edit = Edit(keep=state.same, tokens=state.text.tokens[state.same : end])
        return replace(state, shown=end, same=end), edit


def _rewindable_names() -> list[str]:
    from .. import STRATEGIES  # late: that module imports this one

    return [name for name, cls in STRATEGIES.items() if cls is Antislop or rewindable(cls())]
