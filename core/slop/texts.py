"""Reading the texts of a corpus: results of a batch, or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import InvalidInput, MissingFile

MAX_LINE = 64 << 20  # bytes


def read_texts(path: Path) -> Iterator[str]:
    """Yield the texts of one file.

    A ``.jsonl`` file holds one object per line with the key ``text`` (what ``steersman generate
    --jsonl`` writes; lines with an ``error`` are passed over) or a string. In any other file, texts
    are separated by blank lines.

    Raises
    ------
    MissingFile, InvalidInput
        One line with file and line number.
    """
    try:
        with path.open("rb") as file:
            jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
            yield from _objects(path, file) if jsonl else _paragraphs(path, file)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except OSError as exc:
        raise InvalidInput(f"{path}: cannot be read: {exc.strerror}") from None


def _lines(path: Path, file: object) -> Iterator[tuple[int, str]]:
    number = 0
    while raw := file.readline(MAX_LINE + 1):  # type: ignore[attr-defined]
        number += 1
        if len(raw) > MAX_LINE:
            raise InvalidInput(f"{path}:{number}: longer than {MAX_LINE >> 20} MiB")
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as exc:
            raise InvalidInput(f"{path}:{number}: not UTF-8 (byte {exc.start})") from None


def _objects(path: Path, file: object) -> Iterator[str]:
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise InvalidInput(f"{path}:{number}: not valid JSON: {exc}") from None
        if isinstance(value, dict):
            if value.get("error") is not None:
                continue
            value = value.get("text")
        if not isinstance(value, str):
            raise InvalidInput(f"{path}:{number}: text: expected a text, or an object with one")
        yield value


def _paragraphs(path: Path, file: object) -> Iterator[str]:
    held: list[str] = []
    for _, line in _lines(path, file):
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held).strip()
            held = []
    if held:
        yield "".join(held).strip()
