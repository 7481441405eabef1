"""What the tests of traces share: a strategy that says everything, recordings, lines by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from toys import TableModel

from steersman.core import stream
from steersman.core.decode.events import Event
from steersman.core.decode.sample import Progress, Sample, appended, begin, draw, feed_last, resumed
from steersman.core.decode.types import Edit, Step
from steersman.core.trace import (
    TraceWriter,
)

PROMPT = [0, 1, 2]


class Rewinding(Sample):
    """Samples; takes the third token back once, and says all that strategies say."""

    def step(self, state: Progress, out: Any, rng: Any) -> tuple[Any, Step]:
        token, grown = draw(state, self.chain, out["target"].logits, rng)
        step = appended(grown, token, {"target": feed_last(grown)})
        request = state.request
        if len(state.chain) < 9 and grown.count == 3 and rng.seed == 0:
            texts = [replace(token, id=int(i)) for i in state.history[len(request.prompt) :]]
            back = resumed(grown, self.chain, texts[:1])
            back = replace(back, chain=(*back.chain, *[None] * 9))  # so that it is done once
            note = {"rewind": {"to": 1, "rule": "phrase", "token": token.id}}
            ask = {"target": feed_last(back)}
            return back, Step(ask=ask, edit=Edit(keep=1), note=note)
        if grown.count == 1:
            note = {"drafted": 3, "accepted": 1, "rejected": [4, 5]}
            return grown, replace(step, note=note)
        return grown, replace(step, note={"routed": "target", "score": 0.25})

    def init(self, request: Any, rng: Any) -> tuple[Any, Step]:
        state, step = super().init(request, rng)
        return begin(request, self.chain), step


def events_of(
    model: Any, profile: Any, *, trace: int | None = 3, **options: Any
) -> Iterator[Event]:
    options = {"seed": 0, "prompt": PROMPT, **options}
    return stream(model, profile=profile, trace=trace, **options)


def endless() -> TableModel:
    """A model that never ends a text."""
    model = TableModel(order=2, seed=1)
    (eos,) = model.tokenizer.eos_ids
    table = model.table.copy()
    table[..., eos] = 0
    return TableModel(order=2, table=table / table.sum(-1, keepdims=True))


def recorded(path: Path, profile: Any, model: Any = None, **options: Any) -> list[Event]:
    model = model or endless()
    with TraceWriter(path, **options) as writer:
        return list(writer.record(events_of(model, profile), models=model, profile=profile))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


HEADER = {"format": "steersman.trace", "version": 1}
STARTED = {
    "event": "started", "models": {}, "profile": {}, "seed": 0, "prompt": "", "prompt_ids": [],
}  # fmt: skip
TOKEN = {"event": "token", "index": 0, "id": 1, "text": "a"}
STAGE = {
    "name": "x", "removed": 0.1, "tv": 0.1, "kl": None, "argmax_changed": False, "left": 1,
    "entropy": 0.5, "top": [[1, 0.5]],
}  # fmt: skip


def write(path: Path, lines: list[Any], header: Any = HEADER) -> None:
    filled = [{"request": 0, "t": 0.5, **line} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *filled]))
