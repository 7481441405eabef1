"""Writing GGUF files from the bytes of others. Format: the GGUF specification, see :mod:`.gguf`."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_MAGIC_AND_VERSION = struct.pack("<4sI", b"GGUF", 3)


@dataclass(frozen=True, kw_only=True)
class OutTensor:
    """One tensor to write.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Row-major, slowest dimension first.
    type : int
        ggml type number.
    nbytes : int
    pieces : callable
        Returns its bytes, in pieces, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]


def write_gguf(
    path: Path, *, entries: int, metadata: bytes, tensors: Sequence[OutTensor], alignment: int
) -> str:
    """Write a GGUF file, version 3; return its SHA-256.

    Parameters
    ----------
    path : Path
    entries : int
        Number of metadata entries.
    metadata : bytes
        Those entries as they stand in a file.
    tensors : sequence of OutTensor
    alignment : int
        That the metadata state, 32 if they are silent.
    """
    head = [_MAGIC_AND_VERSION, struct.pack("<QQ", len(tensors), entries), metadata]
    at = 0
    for tensor in tensors:
        raw = tensor.name.encode()
        head.append(struct.pack("<Q", len(raw)) + raw + struct.pack("<I", len(tensor.shape)))
        head.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        head.append(struct.pack("<IQ", tensor.type, at))
        at += -(-tensor.nbytes // alignment) * alignment
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        def pad() -> None:
            put(bytes(-file.tell() % alignment))

        for part in head:
            put(part)
        pad()
        for tensor in tensors:
            for piece in tensor.pieces():
                put(piece)
            pad()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
