"""A trained router, and the file it lives in."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput, MissingDependency, MissingFile, UsageError
from ..model import ModelInfo
from .network import RouterShape, router_logits

FORMAT, VERSION = "steersman-router", 1
MAX_BYTES, MAX_HEADER = 1 << 30, 1 << 20


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
    safetensors = _safetensors()
    meta = {
        "format": FORMAT,
        "version": str(VERSION),
        "router": json.dumps(
            {
                "shape": asdict(router.shape),
                "threshold": router.threshold,
                "small": router.small,
                "target": router.target,
                "facts": dict(router.facts),
            }
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        safetensors.numpy.save_file(dict(router.weights), part, metadata=meta)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def read_router(path: Path) -> Router:
    """Read a router.

    Raises
    ------
    MissingFile, InvalidInput
        No such file, or not a router; one line.
    MissingDependency
        safetensors is not installed.
    """
    safetensors = _safetensors()
    _check_size(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise InvalidInput(f"{path}: not a router (made by steersman train r2r)")
            if meta.get("version") != str(VERSION):
                raise InvalidInput(
                    f"{path}: router format {meta.get('version')}, this program reads {VERSION}"
                )
            facts = json.loads(meta.get("router", ""))
            shape = RouterShape(**facts["shape"])
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if sizes != shape.parameters:
                raise InvalidInput(f"{path}: its arrays do not fit its stated shape")
            weights = {name: file.get_tensor(name) for name in sizes}
        if any(w.dtype != np.float32 or not np.isfinite(w).all() for w in weights.values()):
            raise InvalidInput(f"{path}: weights must be finite float32 numbers")
        threshold = float(facts["threshold"])
        return Router(
            shape=shape,
            weights=weights,
            threshold=threshold,
            small=str(facts["small"]),
            target=str(facts["target"]),
            facts=dict(facts.get("facts", {})),
        )
    except InvalidInput:
        raise
    except (UsageError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise InvalidInput(f"{path}: not a router: {exc}") from None
    except Exception as exc:  # safetensors' own error type
        raise InvalidInput(f"{path}: not a safetensors file: {exc}") from None


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file; make one with steersman train r2r") from None
    except OSError as exc:
        raise InvalidInput(f"{path}: cannot be read: {exc.strerror}") from None
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if size > MAX_BYTES or not 0 < header <= min(MAX_HEADER, size):
        raise InvalidInput(f"{path}: not a router: {size} bytes with a header of {header}")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise MissingDependency(
            "safetensors: not installed; run: pip install safetensors"
        ) from None
    return safetensors
