"""The sliding window: which parts of a long list are compared, and in what order.

A listwise model orders some 20 passages at a time. The window starts at the end of the list and
moves to its front, so that a passage from far behind can climb: with a perfect comparison the best
``window - stride`` of the whole list arrive at the front in one pass.
"""

from __future__ import annotations

from ..errors import UsageError

MAX_WINDOW = 26  # identifiers are the letters A..Z


def check_window(window: int, stride: int, passes: int) -> None:
    """Raise UsageError unless 2 <= window <= 26, 1 <= stride <= window and passes >= 1."""
    if not 2 <= window <= MAX_WINDOW:
        raise UsageError(
            f"--window-size {window}: must be in 2..{MAX_WINDOW}, one letter per passage"
        )
    if not 1 <= stride <= window:
        raise UsageError(
            f"--stride {stride}: must be in 1..{window}, the window size; more would skip passages"
        )
    if passes < 1:
        raise UsageError(f"--num-passes {passes}: must be at least 1")


def windows(n: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return the windows ``(begin, end)`` of one pass, last part of the list first.

    Parameters
    ----------
    n : int
        Length of the list, at least 0.
    window, stride : int
        Size of a window and how far it moves; every place is covered, because the first window
        begins at 0 even if that makes it shorter.

    Returns
    -------
    list of (int, int)
        Empty for ``n = 0``, else ends with a window that begins at 0.

    Notes
    -----
    The released code stops its loop by the test ``start + stride != 0``, which skips every window
    when ``n = window - stride``; here 10 passages under 20/10 give the one window (0, 10).
    """
    found: list[tuple[int, int]] = []
    end, begin = n, n - window
    while end > 0:
        begin = max(begin, 0)
        found.append((begin, end))
        if begin == 0:
            break
        end -= stride
        begin -= stride
    return found
