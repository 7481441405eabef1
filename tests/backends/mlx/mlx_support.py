"""What the tests of the mlx adapter share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steersman.core.array import to_numpy
from steersman.core.locate import ModelSource
from steersman.core.model import Capability, Forward, Model

from ..tiny_torch import hf_source

EVERYTHING = ~Capability.NONE
Opener = Callable[..., Any]


def changed(folder: Path, target: Path, **config: Any) -> ModelSource:
    """Return a copy of a model folder with other keys in its config; None removes a key."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    old = json.loads((target / "config.json").read_text())
    new = {key: value for key, value in {**old, **config}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(new))
    return hf_source(target)


def fresh(model: Model, ids: list[int], **options: Any) -> Any:
    """Return all logits (n, V) of a text in a new session."""
    with model.session(needs=EVERYTHING) as session:
        ask = Forward(keep=0, tokens=[ids], logits="all", **options)
        return to_numpy(session.forward(ask).logits)[0]


def close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    got, want = to_numpy(got), to_numpy(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)


def padded(rows: list[list[int]]) -> Any:
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows])
