"""Reading a trace: every line is checked before anybody uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import InvalidInput, MissingFile
from ..strict_json import parse_json
from .format import FORMAT, MAX_DEPTH, MAX_LINE, MAX_LINES, VERSION, depth_within, is_whole

_TEXT = 1 << 20  # characters of a text that is no prompt
_LISTED = 1000  # entries of a list of tokens, and stages of a chain


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a trace.

    Attributes
    ----------
    number : int
        From 1.
    begin, end : int
        Bytes before the line and after it.
    event : str
        "header", "started", "prefilled", "note", "token", "withdrawn", "finished", "failed",
        "full".
    data : dict
        The line as it stands in the file; keys that this version does not know are kept.
    """

    number: int
    begin: int
    end: int
    event: str
    data: dict[str, Any]


def read_trace(path: str | Path) -> Iterator[Line]:
    """Yield the lines of a trace, the header first.

    A last line that was cut off (the program was killed while it wrote) ends the trace quietly.

    Raises
    ------
    MissingFile
    InvalidInput
        One line with file, line and what is wrong: no trace, a version from the future, a line
        that is too long, or holds what no trace holds, or does not follow from those before.
    """
    try:
        with open(path, "rb") as file:
            yield from _lines(file, str(path))
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except OSError as exc:
        raise InvalidInput(f"{path}: cannot be read: {exc.strerror}") from None


def read_line(path: str | Path, begin: int, number: int) -> dict[str, Any]:
    """Return one line again, from its place in the file; checked like the first time."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            raw = file.readline(MAX_LINE + 1)
    except OSError as exc:
        raise InvalidInput(f"{path}: cannot be read: {exc.strerror}") from None
    where = f"{path}:{number}"
    data = _parsed(raw, where)
    _check(data, where)
    return data


def _lines(file: IO[bytes], name: str) -> Iterator[Line]:
    order = _Order()
    begin = 0
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        where = f"{name}:{number}"
        if number > MAX_LINES:
            raise InvalidInput(f"{where}: more than {MAX_LINES} lines")
        if len(raw) > MAX_LINE:
            raise InvalidInput(f"{where}: longer than {MAX_LINE >> 20} MiB")
        try:
            data = _parsed(raw, where)
        except InvalidInput:
            if number > 1 and not raw.endswith(b"\n"):
                return  # cut off
            raise
        if number == 1:
            _check_header(data, where)
            event = "header"
        else:
            event = _check(data, where)
            order.follow(event, data, where)
        yield Line(number, begin, begin + len(raw), event, data)
        begin += len(raw)
    if not number:
        raise InvalidInput(f"{name}: empty; not a trace")


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where}: not UTF-8 at byte {error.start}; not a trace") from None
    data = parse_json(text, where)
    if not isinstance(data, dict):
        raise InvalidInput(f"{where}: must be an object")
    return data


def _check_header(data: dict[str, Any], where: str) -> None:
    if data.get("format") != FORMAT:
        raise InvalidInput(f'{where}: not a trace: the first line must hold "format": "{FORMAT}"')
    found = data.get("version")
    if not isinstance(found, int) or not is_whole(found):
        raise InvalidInput(f"{where}: version: must be a whole number")
    if found != VERSION:
        remedy = "update steersman" if found > VERSION else "record it again"
        raise InvalidInput(
            f"{where}: version {found} of the format; this steersman reads {VERSION}: {remedy}"
        )


class _Order:
    """What the lines so far allow to follow."""

    def __init__(self) -> None:
        self._request: int | None = None  # of the generation under way
        self._tokens = 0
        self._full = False

    def follow(self, event: str, data: Mapping[str, Any], where: str) -> None:
        """Take note of one more line, or raise InvalidInput."""
        if self._full:
            raise InvalidInput(f"{where}: follows a line that said the trace was full")
        if event == "full":
            self._full = True
        elif event == "started":
            self._request, self._tokens = data["request"], 0
        elif data["request"] != self._request:
            raise InvalidInput(f"{where}: request: {data['request']} is not under way")
        elif event == "token":
            if data["index"] != self._tokens:
                raise InvalidInput(f"{where}: index: {data['index']} follows {self._tokens} tokens")
            self._tokens += 1
        elif event == "withdrawn":
            if data["keep"] + data["tokens"] != self._tokens:
                raise InvalidInput(
                    f"{where}: keep: {data['keep']} and {data['tokens']} taken back are not the "
                    f"{self._tokens} there were"
                )
            self._tokens = data["keep"]
        elif event in ("finished", "failed"):
            self._request = None


# -- what a line holds -----------------------------------------------------------------------------


def _whole(value: Any) -> str | None:
    return None if is_whole(value) else "must be a whole number"


def _number(value: Any) -> str | None:
    fine = type(value) in (float, int) and -1e30 < value < 1e30
    return None if fine else "must be a number"


def _optional_number(value: Any) -> str | None:
    return None if value is None else _number(value)


def _share(value: Any) -> str | None:
    fine = type(value) in (float, int) and -1e-4 <= value <= 1.0001
    return None if fine else "must be in [0, 1]"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and len(value) <= _TEXT else "must be text"


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _hex(value: Any) -> str | None:
    try:
        bytes.fromhex(value)
    except (ValueError, TypeError):
        return "must be bytes in hexadecimal"
    return None


def _object(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    return None if depth_within(value, MAX_DEPTH) else "nested too deeply"


def _ids(value: Any) -> str | None:
    fine = isinstance(value, list) and all(map(is_whole, value))
    return None if fine else "must be a list of whole numbers"


def _names(value: Any) -> str | None:
    fine = isinstance(value, dict) and all(
        key.isascii() and key.isdecimal() and len(key) < 20 and _text(name) is None
        for key, name in value.items()
    )
    return None if fine else "must map token ids to text"


def _top(value: Any) -> str | None:
    fine = isinstance(value, list) and len(value) <= _LISTED
    for pair in value if fine else ():
        fine = isinstance(pair, list) and len(pair) == 2
        if not fine or not is_whole(pair[0]) or _share(pair[1]):
            fine = False
            break
    return None if fine else "must be a list of [id, probability]"


Check = Callable[[Any], str | None]
_DISTRIBUTION: dict[str, Check] = {"left": _whole, "entropy": _number, "top": _top}
_STAGE: dict[str, Check] = {
    **_DISTRIBUTION,
    "name": _text,
    "removed": _share,
    "tv": _share,
    "kl": _optional_number,
    "argmax_changed": _flag,
}


def _raw(value: Any) -> str | None:
    return _fields(value, _DISTRIBUTION, {"p": _share, "rank": _whole})


def _stages(value: Any) -> str | None:
    if not isinstance(value, list) or len(value) > _LISTED:
        return "must be a list of stages"
    for place, stage in enumerate(value):
        if wrong := _fields(stage, _STAGE, {"p": _share}):
            return f"{place}: {wrong}"
    return None


def _fields(value: Any, needed: Mapping[str, Check], optional: Mapping[str, Check]) -> str | None:
    """Return what is wrong with an object's fields, or None; keys of neither kind may stand."""
    if not isinstance(value, dict):
        return "must be an object"
    for key, check in needed.items():
        if key not in value:
            return f"{key}: missing"
        if wrong := check(value[key]):
            return f"{key}: {wrong}"
    for key, check in optional.items():
        if key in value and (wrong := check(value[key])):
            return f"{key}: {wrong}"
    return None


def _prompt(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be text"


_ANY: dict[str, Check] = {"request": _whole, "t": _number}
_EVENTS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "started": (
        {**_ANY, "models": _object, "profile": _object, "seed": _whole, "prompt": _prompt,
         "prompt_ids": _ids},
        {"truncated": _whole, "prompt_omitted": _whole},
    ),
    "prefilled": ({**_ANY, "done": _whole, "total": _whole, "cached": _whole}, {}),
    "note": ({**_ANY, "values": _object}, {"names": _names}),
    "token": (
        {**_ANY, "index": _whole, "id": _whole, "text": _text},
        {"bytes": _hex, "raw_logprob": _optional_number, "logprob": _optional_number, "raw": _raw,
         "stages": _stages, "names": _names},
    ),
    "withdrawn": ({**_ANY, "keep": _whole, "tokens": _whole}, {}),
    "finished": (
        {**_ANY, "reason": _text, "tokens": _whole},
        {"stop": _optional_text, "timings": _object},
    ),
    "failed": ({**_ANY, "message": _text}, {}),
    "full": ({"limit": _whole}, {}),
}  # fmt: skip


def _check(data: dict[str, Any], where: str) -> str:
    """Return the event of a line after the first, or raise InvalidInput."""
    event = data.get("event")
    if not isinstance(event, str) or event not in _EVENTS:
        raise InvalidInput(f"{where}: event: must be one of {', '.join(_EVENTS)}")
    if wrong := _fields(data, *_EVENTS[event]):
        raise InvalidInput(f"{where}: {event}: {wrong}")
    return event
