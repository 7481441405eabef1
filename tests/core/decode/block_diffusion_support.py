"""What the tests of block diffusion share: runs, and every call of one text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from block_toys import MaskedModel

from steersman.core.decode import BlockDiffusion
from steersman.core.decode.block_diffusion.strategy import _State
from steersman.core.decode.events import Event, Finished, Note
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request, Step
from steersman.core.logits import (
    Chain,
    Temperature,
)
from steersman.core.model import Forward, Output

GREEDY = Chain((Temperature(t=0),))
HELLO = tuple(b"hello")
NONE: frozenset[int] = frozenset()


def request_for(model: Any, prompt: Sequence[int], max_tokens: int, **options: Any) -> Request:
    options = {"eos_ids": NONE, "context": model.info.context, **options}
    return Request(
        prompt=np.array(prompt), models={"target": model}, max_tokens=max_tokens, **options
    )


def run(
    model: Any,
    strategy: Any,
    *,
    prompt: Sequence[int] = HELLO,
    max_tokens: int = 8,
    seed: int = 0,
    **options: Any,
) -> list[Event]:
    with Sessions(model) as sessions:
        request = request_for(model, prompt, max_tokens, **options)
        return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def notes(events: list[Event]) -> list[Any]:
    return [e.values for e in events if isinstance(e, Note)]


def drive(
    strategy: BlockDiffusion, model: Any, session: Any, request: Request, seed: int = 0
) -> Iterator[tuple[_State, Step, Forward, Output]]:
    """Yield every call of one text: the state and step that asked, the call, and the answer."""
    state, step = strategy.init(request, Rng(seed))
    while step.ask:
        ask = step.ask["target"]
        out = session.forward(ask)
        yield state, step, ask, out
        state, step = strategy.step(state, {"target": out}, Rng(seed))
        if step.finish:
            return


def knowing(length: int = 11, **options: Any) -> MaskedModel:
    """0, 1, 2 ... 10, then the end: everything is certain, in blocks too."""
    table = np.zeros((14, 13))
    order = [*range(length), 12, 0]
    for token, after in itertools.pairwise(order):
        table[token, after] = 1.0
    table[[i for i in range(14) if table[i].sum() == 0], 0] = 1.0
    return MaskedModel(table=table, **options)


def steady(p: float) -> Any:
    """Return a guess that gives every position the same distribution, pass after pass."""

    def guess(before: Sequence[int], block: Sequence[int]) -> np.ndarray:
        probs = np.zeros((len(block), 13))
        probs[:, :3] = p, (1 - p) * 0.75, (1 - p) * 0.25
        return probs

    return guess
