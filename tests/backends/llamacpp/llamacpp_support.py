"""What the tests of the llama.cpp adapter share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steersman.core.locate import ModelSource
from steersman.core.model import Forward

TEXT = (
    "The river rose in the night, and by morning the lower fields were under water. Nobody in the "
    "village had seen it come so fast; the old bridge held, but only just, and the mill stood "
    "alone like a ship. We carried what we could up the hill and waited for the rain to end."
)


def fresh(model: Any, tokens: Any) -> np.ndarray:
    """Logits (n, V) of a text on an empty cache, in one call."""
    with model.session() as session:
        out = session.forward(Forward(keep=0, tokens=[list(tokens)], logits="all"))
        return np.array(out.logits[0])


def last(session: Any, keep: Any, tokens: Any, **fields: Any) -> np.ndarray:
    return np.array(session.forward(Forward(keep=keep, tokens=tokens, **fields)).logits)


def padded(rows: list[list[int]]) -> np.ndarray:
    width = max(len(row) for row in rows)
    return np.array([row + [-1] * (width - len(row)) for row in rows])


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Mean KL(a || b) in nats of logits (n, V)."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a.astype(float), b))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def source(path: Path, kind: Any = "gguf", *, trusted: bool = True) -> ModelSource:
    return ModelSource(name="m", kind=kind, path=path, trusted=trusted)
