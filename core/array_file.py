"""Small trained parts (heads, routers) as safetensors files with a checked header."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, MissingDependency, MissingFile, UsageError

MAX_BYTES, MAX_HEADER = 1 << 30, 1 << 20
Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class ArrayFormat:
    """A kind of file.

    Attributes
    ----------
    name : str
        What its metadata says under "format".
    version : int
    what : str
        For messages, such as "a value head".
    maker : str
        The command that makes one.
    """

    name: str
    version: int
    what: str
    maker: str


def save_arrays(path: Path, arrays: Arrays, facts: Mapping[str, Any], kind: ArrayFormat) -> None:
    """Write arrays and JSON-able ``facts``; the file appears whole or not at all."""
    safetensors = _safetensors()
    meta = {"format": kind.name, "version": str(kind.version), "facts": json.dumps(dict(facts))}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        safetensors.numpy.save_file(dict(arrays), part, metadata=meta)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def read_arrays(
    path: Path, kind: ArrayFormat, shapes: Callable[[Any], Mapping[str, tuple[int, ...]]]
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, Any]]:
    """Return the arrays and the facts of a file.

    Parameters
    ----------
    path : Path
    kind : ArrayFormat
    shapes : callable
        From the facts to the name and shape of every array that must be there; what it raises
        (UsageError, KeyError, TypeError, ValueError) means that the file is not of this kind.

    Raises
    ------
    MissingFile, InvalidInput
        No such file, or not of this kind; one line.
    MissingDependency
        safetensors is not installed.
    """
    safetensors = _safetensors()
    _check_size(path, kind)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("format") != kind.name:
                raise InvalidInput(f"{path}: not {kind.what} (made by {kind.maker})")
            if meta.get("version") != str(kind.version):
                raise InvalidInput(
                    f"{path}: format {meta.get('version')}, this program reads {kind.version}"
                )
            facts = json.loads(meta.get("facts", ""))
            if not isinstance(facts, dict):
                raise InvalidInput(f"{path}: not {kind.what}: its facts are no mapping")
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if sizes != dict(shapes(facts)):
                raise InvalidInput(f"{path}: its arrays do not fit its stated shape")
            arrays = {name: file.get_tensor(name) for name in sizes}
        if any(a.dtype != np.float32 or not np.isfinite(a).all() for a in arrays.values()):
            raise InvalidInput(f"{path}: weights must be finite float32 numbers")
    except InvalidInput:
        raise
    except (UsageError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise InvalidInput(f"{path}: not {kind.what}: {exc}") from None
    except Exception as exc:  # safetensors' own error type
        raise InvalidInput(f"{path}: not a safetensors file: {exc}") from None
    return arrays, facts


def _check_size(path: Path, kind: ArrayFormat) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file; make one with {kind.maker}") from None
    except OSError as exc:
        raise InvalidInput(f"{path}: cannot be read: {exc.strerror}") from None
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if size > MAX_BYTES or not 0 < header <= min(MAX_HEADER, size):
        raise InvalidInput(f"{path}: not {kind.what}: {size} bytes with a header of {header}")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise MissingDependency(
            "safetensors: not installed; run: pip install safetensors"
        ) from None
    return safetensors
