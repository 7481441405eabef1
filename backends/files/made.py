"""Files made once from a model and kept in the cache: whole or not at all, and checked by hash."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steersman.core.errors import SteersmanError
from steersman.core.fingerprint import file_sha256, remember, stamp

NOTE = "steersman.json"


def made_folder(
    parent: Path,
    name: str,
    key: str,
    *,
    usable: Callable[[Mapping[str, Any]], bool],
    need: Callable[[], int],
    fill: Callable[[Path], tuple[Mapping[str, str], Mapping[str, Any]]],
) -> Path:
    """Return the folder of ``parent`` made for ``key``, made now if it is not there or damaged.

    Two processes that want the same one wait for each other.

    Parameters
    ----------
    parent : Path
    name : str
        For people; the folder is called after it and ``key``.
    key : str
        Hash of all that the content depends on.
    usable : callable
        Whether a folder with this note may be used; a missing key means no.
    need : callable
        Bytes it will take; asked only when it has to be made.
    fill : callable
        Writes into a given folder; returns SHA-256 by file name, and the note.

    Raises
    ------
    SteersmanError
        The disk is too full.
    """
    found = _find(parent, key, usable)
    if found is not None:
        return found
    from filelock import FileLock

    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{key[:16]}.lock"):
        found = _find(parent, key, usable)  # made by another process while this one waited
        return found if found is not None else _make(parent, name, key, need, fill)


def _find(parent: Path, key: str, usable: Callable[[Mapping[str, Any]], bool]) -> Path | None:
    for folder in sorted(parent.glob(f"*-{key[:16]}")):
        if _sound(folder, usable):
            return folder
    return None


def _sound(folder: Path, usable: Callable[[Mapping[str, Any]], bool]) -> bool:
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if not usable(note):
            return False
        files: Mapping[str, str] = note["files"]
        # Hashes are remembered by size and time of change, so this reads a file only once.
        return all(file_sha256(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(
    parent: Path,
    name: str,
    key: str,
    need: Callable[[], int],
    fill: Callable[[Path], tuple[Mapping[str, str], Mapping[str, Any]]],
) -> Path:
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    target = parent / f"{safe[:80]}-{key[:16]}"
    size, free = need(), shutil.disk_usage(parent).free
    if free < size * 1.02 + (64 << 20):
        raise SteersmanError(
            f"{parent}: {size / 1e9:.1f} GB needed to convert {name}, "
            f"{free / 1e9:.1f} GB free; free some space or set STEERSMAN_HOME"
        )
    work = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}."))
    try:
        hashes, note = fill(work)
        write_json(work / NOTE, {**note, "files": dict(hashes)})
        if target.exists():  # an older format, or damaged
            shutil.rmtree(target)
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    for file, expected in hashes.items():
        remember("hashes", stamp(target / file), expected)
    return target


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
