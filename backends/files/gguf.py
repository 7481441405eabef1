"""Strict reader of GGUF headers (versions 2 and 3).

A GGUF file is untrusted input: every count and length is checked against the size of the file and
against a cap of our own before anything is allocated, so that a small file cannot ask for a lot of
memory or time. Whatever is wrong ends in one :class:`InvalidInput` line.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.core.errors import InvalidInput, UsageError

from .gguf_cursor import Cursor, StringArray, open_regular

__all__ = [
    "GGML_TYPES",
    "GGUFHeader",
    "StringArray",
    "TensorInfo",
    "raw_tensor",
    "read_header",
    "read_tensor",
    "tensor_info",
]

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20

# ggml type number -> (name, elements per block, bytes per block)
GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Row-major, slowest dimension first (the reverse of the order in the file).
    type : int
        ggml type number, a key of ``GGML_TYPES``.
    offset : int
        First byte, counted from the start of the file.
    nbytes : int
        Size in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        """Name of the ggml type, such as ``"Q4_1"``."""
        return GGML_TYPES[self.type][0]


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """Everything in a GGUF file but the weights.

    Attributes
    ----------
    metadata : mapping of str
        int, float, bool, str, NumPy array (numeric arrays) or :class:`StringArray`.
    tensors : mapping of tensor name to TensorInfo, in file order
    alignment : int
    data_offset : int
        Where the tensor data begins.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data_offset: int
    file_size: int

    @property
    def architecture(self) -> str:
        """Value of ``general.architecture``, or an empty string."""
        return str(self.get("general.architecture", str, ""))

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a metadata value of the given kind, or ``default`` when the key is absent.

        Raises
        ------
        InvalidInput
            The key holds a value of another kind.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InvalidInput(
                f"{self.path}: {key}: expected {'/'.join(k.__name__ for k in kinds)}, "
                f"found {type(value).__name__}"
            )
        return value

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return a metadata value that must be there.

        Raises
        ------
        InvalidInput
            The key is absent or holds a value of another kind.
        """
        value = self.get(key, kind)
        if value is None:
            raise InvalidInput(f"{self.path}: metadata key {key!r} is missing")
        return value


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    A vocabulary of 262,144 strings takes about 0.1 s.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    MissingFile
        There is no such file.
    InvalidInput
        The file is not GGUF, is damaged or truncated, or asks for more than our limits allow.
    """
    path = Path(path)
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size < 24:
            raise InvalidInput(f"{path}: not a usable GGUF file: only {size} bytes long")
        with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as buffer:
            return _parse(Cursor(path, buffer))
    finally:
        os.close(fd)


def _parse(cursor: Cursor) -> GGUFHeader:
    magic = cursor.buffer[:4]
    if magic != b"GGUF":
        raise InvalidInput(f"{cursor.path}: not a GGUF file (it begins with {magic!r})")
    cursor.at = 4
    version = cursor.u32()
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = " (big-endian)" if swapped in (2, 3) else ""
        raise cursor.fail(f"version {version}{hint}; versions 2 and 3 are read")
    tensor_count, key_count = cursor.u64(), cursor.u64()
    for what, count, limit in (
        ("tensors", tensor_count, MAX_TENSORS),
        ("metadata keys", key_count, MAX_KEYS),
    ):
        if count > limit:
            raise cursor.fail(f"{count} {what} (limit {limit})")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.name("metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} stands there twice")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise cursor.fail(f"general.alignment {alignment!r} is not a power of two")
    tensors = _tensors(cursor, tensor_count, alignment)
    data_offset = -(-cursor.at // alignment) * alignment
    return GGUFHeader(
        path=cursor.path,
        version=version,
        metadata=metadata,
        tensors=_place(cursor, tensors, data_offset),
        alignment=alignment,
        data_offset=data_offset,
        file_size=len(cursor.buffer),
    )


def _tensors(cursor: Cursor, count: int, alignment: int) -> list[TensorInfo]:
    out = []
    for _ in range(count):
        name = cursor.name("tensor name")
        rank = cursor.u32()
        if not 0 < rank <= MAX_DIMENSIONS:
            raise cursor.fail(f"tensor {name!r}: {rank} dimensions (limit {MAX_DIMENSIONS})")
        dims = tuple(cursor.u64() for _ in range(rank))
        kind, offset = cursor.u32(), cursor.u64()
        if kind not in GGML_TYPES:
            raise cursor.fail(f"tensor {name!r}: unknown type {kind}")
        type_name, block, block_bytes = GGML_TYPES[kind]
        if 0 in dims or dims[0] % block:
            raise cursor.fail(f"tensor {name!r}: shape {dims} does not fit type {type_name}")
        elements = 1
        for dim in dims:  # Python integers do not overflow
            elements *= dim
        if offset % alignment:
            raise cursor.fail(f"tensor {name!r}: offset {offset} is not a multiple of {alignment}")
        nbytes = elements // block * block_bytes
        out.append(TensorInfo(name=name, shape=dims[::-1], type=kind, offset=offset, nbytes=nbytes))
    return out


def _place(cursor: Cursor, tensors: list[TensorInfo], data_offset: int) -> dict[str, TensorInfo]:
    """Return the tensors by name with absolute offsets; they must lie apart inside the file."""
    placed: dict[str, TensorInfo] = {}
    for info in tensors:
        if info.name in placed:
            raise cursor.fail(f"tensor {info.name!r} stands there twice")
        begin = data_offset + info.offset
        if begin + info.nbytes > len(cursor.buffer):
            raise cursor.fail(
                f"tensor {info.name!r} ends at byte {begin + info.nbytes}, "
                f"the file has {len(cursor.buffer)} (truncated download?)"
            )
        placed[info.name] = TensorInfo(
            name=info.name, shape=info.shape, type=info.type, offset=begin, nbytes=info.nbytes
        )
    end, before = data_offset, ""
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise cursor.fail(f"tensors {before!r} and {info.name!r} overlap")
        end, before = info.offset + info.nbytes, info.name
    return placed


def tensor_info(header: GGUFHeader, name: str) -> TensorInfo:
    """Return where a tensor lies.

    Raises
    ------
    InvalidInput
        The file has no tensor of this name.
    """
    try:
        return header.tensors[name]
    except KeyError:
        raise InvalidInput(f"{header.path}: tensor {name!r} is missing") from None


def raw_tensor(header: GGUFHeader, name: str) -> npt.NDArray[np.uint8]:
    """Return a tensor's bytes as they are, without copying.

    Returns
    -------
    uint8 array (rows, bytes per row)
        A read-only view of the mapped file; for a vector ``rows`` is 1.
    """
    info = tensor_info(header, name)
    flat = np.memmap(header.path, np.uint8, "r", info.offset, (info.nbytes,))
    rows = 1
    for dim in info.shape[:-1]:
        rows *= dim
    return flat.reshape(rows, -1)


def read_tensor(
    header: GGUFHeader, name: str, *, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Return a tensor dequantised to float32.

    Parameters
    ----------
    header : GGUFHeader
    name : str
    out : float32 array, optional
        Where to write; it must have the tensor's shape.

    Raises
    ------
    InvalidInput
        There is no such tensor.
    UsageError
        Its type has no dequantiser.
    """
    info = tensor_info(header, name)
    raw = raw_tensor(header, name)
    result = np.empty(info.shape, np.float32) if out is None else out
    target = result.reshape(raw.shape[0], -1)
    dequantize = _dequantizer(header, info)
    # A few rows at a time stay in the processor's cache: several times faster, and no large
    # temporaries.
    step = max(1, (1 << 18) // target.shape[1])
    for begin in range(0, len(raw), step):
        target[begin : begin + step] = dequantize(raw[begin : begin + step])
    return result


def _dequantizer(
    header: GGUFHeader, info: TensorInfo
) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]:
    plain = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4"}
    if info.type_name in plain:
        return lambda raw: raw.view(plain[info.type_name])
    from gguf import GGMLQuantizationType, quants  # half a second, and only needed here

    kind = GGMLQuantizationType(info.type)

    def dequantize(raw: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        try:
            values: npt.NDArray[Any] = quants.dequantize(raw, kind)
            return values
        except NotImplementedError:
            raise UsageError(
                f"{header.path}: tensor {info.name!r} has type {info.type_name}, which only the "
                "llamacpp backend computes with; use --backend llamacpp"
            ) from None

    return dequantize
