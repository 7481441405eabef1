"""A trained router, and the file it lives in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput, UsageError
from ..model import ModelInfo
from ..tensor_file import read_network, save_tensors
from .network import RouterShape, router_logits

FORMAT = "router 1"


@dataclass(frozen=True, kw_only=True)
class Router:
    """Weights of a router, and for which models it was trained.

    Attributes
    ----------
    shape : RouterShape
    weights : mapping of name to float32 array
    threshold : float
        Chosen on validation tokens; profiles may set another.
    small, target : str
        Fingerprints of the models whose tokens it was trained on.
    facts : mapping
        What training measured; JSON-able.
    """

    shape: RouterShape
    weights: Mapping[str, npt.NDArray[np.float32]] = field(repr=False)
    threshold: float
    small: str
    target: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def probability(
        self,
        top_logits: npt.NDArray[np.float32],
        hidden: npt.NDArray[np.float32],
        embedding: npt.NDArray[np.float32],
    ) -> float:
        """Return the probability that one token is divergent; see :func:`.router_logits`."""
        logit = float(router_logits(self.weights, top_logits, hidden, embedding))
        return float(1 / (1 + np.exp(-logit)))

    def check(self, small: ModelInfo, target: ModelInfo, *, where: str) -> None:
        """Raise UsageError unless the router belongs to these two models."""
        if self.shape.features != small.width:
            raise UsageError(
                f"{where}: made for a small model of width {self.shape.features}, "
                f"{small.name} has {small.width}; train a router for this pair"
            )
        for role, made, info in (("small", self.small, small), ("target", self.target, target)):
            if made and made != info.fingerprint:
                raise UsageError(
                    f"{where}: trained with other weights as {role!r} than {info.name}; "
                    "train a router for this pair: steersman train r2r"
                )


def save_router(router: Router, path: Path) -> None:
    """Write ``router`` as safetensors; the file appears whole or not at all."""
    facts = {
        "shape": asdict(router.shape),
        "threshold": router.threshold,
        "small": router.small,
        "target": router.target,
        "facts": dict(router.facts),
    }
    save_tensors(path, router.weights, facts, kind=FORMAT)


def read_router(path: Path) -> Router:
    """Read a router.

    Raises
    ------
    MissingFile, InvalidInput
        No such file, or not a router; one line.
    MissingDependency
        safetensors is not installed.
    """
    shape, weights, facts = read_network(
        path, RouterShape, kind=FORMAT, made_by="steersman train r2r", what="router"
    )
    try:
        return Router(
            shape=shape,
            weights=weights,
            threshold=float(facts["threshold"]),
            small=str(facts["small"]),
            target=str(facts["target"]),
            facts=dict(facts.get("facts", {})),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise InvalidInput(f"{path}: not a router: {exc}") from None
