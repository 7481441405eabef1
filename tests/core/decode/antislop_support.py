"""What the tests of antislop share: runs, toy models, a wrapped strategy of several tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from toys import TableModel, ToyTokenizer

from steersman.core.decode import Sample
from steersman.core.decode.events import Event, Finished, Note
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Edit, Request, Step, Token
from steersman.core.logits import Chain, Temperature
from steersman.core.model import Capability, Forward, Output

GREEDY = Chain((Temperature(t=0),))
NO_EOS: frozenset[int] = frozenset()


def run(
    model: Any,
    strategy: Any,
    *,
    prompt: Sequence[int] = (0,),
    max_tokens: int = 12,
    eos: frozenset[int] | None = None,
    seed: int = 0,
    logprobs: int | None = None,
    sessions: Sessions | None = None,
) -> list[Event]:
    kept = sessions or Sessions(model)
    request = Request(
        prompt=np.array(prompt),
        models=kept.models,
        eos_ids=model.tokenizer.eos_ids if eos is None else eos,
        max_tokens=max_tokens,
        context=model.info.context,
        logprobs=logprobs,
    )
    events = list(decode(strategy, kept.prepare(strategy, name="t"), request, Rng(seed)))
    if sessions is None:
        kept.close()
    return events


def quick(
    model: TableModel, strategy: Any, *, max_tokens: int, seed: int
) -> tuple[str, list[Mapping[str, Any]]]:
    """Return text and notes of a run without a loop and without an end, for many texts."""
    request = Request(
        prompt=np.array([0]),
        models={"target": model},
        eos_ids=NO_EOS,
        max_tokens=max_tokens,
        context=64,
    )
    rng, ids, told = Rng(seed), [], []
    cached: list[int] = []
    state, step = strategy.init(request, rng)
    while True:
        told.append(step.note)
        if step.edit is not None:
            del ids[step.edit.keep :]
            ids += [token.id for token in step.edit.tokens]
        if step.finish is not None:
            text = b"".join(model.tokenizer.token_bytes(i) for i in ids).decode()
            return text, [note for note in told if note]
        ask = step.ask["target"]
        assert ask.keep <= len(cached)
        cached = [*cached[: ask.keep], *np.asarray(ask.tokens)[0].tolist()]
        logits = np.log(np.maximum(model.probs(cached), 1e-30)).astype(np.float32)[None]
        state, step = strategy.step(state, {"target": Output(logits=logits)}, rng)


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def notes(events: list[Event], key: str) -> list[Any]:
    return [e.values[key] for e in events if isinstance(e, Note) and key in e.values]


def letters(probs: Mapping[str, float], **options: Any) -> TableModel:
    """A model that draws each piece independently; "" is the end."""
    pieces = [p.encode() for p in probs if p]
    tokenizer = ToyTokenizer(pieces)
    table = np.zeros(tokenizer.vocab_size)
    for place, (piece, p) in enumerate(probs.items()):
        table[place if piece else tokenizer.vocab_size - 1] = p
    return TableModel(order=0, table=table, tokenizer=tokenizer, **options)


@dataclass(frozen=True, kw_only=True)
class Bursts:
    """Draws like ``Sample`` but shows ``size`` tokens at a time: an edit of several tokens.

    As a draft-and-verify strategy does, it leaves the newest tokens out of the cache.
    """

    size: int = 3
    chain: Chain = field(default_factory=Chain)

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS | Capability.ROLLBACK}

    @property
    def max_rows(self) -> int:
        return 1

    def init(self, request: Request, rng: Rng) -> tuple[Any, Step]:
        state, step = Sample(chain=self.chain).init(request, rng)
        return (state, ()), step

    def step(self, state: Any, out: Mapping[str, Output], rng: Rng) -> tuple[Any, Step]:
        progress, held = state
        progress, step = Sample(chain=self.chain).step(progress, out, rng)
        if step.edit is not None:
            held += step.edit.tokens
        if len(held) < self.size and step.finish is None:
            return (progress, held), replace(step, edit=None)
        # What was computed of the burst goes: the wrapper must not count on more than it was told.
        keep = progress.count - len(held) - (step.finish == "eos")
        text = progress.history
        if step.finish is None:
            start = max(0, len(progress.request.prompt) + keep - 1)
            step = Step(ask={"target": Forward(keep=start, tokens=text[None, start:])})
        return (progress, ()), replace(step, edit=Edit(keep=keep, tokens=held), note={"burst": 1})

    def resume(self, state: Any, tokens: Sequence[Token], rng: Rng) -> tuple[Any, Step]:
        progress, step = Sample(chain=self.chain).resume(state[0], tokens, rng)
        return (progress, ()), step


AB = {"-": 0.6, "+": 0.4}


def brute_force(text: str, phrases: Sequence[str]) -> list[str]:
    """Independent of the matcher: every phrase at every place, by slices."""
    found = []
    for phrase in phrases:
        for at in range(len(text) - len(phrase) + 1):
            before, after = text[at - 1 : at], text[at + len(phrase) :][:1]
            cut = (phrase[0].isalpha() and before.isalpha()) or (
                phrase[-1].isalpha() and after.isalpha()
            )
            if text[at : at + len(phrase)].lower() == phrase.lower() and not cut:
                found.append(phrase)
    return found
