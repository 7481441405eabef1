"""Strict JSON: written as plain ASCII, read without NaN, repeated keys and bottomless nesting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidInput


class NotANumber(InvalidInput):
    """NaN, an infinity, or something else where a number belongs (exit code 5)."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as ASCII JSON that is safe to print.

    Control, bidi and all other non-ASCII characters are escaped. Numbers that JSON lacks (nan,
    infinities) become null; dataclasses, paths, sets and arrays become what a reader expects.
    """
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, indent=indent)
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON leaves alone


def plain(value: Any) -> Any:
    """Return ``value`` made of what JSON has: see :func:`to_json`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return [plain(v) for v in sorted(value)]
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def parse_json(text: str, where: str) -> Any:
    """Parse strict JSON: no NaN or Infinity, no repeated key, no bottomless nesting.

    Raises
    ------
    InvalidInput
        Naming ``where``.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InvalidInput(f"{where}: nested too deeply") from None
    except _NoNumber as error:
        raise NotANumber(f"{where}: {error}") from None
    except ValueError as error:
        raise InvalidInput(f"{where}: {error}") from None


def check_text(text: str, where: str) -> None:
    """Raise InvalidInput for half of a surrogate pair, which JSON may hold.

    No tokenizer and no UTF-8 file can take it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{where}: lone surrogate at character {error.start}") from None


class _NoNumber(ValueError):
    pass


def _refuse_constant(name: str) -> float:
    raise _NoNumber(f"{name} is not JSON; use a finite number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return found
