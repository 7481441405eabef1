"""Small plots made of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"


def bar(value: float, most: float, width: int) -> str:
    """Return a bar for ``value`` of ``most``, at most ``width`` columns, to an eighth of one."""
    if most <= 0 or value <= 0:
        return ""
    eighths = round(8 * width * min(value / most, 1.0))
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def sparkline(values: Sequence[float]) -> str:
    """Return a curve of one character per value, from 0 to the largest."""
    most = max(values, default=0.0)
    if most <= 0:
        return _LEVELS[0] * len(values)
    last = len(_LEVELS) - 1
    return "".join(_LEVELS[round(last * max(value, 0.0) / most)] for value in values)
