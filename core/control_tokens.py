"""Finding control tokens, such as ``<|im_start|>``, in a text."""

from __future__ import annotations

import re
from collections.abc import Mapping


class ControlTokens:
    """Finds control tokens in a text: the leftmost, and of those the longest.

    Parameters
    ----------
    names : mapping of control-token text to id
    """

    def __init__(self, names: Mapping[str, int]) -> None:
        self._ids = {name: i for name, i in names.items() if name}
        lengths: dict[str, set[int]] = {}
        for name in self._ids:
            lengths.setdefault(name[0], set()).add(len(name))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        starts = "".join(map(re.escape, self._lengths))
        self._start = re.compile(f"[{starts}]") if starts else None

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """Return ``(begin, end, id)`` of every control token in ``text``, in order."""
        found: list[tuple[int, int, int]] = []
        at = 0
        while self._start is not None and (match := self._start.search(text, at)):
            at = match.start()
            for length in self._lengths[match[0]]:
                if (token := self._ids.get(text[at : at + length])) is not None:
                    found.append((at, at + length, token))
                    at += length
                    break
            else:
                at += 1
        return found
