"""Hashes of large files, remembered by path, size and time of change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .paths import cache_dir

_REMEMBERED = 4096


def stamp(path: Path) -> str:
    """Return what identifies a file's present state cheaply: path, size, time of change, inode."""
    info = path.stat()
    return f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}|{info.st_ino}"


def file_sha256(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal; a file that did not change is not read again.

    Parameters
    ----------
    path : Path
    progress : callable, optional
        Called with the number of bytes just read.
    """
    key = stamp(path)
    known = remembered("hashes").get(key)
    if isinstance(known, str):
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    remember("hashes", key, digest.hexdigest())
    return digest.hexdigest()


# Hashing this much takes a second or two, once per file.
_HASHED_BYTES = 1 << 29


def weights_fingerprint(path: Path) -> str:
    """Return what identifies weights: the same string whichever engine opens them.

    Parameters
    ----------
    path : Path
        A file, or a folder with safetensors. Up to 512 MiB in all it is the SHA-256 (of the files'
        hashes for a folder); beyond that sizes and times of change, which cost nothing to read.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if sum(file.stat().st_size for file in files) > _HASHED_BYTES:
        return ";".join(stamp(file) for file in files)
    hashes = [file_sha256(file) for file in files]
    if path.is_dir():
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    return hashes[0]


def remembered(table: str) -> dict[str, Any]:
    """Return a small table from the cache folder; empty when absent or damaged."""
    try:
        value = json.loads((cache_dir() / f"{table}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def remember(table: str, key: str, value: Any) -> None:
    """Add one entry to a table in the cache folder; a cache that cannot be written is no error."""
    entries = remembered(table)
    entries.pop(key, None)
    entries[key] = value
    while len(entries) > _REMEMBERED:
        entries.pop(next(iter(entries)))
    with contextlib.suppress(OSError):
        write_atomically(cache_dir() / f"{table}.json", json.dumps(entries).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: into a temporary file beside it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
