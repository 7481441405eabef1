"""Named arrays with facts in one safetensors file that says what it is; written whole or not."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, MissingDependency, MissingFile, UsageError

Arrays = dict[str, npt.NDArray[Any]]
MAX_BYTES, MAX_HEADER = 1 << 30, 4 << 20


def save_tensors(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any], *, kind: str
) -> None:
    """Write ``arrays`` and ``facts``; the file appears whole or not at all.

    Parameters
    ----------
    path : Path
    arrays : mapping of name to array
    facts : mapping
        JSON-able.
    kind : str
        What the file is, such as "clue 1"; a reader asks for the same.
    """
    safetensors = _safetensors()
    # One key alone: several are written in any order, and equal contents shall be equal files.
    meta = {"steersman": json.dumps({"format": kind, "facts": dict(facts)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        contiguous = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
        safetensors.numpy.save_file(contiguous, part, metadata=meta)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def read_tensors(path: Path, *, kind: str, made_by: str) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and facts of a file that :func:`save_tensors` wrote.

    Parameters
    ----------
    path : Path
    kind : str
    made_by : str
        Command that makes such files, for the message.

    Raises
    ------
    MissingFile, InvalidInput
        No such file; another kind of file; damaged; numbers that are not finite. One line.
    MissingDependency
        safetensors is not installed.
    """
    safetensors = _safetensors()
    _check_size(path, made_by)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            stated = json.loads(meta.get("steersman", "{}"))
            if stated.get("format") != kind:
                raise InvalidInput(
                    f"{path}: format {stated.get('format')!r}, expected {kind!r} (made by "
                    f"{made_by})"
                )
            facts = stated["facts"]
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except InvalidInput:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise InvalidInput(f"{path}: damaged: {exc}") from None
    except Exception as exc:  # safetensors' own error type
        raise InvalidInput(f"{path}: not a safetensors file: {exc}") from None
    if not isinstance(facts, dict):
        raise InvalidInput(f"{path}: damaged: its facts are no object")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InvalidInput(f"{path}: {name}: holds numbers that are not finite")
    return arrays, facts


class Shape(Protocol):
    """Sizes of a network, which say what arrays it has."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]: ...


S = TypeVar("S", bound=Shape)


def read_network(
    path: Path, shape_type: Callable[..., S], *, kind: str, made_by: str, what: str
) -> tuple[S, Arrays, dict[str, Any]]:
    """Return shape, float32 weights and facts of a network that :func:`save_tensors` wrote.

    Parameters
    ----------
    path, kind, made_by
        As for :func:`read_tensors`.
    shape_type : callable
        Makes the shape of what stands under ``shape`` in the facts.
    what : str
        What to call the network in errors: "value head".

    Raises
    ------
    InvalidInput
        The arrays are not those of the stated shape; and what :func:`read_tensors` raises.
    """
    arrays, facts = read_tensors(path, kind=kind, made_by=made_by)
    try:
        shape = shape_type(**facts["shape"])
    except (UsageError, KeyError, TypeError) as exc:
        raise InvalidInput(f"{path}: not a {what}: {exc}") from None
    if {name: array.shape for name, array in arrays.items()} != shape.parameters:
        raise InvalidInput(f"{path}: its arrays do not fit its stated shape")
    if any(array.dtype != np.float32 for array in arrays.values()):
        raise InvalidInput(f"{path}: its arrays must be float32")
    return shape, arrays, facts


def _check_size(path: Path, made_by: str) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file; make one with {made_by}") from None
    except OSError as exc:
        raise InvalidInput(f"{path}: cannot be read: {exc.strerror}") from None
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if size > MAX_BYTES or not 0 < header <= min(MAX_HEADER, size):
        raise InvalidInput(
            f"{path}: not a file of {made_by}: {size} bytes with a header of {header}"
        )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise MissingDependency(
            "safetensors: not installed; run: pip install safetensors"
        ) from None
    return safetensors
