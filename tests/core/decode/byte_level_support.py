"""What the tests of byte-level probabilities share: enumerable models and searches on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from bpe_toys import ByteSource, InducedModel, random_bpe

from steersman.core.decode.byte_level import (
    Covers,
    Settings,
    begin_covers,
)
from steersman.core.decode.byte_level.score import evaluated, needs_of
from steersman.core.decode.events import Event, Finished
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request
from steersman.core.model import Model

EXACT = Settings(negligible=0.0)
ABC = [0.5, 0.3, 0.2]


def random_model(seed: int, length: int = 6) -> InducedModel:
    rng = np.random.default_rng(seed)
    letters = b"abc" if seed % 2 else b"ab"
    return InducedModel(random_bpe(rng, letters), ByteSource(letters, length, 0.1, rng))


def prompt_of(model: InducedModel, data: bytes) -> list[int]:
    assert model.tokenizer.bos_id is not None
    return [model.tokenizer.bos_id, *model.tokenizer.encode(data.decode())]


def search(model: Model, ids: Any, settings: Settings = EXACT) -> Covers:
    with model.session(max_rows=settings.rows, needs=needs_of(settings)) as session:
        return evaluated(begin_covers(model.tokenizer, ids, settings), session)


def run(model: Any, strategy: Any, prompt: Any, **options: Any) -> list[Event]:
    others = options.pop("models", {})
    seed = options.pop("seed", 0)
    with Sessions({"target": model, **others}) as sessions:
        request = Request(
            prompt=np.array(prompt),
            models=sessions.models,
            eos_ids=model.tokenizer.eos_ids,
            max_tokens=options.pop("max_tokens", 3),
            context=model.info.context,
            **options,
        )
        return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]
