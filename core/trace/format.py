"""What writer and reader of traces agree on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

FORMAT = "steersman.trace"
VERSION = 1

DEFAULT_LIMIT = 64 << 20  # bytes of a file
MAX_LINE = 8 << 20  # bytes of a line
MAX_LINES = 1_000_000
MAX_NOTE = 64 << 10  # bytes of a note
MAX_DEPTH = 16  # levels of a note or of a profile's settings

# Token ids stand in notes under these keys, alone or in lists; each gets a name in the trace.
_ID_KEYS = frozenset({"token", "tokens", "ids", "rejected", "tried", "proposed", "drawn"})


def note_ids(values: Any, depth: int = 0) -> Iterator[int]:
    """Yield the token ids that a note holds under the agreed keys."""
    if not isinstance(values, Mapping) or depth > MAX_DEPTH:
        return
    for key, value in values.items():
        if key in _ID_KEYS:
            listed = value if isinstance(value, list | tuple) else [value]
            yield from (i for i in listed if is_whole(i))
        else:
            yield from note_ids(value, depth + 1)


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number that an id, a count or a seed can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def depth_within(value: Any, most: int) -> bool:
    """Whether lists and objects in ``value`` are nested at most ``most`` levels deep."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list | tuple)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return True
    return False


def describe_note(values: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    """Return a note as short sentences; ``names`` maps token ids to text. Not filtered.

    What rewinding, speculative, routing and block strategies write is put into words, anything
    else is shown as it is.
    """
    rest = dict(values)
    found = []
    for key, verb in (("rewind", "rewound to"), ("suppressed", "let stand at")):
        if isinstance(fact := rest.get(key), Mapping):
            del rest[key]
            found.append(_rewound(verb, dict(fact), names))
    if is_whole(rest.get("drafted")):
        found.append(_drafted(rest, names))
    if isinstance(rest.get("routed"), str):
        score = rest.pop("score", None)
        shown = f" (score {_short(score)})" if score is not None else ""
        found.append(f"routed to {rest.pop('routed')}{shown}")
    if is_whole(rest.get("block")):
        passes = rest.pop("passes", None)
        after = f" after {_short(passes)} passes" if passes is not None else ""
        found.append(f"block {rest.pop('block')}{after}")
    found += [f"{key}: {_fact(key, value, names)}" for key, value in rest.items()]
    return found


def _fact(key: str, value: Any, names: Mapping[int, str]) -> str:
    """Return one value of a note; token ids by name, an object as a list of its facts."""
    if key in _ID_KEYS and is_whole(value):
        return name_of(value, names)
    if key in _ID_KEYS and isinstance(value, list) and value and all(map(is_whole, value)):
        return " ".join(name_of(i, names) for i in value[:32])
    if isinstance(value, Mapping) and not any(isinstance(v, Mapping) for v in value.values()):
        facts = list(value.items())[:32]
        return ", ".join(f"{inner} {_fact(inner, fact, names)}" for inner, fact in facts)
    return _short(value)


def _rewound(verb: str, fact: dict[str, Any], names: Mapping[int, str]) -> str:
    said = verb + f" token {_short(fact.pop('to'))}" if "to" in fact else verb.split(" ")[0]
    if "rule" in fact:
        said += f", rule {_short(fact.pop('rule'))}"
    if is_whole(fact.get("token")):
        said += f", because of {name_of(fact.pop('token'), names)}"
    return said + "".join(f", {key} {_fact(key, value, names)}" for key, value in fact.items())


def _drafted(rest: dict[str, Any], names: Mapping[int, str]) -> str:
    said = f"drafted {rest.pop('drafted')}"
    if "accepted" in rest:
        said += f", accepted {_short(rest.pop('accepted'))}"
    rejected = rest.pop("rejected", None)
    if isinstance(rejected, list) and rejected:
        shown = " ".join(name_of(i, names) for i in rejected[:32])
        said += f", rejected {shown}"
    return said


def name_of(token: Any, names: Mapping[int, str]) -> str:
    """Return a token as it is quoted in a sentence."""
    return repr(names[token]) if is_whole(token) and token in names else f"#{_short(token)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"
