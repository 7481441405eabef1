"""The router's network: from a step of the small model to the log-odds of asking the large one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace
from ..errors import UsageError
from ..ops import gelu, layer_norm

Weights = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class RouterShape:
    """Sizes of the network.

    Attributes
    ----------
    features : int
        Width D of hidden state and embedding.
    top : int
        Largest logits looked at.
    width, blocks, expand : int
        Of the residual network; the paper has 1024, 6 and 4.
    """

    features: int
    top: int = 100
    width: int = 1024
    blocks: int = 6
    expand: int = 4

    def __post_init__(self) -> None:
        for name in ("features", "top", "width", "blocks", "expand"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 16:
                raise UsageError(f"router: {name} must be in 1..65536, got {value!r}")

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every trained array."""
        inner = self.expand * self.width
        linears = {
            "logits": (self.features, self.top),
            "combine": (self.width, 3 * self.features),
            "project": (self.width, self.width),
            "head": (1, self.width),
        }
        norms = ["norm"]
        for i in range(self.blocks):
            linears[f"blocks.{i}.up"] = (inner, self.width)
            linears[f"blocks.{i}.down"] = (self.width, inner)
            norms.append(f"blocks.{i}.norm")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns) in linears.items():
            shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        for name in norms:
            shapes |= {f"{name}.weight": (self.width,), f"{name}.bias": (self.width,)}
        return shapes

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(math.prod(shape) for shape in self.parameters.values())


def init_weights(shape: RouterShape, *, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return weights to begin training with: Kaiming-normal matrices, zero biases, unit norms."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    weights = {}
    for name, size in shape.parameters.items():
        if len(size) == 2:
            scale = math.sqrt(2 / size[1])
            weights[name] = (scale * generator.standard_normal(size)).astype(np.float32)
        elif "norm" in name and name.endswith("weight"):
            weights[name] = np.ones(size, np.float32)
        else:
            weights[name] = np.zeros(size, np.float32)
    return weights


def router_logits(
    weights: Weights,
    top_logits: Array,
    hidden: Array,
    embedding: Array,
    *,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    """Return the log-odds (...) that the small model's token would leave the large one's path.

    Parameters
    ----------
    weights : mapping of name to array
        As :attr:`RouterShape.parameters` names them.
    top_logits : float array (..., K)
        The small model's largest raw logits, falling.
    hidden : float array (..., D)
        Its last hidden state after the final norm, at the position of the logits.
    embedding : float array (..., D)
        Its input embedding of the token that it chose.
    drop : callable, optional
        Dropout, in training.

    References
    ----------
    Fu et al., "R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token
    Routing", arXiv:2505.21600, and its released router.
    """
    xp = array_namespace(hidden)
    drop = drop or _same

    def linear(name: str, x: Array) -> Array:
        weight = weights[f"{name}.weight"]
        return xp.matmul(x, xp.permute_dims(weight, (1, 0))) + weights[f"{name}.bias"]

    def norm(name: str, x: Array) -> Array:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    u = xp.concat([hidden, embedding, linear("logits", top_logits)], axis=-1)
    x = linear("project", linear("combine", u))
    count = sum(name.endswith(".up.weight") for name in weights)
    for i in range(count):
        inside = drop(gelu(linear(f"blocks.{i}.up", norm(f"blocks.{i}.norm", x))))
        x = x + drop(linear(f"blocks.{i}.down", inside))
    return linear("head", norm("norm", x))[..., 0]


def _same(x: Array) -> Array:
    return x
