"""Checks of a Hugging Face folder: safetensors only, and headers that keep to their bounds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.core.errors import InvalidInput, MissingFile

from .gguf_cursor import open_regular
from .tokenizer import read_json

MAX_HEADER_BYTES = 1 << 25
MAX_TENSORS = 100_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Bits per element; the sub-byte formats are packed.
_DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies in a safetensors file, in bytes from its start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_hf_folder(path: Path) -> None:
    """Check that a folder holds a config and sound safetensors files.

    Raises
    ------
    MissingFile
        The folder, its ``config.json`` or a weights file is not there.
    InvalidInput
        It holds only pickled weights, an index that points outside the folder, or a damaged file.
    """
    if not path.is_dir():
        raise MissingFile(f"{path}: no such folder")
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InvalidInput(f"{path / 'config.json'}: model_type is missing")
    for name in weight_files(path):
        check_safetensors(path / name)


def weight_files(path: Path) -> Sequence[str]:
    """Return the names of a folder's safetensors files.

    Raises
    ------
    MissingFile
        There are none, or one that the index names is absent.
    InvalidInput
        The weights are pickled, or the index names a file outside the folder.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or len(names) > MAX_TENSORS:
            raise InvalidInput(f"{index}: weight_map is missing, empty or too long")
        files = sorted({str(name) for name in names.values()})
        for name in files:
            if os.path.basename(name) != name or "\\" in name or not name.endswith(".safetensors"):
                raise InvalidInput(f"{index}: {name!r} is not a safetensors file in this folder")
            if not (path / name).is_file():
                raise MissingFile(f"{path / name}: named in the index, but not there")
        return files
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickled:
        raise InvalidInput(
            f"{path}: weights are pickled ({pickled[0]}), which can run code; "
            "only safetensors files are read"
        )
    raise MissingFile(f"{path}: no safetensors files")


def check_safetensors(path: Path) -> dict[str, Entry]:
    """Check the header of a safetensors file: its size, its JSON, and where the tensors lie.

    Returns
    -------
    dict
        Dtype, shape and place (from the start of the file) of each tensor.

    Raises
    ------
    MissingFile
        There is no such file.
    InvalidInput
        The header is too large, is not valid, or its tensors overlap or leave the file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InvalidInput(f"{path}: header of {length} bytes in a file of {size} (truncated?)")
        if length > MAX_HEADER_BYTES:
            raise InvalidInput(f"{path}: header of {length} bytes (limit {MAX_HEADER_BYTES})")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: header is not valid: {error}") from None
    if not isinstance(header, dict):
        raise InvalidInput(f"{path}: header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InvalidInput(f"{path}: {len(header)} tensors (limit {MAX_TENSORS})")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    at = 0
    for begin, end, name in spans:
        if begin != at:
            raise InvalidInput(f"{path}: tensor {name!r} begins at byte {begin}, expected {at}")
        at = end
    if at != size - 8 - length:
        raise InvalidInput(
            f"{path}: tensors take {at} bytes, the file holds {size - 8 - length} (truncated?)"
        )
    return {
        name: Entry(
            dtype=str(entry["dtype"]),
            shape=tuple(entry["shape"]),
            begin=entry["data_offsets"][0] + 8 + length,
            end=entry["data_offsets"][1] + 8 + length,
        )
        for name, entry in header.items()
    }


def read_floats(path: Path, entry: Entry) -> npt.NDArray[np.float32]:
    """Return one tensor of a checked file as float32.

    Raises
    ------
    InvalidInput
        It holds other numbers than float32, float16 or bfloat16.
    """
    raw = np.memmap(path, np.uint8, "r", entry.begin, (entry.end - entry.begin,))
    if entry.dtype == "BF16":
        wide = raw.view("<u2").astype("<u4") << np.uint32(16)
        return wide.view("<f4").reshape(entry.shape)
    if entry.dtype not in ("F32", "F16"):
        raise InvalidInput(f"{path}: holds {entry.dtype}; F32, F16 or BF16 are read")
    values = raw.view("<f4" if entry.dtype == "F32" else "<f2").reshape(entry.shape)
    return values.astype(np.float32)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands there twice")
    return value


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{path}: tensor {name!r} has no description")
    shape, offsets = _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
    bits = _DTYPE_BITS.get(str(entry.get("dtype")))
    if bits is None or shape is None or offsets is None or len(offsets) != 2:
        raise InvalidInput(f"{path}: tensor {name!r} has an unusable description")
    for dim in shape:
        bits *= dim
    if offsets[1] - offsets[0] != bits // 8 or bits % 8:
        raise InvalidInput(f"{path}: tensor {name!r}: shape {shape} does not fit its offsets")
    return offsets[0], offsets[1], name


def _naturals(value: Any) -> list[int] | None:
    fits = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    return value if fits else None
