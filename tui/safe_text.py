"""The one filter between untrusted text and a terminal.

Whatever a model writes, whatever stands in a document, a file name or a file's metadata may hold
control characters: an escape sequence that clears the screen, sets the clipboard (OSC 52), hides a
link's target (OSC 8) or answers a query into the shell's input; a carriage return that overwrites
what was printed; a bidi override that shows text in another order than it has. :func:`show` makes
each of them visible instead.

Every character is judged alone. A sequence therefore cannot slip through by being cut into
several pieces, applying the filter twice changes nothing, and a stream may be filtered piece by
piece.

====================================  =========================================================
character                             shown as
====================================  =========================================================
C0 (U+0000..001F) but tab, newline    control picture: ESC is ``␛``, carriage return ``␍``
DEL (U+007F)                          ``␡``
C1 (U+0080..009F)                     ``\\x9b``
bidi embedding, override, isolate     ``<U+202E>``
line and paragraph separator          ``<U+2028>``
invisible: zero-width space, word     ``<U+200B>``
joiner, BOM, deprecated format and
tag characters, interlinear marks
lone surrogate                        ``<U+D800>``
====================================  =========================================================

Kept as they are, because ordinary writing needs them and they act only on their neighbours:
zero-width joiner and non-joiner (Hindi, Persian, emoji), the direction marks U+200E, U+200F and
U+061C (Hebrew, Arabic), variation selectors (emoji, ideographs), soft hyphen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}

# Ranges shown as <U+XXXX>; each is invisible, reorders text or ends a line unseen.
_NAMED = (
    (0x180E, 0x180E),  # Mongolian vowel separator
    (0x200B, 0x200B),  # zero-width space
    (0x2028, 0x202E),  # line and paragraph separators; bidi embeddings and overrides
    (0x2060, 0x206F),  # word joiner, invisible operators, bidi isolates, deprecated format
    (0xD800, 0xDFFF),  # lone surrogates
    (0xFEFF, 0xFEFF),  # zero-width no-break space
    (0xFFF9, 0xFFFB),  # interlinear annotation
    (0xE0000, 0xE007F),  # tags
)

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    + "".join(f"{chr(first)}-{chr(last)}" for first, last in _NAMED)
    + "]"
)
_UNSAFE_LINE = re.compile(_UNSAFE.pattern[:-1] + "\t\n]")


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code in _PICTURES:
        return _PICTURES[code]
    if code <= 0x9F:
        return f"\\x{code:02x}"
    return f"<U+{code:04X}>"


def is_safe(text: str) -> bool:
    """Return True when :func:`show` would return ``text`` unchanged."""
    return _UNSAFE.search(text) is None


def show(text: str) -> str:
    """Return ``text`` with every character that could act on a terminal made visible.

    Tab and newline stay. The result is safe to write to a terminal and can be encoded as UTF-8;
    ``show(show(x)) == show(x)`` and ``show(a + b) == show(a) + show(b)``.
    """
    return _UNSAFE.sub(_visible, text)


def show_line(text: str) -> str:
    """Like :func:`show`, for one line or table cell: tab and newline are made visible too."""
    return _UNSAFE_LINE.sub(_visible, text)


def safe_stream(pieces: Iterable[str]) -> Iterator[str]:
    """Yield each piece of a stream filtered; equal to filtering the whole text."""
    for piece in pieces:
        yield show(piece)
