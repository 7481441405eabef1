"""What the tests of prompt lookup and STAND share."""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.core.decode.events import Event, Finished
from steersman.core.decode.speculative.ngram import NgramTable
from steersman.core.decode.types import Request

NEVER: frozenset[int] = frozenset()


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def request_of(model: Any, prompt: tuple[int, ...], length: int, **options: Any) -> Request:
    return Request(
        prompt=np.array(prompt),
        models={"target": model},
        eos_ids=NEVER,
        max_tokens=length,
        **{"context": model.info.context, **options},
    )


def wrong_table(vocab: int, seed: int = 0) -> NgramTable:
    """Return a table that knows every pair of tokens, and is wrong about all of them."""
    table, random = NgramTable(), np.random.default_rng(seed)
    for a in range(vocab):
        for b in range(vocab):
            probs = random.dirichlet([0.5] * min(vocab, 10))
            tokens = random.permutation(vocab)[: len(probs)]
            order = np.argsort(-probs, kind="stable")
            table.observe([a, b], tokens[order].tolist(), probs[order].tolist())
    return table
