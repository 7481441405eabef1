"""A GGUF file with some of its blocks only, renumbered: for engines that cannot leave layers out.

Written once into the cache, from the bytes of the original: weights and metadata are copied as they
are, so what is kept computes exactly what it computed before.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steersman.core.errors import InvalidInput, UsageError
from steersman.core.fingerprint import file_sha256
from steersman.core.layers import check_period, layers_text
from steersman.core.locate import ModelSource
from steersman.core.paths import cache_dir

from .gguf import GGUFHeader, TensorInfo, read_header
from .gguf_cursor import Cursor, StringArray
from .gguf_write import OutTensor, write_gguf
from .made import made_folder

FORMAT = 1  # raise it when files must be made anew
_FILE = "model.gguf"
_BLOCK = re.compile(r"blk\.(\d+)\.(.*)", re.DOTALL)
_STRING, _ARRAY, _U32, _I32, _U64 = 8, 9, 4, 5, 10
_COUNT = {_U32: "<I", _I32: "<i", _U64: "<Q"}
_PIECE = 1 << 22
# Architectures whose llama.cpp graph does the same in every block, or, with a period, asks for the
# block's number to tell sliding windows from full attention.
_PERIODS = {"llama": 1, "qwen2": 1, "qwen3": 1, "gemma3": 6}
_GEMMA3_27B = 62  # llama.cpp tells this model, which scales its queries otherwise, by its blocks


def block_count(header: GGUFHeader) -> int:
    """Return how many blocks (layers) a GGUF model has.

    Raises
    ------
    InvalidInput
        The metadata do not say.
    """
    key = f"{header.architecture}.block_count"
    value = header.need(key, int)
    if not 0 < value < 1 << 16:
        raise InvalidInput(f"{header.path}: {key}: {value} blocks")
    return int(value)


def with_layers(source: ModelSource, kept: Sequence[int]) -> Path:
    """Return a GGUF file with these blocks of ``source`` alone, in this order from 0.

    Parameters
    ----------
    source : ModelSource
        A GGUF file that was checked.
    kept : sequence of int
        Strictly rising, inside the model.

    Raises
    ------
    UsageError
        llama.cpp would take a kept block for another kind, or the architecture is not known to be
        free of such differences.
    SteersmanError
        The disk is too full.
    """
    header = read_header(source.path)
    total = block_count(header)
    period = _PERIODS.get(header.architecture)
    if period is None or (header.architecture == "gemma3" and total == _GEMMA3_27B):
        raise UsageError(
            f"layers: {source.path}: llama.cpp may treat the blocks of this model by their number; "
            f"layers can be left out of {', '.join(_PERIODS)} (not Gemma 3 27B) on llamacpp"
        )
    check_period(
        kept, period, where=str(source.path), why="llama.cpp tells windows from full attention"
    )
    digest, text = file_sha256(source.path), layers_text(kept)
    folder = made_folder(
        cache_dir() / "layers",
        f"{source.name} {text}",
        hashlib.sha256(f"{digest} {text}".encode()).hexdigest(),
        usable=lambda note: (
            (note["format"], note["source"]["sha256"], note["layers"]) == (FORMAT, digest, text)
        ),
        need=lambda: header.file_size,
        fill=lambda work: (
            {_FILE: _write(work / _FILE, header, kept)},
            {
                "format": FORMAT,
                "source": {"name": source.path.name, "sha256": digest},
                "layers": text,
            },
        ),
    )
    return folder / _FILE


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One metadata entry: its bytes from ``begin`` to ``end``, those of its value from ``at``."""

    key: str
    kind: int
    value: Any
    begin: int
    at: int
    end: int


def _entries(cursor: Cursor) -> Iterator[_Entry]:
    """Yield the metadata of a file that :func:`read_header` has accepted."""
    cursor.at = 16
    for _ in range(cursor.u64()):
        begin = cursor.at
        key = cursor.name("metadata key")
        at = cursor.at
        kind = cursor.u32()
        cursor.at = at
        value = cursor.value(key)
        yield _Entry(key=key, kind=kind, value=value, begin=begin, at=at, end=cursor.at)


def _metadata(header: GGUFHeader, buffer: mmap.mmap, kept: Sequence[int]) -> bytes:
    """Return the metadata with the new number of blocks, and arrays per block cut to the kept."""
    total, prefix = block_count(header), f"{header.architecture}."
    parts = []
    for entry in _entries(Cursor(header.path, buffer)):
        raw = buffer[entry.begin : entry.end]
        head = buffer[entry.begin : entry.at]
        per_block = entry.kind == _ARRAY and len(entry.value) == total
        if entry.key == f"{prefix}block_count":
            if entry.kind not in _COUNT:
                raise InvalidInput(f"{header.path}: {entry.key} is no whole number")
            raw = head + struct.pack("<I", entry.kind) + struct.pack(_COUNT[entry.kind], len(kept))
        elif entry.key.startswith(prefix) and per_block:
            if isinstance(entry.value, StringArray):
                raise InvalidInput(f"{header.path}: {entry.key}: texts per block are not known")
            items = np.frombuffer(buffer[entry.at + 16 : entry.end], np.uint8).reshape(total, -1)
            new = buffer[entry.at : entry.at + 8] + struct.pack("<Q", len(kept))
            raw = head + new + items[list(kept)].tobytes()
        parts.append(raw)
    return b"".join(parts)


def _tensors(header: GGUFHeader, kept: Sequence[int]) -> list[tuple[str, TensorInfo]]:
    """Return the tensors to keep in file order, with their new names."""
    number = {old: new for new, old in enumerate(kept)}
    found = []
    for name, info in header.tensors.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            found.append((name, info))
        elif int(block[1]) in number:
            found.append((f"blk.{number[int(block[1])]}.{block[2]}", info))
    return found


def metadata_of(header: GGUFHeader) -> tuple[int, bytes]:
    """Return the number of a file's metadata entries, and their bytes."""
    with header.path.open("rb") as original:
        buffer = mmap.mmap(original.fileno(), 0, access=mmap.ACCESS_READ)
        with buffer:
            entries = list(_entries(Cursor(header.path, buffer)))
            return len(entries), b"".join(buffer[e.begin : e.end] for e in entries)


def copied(header: GGUFHeader, info: TensorInfo, name: str) -> OutTensor:
    """Return a tensor of ``header``'s file as it is, under a new name."""

    def pieces() -> Iterator[bytes]:
        with header.path.open("rb") as file:
            file.seek(info.offset)
            left = info.nbytes
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise InvalidInput(f"{header.path}: ends inside tensor {info.name!r}")
                left -= len(piece)
                yield piece

    return OutTensor(name=name, shape=info.shape, type=info.type, nbytes=info.nbytes, pieces=pieces)


def _write(path: Path, header: GGUFHeader, kept: Sequence[int]) -> str:
    """Write the file; return its SHA-256."""
    with header.path.open("rb") as original:
        buffer = mmap.mmap(original.fileno(), 0, access=mmap.ACCESS_READ)
        with buffer:
            (entries,) = struct.unpack("<Q", buffer[16:24])
            metadata = _metadata(header, buffer, kept)
    return write_gguf(
        path,
        entries=entries,
        metadata=metadata,
        tensors=[copied(header, info, name) for name, info in _tensors(header, kept)],
        alignment=header.alignment,
    )
