"""The value head: from the hidden state at a token to how well the text begun so will end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace
from ..errors import UsageError
from ..ops import gelu

Weights = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class ValueShape:
    """Sizes of the head.

    Attributes
    ----------
    features : int
        Width D of the hidden state.
    width : int
        Units of one hidden layer; 0: none, a linear head.
    """

    features: int
    width: int = 0

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("width", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"value head: {name} must be a whole number, got {value!r}")
            if not least <= value <= 1 << 16:
                raise UsageError(f"value head: {name} must be in {least}..65536, got {value}")

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every trained array."""
        shapes: dict[str, tuple[int, ...]] = {"gain": (self.features,), "bias": (self.features,)}
        if self.width:
            shapes |= {
                "hidden.weight": (self.width, self.features),
                "hidden.bias": (self.width,),
            }
        return shapes | {"weight": (self.width or self.features,), "offset": (1,)}

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(math.prod(shape) for shape in self.parameters.values())


def init_weights(
    shape: ValueShape,
    *,
    seed: int,
    mean: npt.NDArray[np.floating] | None = None,
    deviation: npt.NDArray[np.floating] | None = None,
    offset: float = 0.0,
) -> dict[str, npt.NDArray[np.float32]]:
    """Return fresh weights, drawn with NumPy so that every engine starts alike.

    Parameters
    ----------
    shape : ValueShape
    seed : int
    mean, deviation : float (D,), optional
        Of the hidden states: gain and bias then begin by putting them on one scale, since a few
        units of a language model are orders of magnitude larger than the rest.
    offset : float
        Value that the head begins with everywhere.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    gain = np.ones(shape.features) if deviation is None else 1 / np.maximum(deviation, 1e-6)
    bias = np.zeros(shape.features) if mean is None else -np.asarray(mean) * gain
    found = {"gain": gain, "bias": bias, "offset": np.array([offset])}
    if shape.width:
        bound = 1 / math.sqrt(shape.features)
        found["hidden.weight"] = generator.uniform(-bound, bound, (shape.width, shape.features))
        found["hidden.bias"] = np.zeros(shape.width)
    found["weight"] = np.zeros(shape.width or shape.features)
    return {name: found[name].astype(np.float32) for name in shape.parameters}


def head_values(
    weights: Weights, hidden: Array, *, drop: Callable[[Array], Array] | None = None
) -> Array:
    """Return the raw value (...) of prefixes: ``w . x + offset`` with ``x = gain * h + bias``.

    With a hidden layer ``x`` is ``gelu(W x + b)`` of that.

    Parameters
    ----------
    weights : mapping of name to array
        As :attr:`ValueShape.parameters` names them.
    hidden : float array (..., D)
        Hidden states after the final norm, at the prefixes' last tokens.
    drop : callable, optional
        Dropout, in training.

    References
    ----------
    Yu et al., "OVM, Outcome-supervised Value Models for Planning in Mathematical Reasoning",
    arXiv:2311.09724, and its released head; the offset and the hidden layer are ours.
    """
    xp = array_namespace(hidden)
    x = weights["gain"] * hidden + weights["bias"]
    if "hidden.weight" in weights:
        matrix = xp.permute_dims(weights["hidden.weight"], (1, 0))
        x = gelu(xp.matmul(x, matrix) + weights["hidden.bias"])
    if drop is not None:
        x = drop(x)
    return xp.sum(x * weights["weight"], axis=-1) + weights["offset"][0]
