"""A strategy with two roles, and toys to play them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from toys import TableModel

from steersman.core.decode import STRATEGIES
from steersman.core.decode.sample import Progress, appended, begin, draw, feed_last
from steersman.core.decode.types import Request, Step
from steersman.core.logits import Chain
from steersman.core.model import Capability, Forward, Model, Output


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Draw from the mean of two models' logits: a mixture of experts in its plainest form."""

    chain: Chain = field(default_factory=Chain)
    role: str = "draft"

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS, self.role: Capability.LAST_LOGITS}

    @property
    def max_rows(self) -> int:
        return 1

    def init(self, request: Request, rng: Any) -> tuple[Progress, Step]:
        ask = Forward(keep=0, tokens=request.prompt[None])
        return begin(request, self.chain), Step(ask={"target": ask, self.role: ask})

    def step(self, state: Progress, out: Mapping[str, Output], rng: Any) -> tuple[Progress, Step]:
        logits = (out["target"].logits + out[self.role].logits) / 2
        token, state = draw(state, self.chain, logits, rng)
        ask = feed_last(state)
        return state, appended(state, token, {"target": ask, self.role: ask})


PROFILE = """\
description: Two models in the mean.
strategy: {mean: {}}
generation: {max_tokens: 8}
"""


@contextmanager
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let profiles name the strategy ``mean``."""
    with monkeypatch.context() as patch:
        patch.setattr("steersman.core.decode.STRATEGIES", {**STRATEGIES, "mean": Mean})
        yield


class Openings:
    """Stands for ``load``: opens toys, and remembers what was opened and what is still open."""

    def __init__(self, make: Any = None) -> None:
        self.make = make or (lambda **_: TableModel(seed=1))
        self.asked: list[dict[str, Any]] = []
        self.open: list[Model] = []
        self.fail: str | None = None  # name of a model that cannot be opened

    def __call__(self, **options: Any) -> Model:
        from steersman.core.errors import MissingFile

        self.asked.append(options)
        if options["model"] == self.fail:
            raise MissingFile(f"--model {self.fail}: no such file")
        model: Model = self.make(**options)
        name = str(options["model"])
        if options.get("layers") is not None:
            name += f" layers {options['layers']}"
        model.info = replace(model.info, name=name)
        model.options = dict(options)
        close = model.close

        def closed() -> None:
            self.open.remove(model)
            close()

        model.close = closed  # type: ignore[method-assign]
        self.open.append(model)
        return model

    @property
    def names(self) -> list[str]:
        """Models that are open, in the order of their opening."""
        return [model.info.name for model in self.open]


def mean_law(first: TableModel, second: TableModel, history: Any) -> np.ndarray:
    """Return the exact distribution (V,) that :class:`Mean` draws from."""
    product = np.sqrt(first.probs(history) * second.probs(history))
    return product / product.sum()
