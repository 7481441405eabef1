"""Reading a whole file that a person named: with a limit, and errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from .errors import InvalidInput, MissingFile, SteersmanError


def read_bytes(
    path: str | Path, most: int, *, error_type: type[SteersmanError] = InvalidInput
) -> bytes:
    """Return what a file holds.

    Parameters
    ----------
    path : str or Path
    most : int
        Largest size in bytes, a multiple of 1 MiB.
    error_type : type
        Class of the errors other than MissingFile.

    Raises
    ------
    MissingFile
        There is no such file.
    InvalidInput (or ``error_type``)
        It cannot be read, or is larger.
    """
    try:
        with open(path, "rb") as file:
            return read_limited(file, str(path), most, error_type=error_type)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except OSError as exc:
        raise error_type(f"{path}: cannot be read: {exc.strerror}") from None


def read_limited(
    file: IO[bytes], name: str, most: int, *, error_type: type[SteersmanError] = InvalidInput
) -> bytes:
    """Return the rest of an open file, stdin for one; otherwise as :func:`read_bytes`."""
    try:
        raw = file.read(most + 1)
    except OSError as exc:
        raise error_type(f"{name}: cannot be read: {exc.strerror}") from None
    if len(raw) > most:
        raise error_type(f"{name}: larger than {most >> 20} MiB")
    return raw


def decoded(raw: bytes, name: str, *, error_type: type[SteersmanError] = InvalidInput) -> str:
    """Return UTF-8 text, or raise with the line of the first byte that is none."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise error_type(
            f"{name}:{line}: not UTF-8 text (byte {exc.start}); convert it, "
            "for example with: iconv -t UTF-8"
        ) from None
