"""Strategies call by call, to look at the caches between calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steersman.core.array import to_numpy
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions, reuse_prefix
from steersman.core.decode.types import Request
from steersman.core.model import Forward, Model, Output


@dataclass(frozen=True)
class Made:
    """One call that a strategy asked for, with its answer and the text as it stood."""

    role: str
    ask: Forward
    out: Output
    text: tuple[int, ...]

    @property
    def begins_round(self) -> bool:
        """Whether the first logits of the answer are those after the text itself."""
        if self.ask.logits == "none" or int(np.asarray(self.ask.keep).flat[0]) >= len(self.text):
            return False
        # With all logits, the first are those of the first token fed: the text's last one.
        return (
            self.ask.logits == "last"
            or int(np.asarray(self.ask.keep)) == len(self.text) - 1
            or (self.ask.path is not None)
        )

    @property
    def first_logits(self) -> np.ndarray:
        """Logits (V,) of the first position that the answer holds."""
        logits = to_numpy(self.out.logits)
        return np.array(logits[0, 0] if logits.ndim == 3 else logits[0])


def rounds(
    strategy: Any, models: Mapping[str, Model], asked: Request, seed: int = 0
) -> Iterator[Made]:
    """Run a strategy and yield every call."""
    with Sessions(models) as sessions:
        ready = sessions.prepare(strategy, name="t")
        rng, text, first = Rng(seed), [*asked.prompt.tolist()], True
        state, step = strategy.init(asked, rng)
        while step.finish is None:
            out: dict[str, Output] = {}
            for role, ask in step.ask.items():
                made = reuse_prefix(ready[role], ask)[0] if first else ask
                out[role] = ready[role].forward(made)
                yield Made(role, ask, out[role], tuple(text))
            first = False
            state, step = strategy.step(state, out, rng)
            if step.edit is not None:
                del text[len(asked.prompt) + step.edit.keep :]
                text += [token.id for token in step.edit.tokens]


def fresh_logits(model: Model, text: Sequence[int]) -> np.ndarray:
    """Return the logits (V,) after ``text``, computed from an empty cache."""
    with model.session() as session:
        out = session.forward(Forward(keep=0, tokens=np.array([text])))
        return np.array(to_numpy(out.logits)[0])
