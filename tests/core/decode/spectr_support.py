"""What the tests of speculation with a draft model share: toy pairs of models, and exact laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from toy_tokenizer import ToyTokenizer
from toys import TableModel

from steersman.core.decode.events import Event, Finished, Note
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.speculative.kseq import Choice, KSeq
from steersman.core.decode.speculative.verify import Target
from steersman.core.decode.types import Request
from steersman.core.logits import Chain, Mirostat, Penalties, Temperature, TopP
from steersman.core.model import Model

GREEDY = Chain((Temperature(t=0),))
PENALTY = Chain((Penalties(repetition=1.6, last_n=-1), Temperature(t=0.8)))
FILTERS = Chain((Temperature(t=1.3), TopP(p=0.7)))
CHAINS = {
    "plain": Chain(),
    "top-p": FILTERS,
    "penalty": PENALTY,
    "step by step": Chain(FILTERS.stages + PENALTY.stages, fused=False),
    "mirostat": Chain((Mirostat(tau=1.0, eta=0.5),)),
}
NONE: frozenset[int] = frozenset()


def letters(count: int) -> ToyTokenizer:
    """Return a vocabulary of ``count`` letters and nothing else."""
    return ToyTokenizer([bytes([97 + i]) for i in range(count)], controls=(), eos=(), bos=None)


def table(vocab: int, seed: int, order: int = 1, **options: Any) -> TableModel:
    return TableModel(order=order, seed=seed, tokenizer=letters(vocab), **options)


def request(
    models: Mapping[str, Model],
    *,
    prompt: Sequence[int] = (0,),
    max_tokens: int = 4,
    eos: frozenset[int] = NONE,
    context: int = 256,
    **options: Any,
) -> Request:
    return Request(
        prompt=np.array(prompt),
        models=models,
        eos_ids=eos,
        max_tokens=max_tokens,
        context=context,
        **options,
    )


def run(strategy: Any, target: Model, draft: Model, seed: int = 0, **options: Any) -> list[Event]:
    with Sessions({"target": target, "draft": draft}) as sessions:
        ready = sessions.prepare(strategy, name="t")
        asked = request(sessions.models, **options)
        return list(decode(strategy, ready, asked, Rng(seed)))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def notes(events: list[Event]) -> list[Mapping[str, Any]]:
    return [e.values for e in events if isinstance(e, Note)]


class Script:
    """Replays decisions and notes what else could have been decided, to visit every outcome."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path: list[tuple[int, float, list[int]]] = []  # outcome, its chance, outcomes left
        self.at = 0

        def draw(target: Target, uniform: float) -> tuple[int, float]:
            place = self.decide(target.probs)
            token = place if target.ids is None else int(target.ids[place])
            return token, float(np.log(target.probs[place]))

        def choose(rule: KSeq, drafts: Sequence[int], uniforms: Any, last: float) -> Choice:
            assert len(drafts) == len(uniforms) == rule.k
            return Choice(token=self.decide(rule.law(drafts)))

        monkeypatch.setattr(Target, "draw", draw)
        monkeypatch.setattr(KSeq, "choose", choose)

    def decide(self, law: np.ndarray) -> int:
        if self.at == len(self.path):
            possible = np.flatnonzero(law > 0).tolist()
            self.path.append((possible[0], float(law[possible[0]]), possible[1:]))
        outcome, _, _ = self.path[self.at]
        self.path[self.at] = (outcome, float(law[outcome]), self.path[self.at][2])
        self.at += 1
        return outcome

    def every(self, outcome: Callable[[], tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Return the probability of every result of ``outcome``."""
        found: dict[tuple[int, ...], float] = {}
        while True:
            self.at = 0
            result = outcome()
            assert self.at == len(self.path)
            chance = float(np.prod([c for _, c, _ in self.path]))
            found[result] = found.get(result, 0.0) + chance
            while self.path and not self.path[-1][2]:
                self.path.pop()
            if not self.path:
                return found
            _, _, left = self.path.pop()
            self.path.append((left[0], 0.0, left[1:]))


def exact(
    model: TableModel, chain: Chain, prompt: Sequence[int], length: int, eos: frozenset[int] = NONE
) -> dict[tuple[int, ...], float]:
    """Return the law of plain sampling: every text of ``length`` tokens, or up to an end token."""
    found: dict[tuple[int, ...], float] = {}

    def grow(text: tuple[int, ...], chance: float, state: Any) -> None:
        if len(text) == length:
            found[text] = found.get(text, 0.0) + chance
            return
        history = np.array([*prompt, *text])
        logits = np.log(np.maximum(model.probs(history), 1e-30))[None].astype(np.float32)
        left = chain.apply(logits, uniforms=lambda r, d: 0.5, history=[history], state=state)[0]
        probs = np.exp(left.astype(np.float64) - left.max())
        probs /= probs.sum()
        for token in np.flatnonzero(probs):
            after = chain.observe(state, np.log(probs[token : token + 1]))
            if int(token) in eos:
                found[text] = found.get(text, 0.0) + chance * probs[token]
            else:
                grow((*text, int(token)), chance * probs[token], after)

    grow((), 1.0, chain.init(1))
    return found


def assert_same_law(got: Mapping[Any, float], expected: Mapping[Any, float]) -> None:
    assert sum(expected.values()) == pytest.approx(1, abs=1e-12)
    for text in {*got, *expected}:
        assert got.get(text, 0.0) == pytest.approx(expected.get(text, 0.0), abs=1e-12), text
