"""A trained value head, and the file it lives in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..array import Array, to_numpy
from ..errors import InvalidInput, UsageError
from ..model import Model, ModelInfo
from ..tensor_file import read_network, save_tensors
from .head import ValueShape, head_values

KIND, MADE_BY = "value head 1", "steersman train value"


@dataclass(frozen=True, kw_only=True)
class ValueHead:
    """Weights of a head, and the model whose hidden states it reads.

    Attributes
    ----------
    shape : ValueShape
    weights : mapping of name to float32 array
    layer : int
        Hidden state that is read, 0..L.
    model : str
        Fingerprint of the model's weights.
    facts : mapping
        How it was trained and what that measured; JSON-able.
    """

    shape: ValueShape
    weights: Mapping[str, npt.NDArray[np.float32]] = field(repr=False)
    layer: int
    model: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def values(self, model: Model, hidden: Array) -> npt.NDArray[np.float32]:
        """Return the values (...) of hidden states (..., D) of layer :attr:`layer`.

        The final norm is taken on the model's device; the head itself runs in float32 on the host.
        """
        normed = np.asarray(to_numpy(model.norm(hidden)), np.float32)
        found: npt.NDArray[np.float32] = head_values(self.weights, normed)
        return found

    def check(self, model: ModelInfo, *, where: str) -> None:
        """Raise UsageError unless the head belongs to this model."""
        if self.shape.features != model.width or self.layer > model.layers:
            raise UsageError(
                f"{where}: made for layer {self.layer} of a model of width {self.shape.features}, "
                f"{model.name} has {model.layers} layers of width {model.width}; train a head for "
                "this model: steersman train value"
            )
        if self.model and self.model != model.fingerprint:
            raise UsageError(
                f"{where}: trained on other weights than {model.name}; train a head for this "
                "model: steersman train value"
            )


def save_value_head(head: ValueHead, path: Path) -> None:
    """Write ``head`` as safetensors; the file appears whole or not at all."""
    facts = {
        "shape": asdict(head.shape),
        "layer": head.layer,
        "model": head.model,
        "facts": dict(head.facts),
    }
    save_tensors(path, head.weights, facts, kind=KIND)


def read_value_head(path: Path) -> ValueHead:
    """Read a head.

    Raises
    ------
    MissingFile, InvalidInput
        No such file, or not a value head; one line.
    MissingDependency
        safetensors is not installed.
    """
    shape, arrays, facts = read_network(
        path, ValueShape, kind=KIND, made_by=MADE_BY, what="value head"
    )
    layer, held = facts.get("layer"), facts.get("facts", {})
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise InvalidInput(f"{path}: layer must be a whole number from 0, got {layer!r}")
    if not isinstance(held, dict):
        raise InvalidInput(f"{path}: facts must be a mapping, got {held!r}")
    model = str(facts.get("model", ""))
    return ValueHead(shape=shape, weights=arrays, layer=layer, model=model, facts=held)
