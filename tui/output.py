"""What reaches the terminal: results on stdout, everything else on stderr.

Text for a terminal goes through :mod:`steersman.tui.safe_text`; generated text that goes into a
pipe or file is written as the model wrote it, in UTF-8. Colour appears only on a terminal and only
when ``NO_COLOR`` is unset.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from .safe_text import show, show_line

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclass
class RunState:
    """What one call of the program was asked about its output; set while options are read."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    emitted: bool = False  # an envelope has been printed
    bar: Any = None  # the progress bar on show


state = RunState()


def reset() -> None:
    """Forget the options of an earlier call in the same process, and make printing robust."""
    state.json = state.quiet = state.debug = state.emitted = False
    state.bar = None
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not UTF-8 gets \u.... instead of an exception.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream: TextIO) -> bool:
    """Return True when ``stream`` is an open terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def styled(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """Return ``text`` in colour when ``stream`` (default stdout) is a terminal that wants it.

    ``text`` must have passed the filter already.
    """
    target = sys.stdout if stream is None else stream
    wanted = is_terminal(target) and not os.environ.get("NO_COLOR")
    if not wanted or os.environ.get("TERM") == "dumb" or not text:
        return text
    return f"\x1b[{';'.join(_STYLES[s] for s in styles)}m{text}\x1b[0m"


def write_generated(text: str) -> None:
    """Write generated text to stdout: filtered on a terminal, as it is into a pipe or file."""
    out = sys.stdout
    if is_terminal(out):
        out.write(show(text))
    else:
        out.flush()
        data = text.encode("utf-8", "replace")
        if hasattr(out, "buffer"):
            out.buffer.write(data)
        else:
            out.write(data.decode("utf-8"))
    out.flush()


def print_text(text: str = "") -> None:
    """Write filtered lines to stdout; ``text`` holds no colour."""
    sys.stdout.write(show(text) + "\n")


def print_styled(text: str) -> None:
    """Write a line made of filtered pieces and :func:`styled` to stdout."""
    sys.stdout.write(text + "\n")


def print_json(text: str) -> None:
    """Write a line of JSON, already escaped, to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Write one line to stderr unless ``--quiet``."""
    if not state.quiet:
        _stderr(styled(show_line(text), "dim", stream=sys.stderr))


def warn(text: str) -> None:
    """Write a warning to stderr, also under ``--quiet``."""
    _stderr(styled("warning: ", "yellow", stream=sys.stderr) + show_line(text))


def error(text: str) -> None:
    """Write one error line to stderr."""
    _stderr(styled("error: ", "red", stream=sys.stderr) + show_line(text))


def _stderr(line: str) -> None:
    try:
        if state.bar is not None:
            state.bar.clear()
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
        if state.bar is not None:
            state.bar.refresh()
    except (OSError, ValueError):
        pass  # nobody is there to be told


class Progress(Protocol):
    """A progress bar, shown or not."""

    def update(self, n: int = 1) -> Any:
        """Move on by ``n``."""


class _Hidden:
    def update(self, n: int = 1) -> None:
        pass


@contextmanager
def progress(total: int | None, *, label: str, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show a bar on stderr when that is a terminal and ``--quiet`` was not given."""
    if state.quiet or not is_terminal(sys.stderr):
        yield _Hidden()
        return
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    with tqdm(
        total=total,
        desc=show_line(label),
        unit=unit,
        initial=done,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        state.bar = bar
        try:
            yield bar
        finally:
            state.bar = None


def width(text: str) -> int:
    """Return how many terminal columns a filtered line takes."""
    columns = 0
    for char in text:
        if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
            continue
        columns += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return columns


def table(
    rows: Sequence[Sequence[object]], *, header: Sequence[str] = (), right: Sequence[int] = ()
) -> str:
    """Return aligned columns; every cell is filtered, so any text may stand in one.

    Parameters
    ----------
    rows : sequence of sequences
    header : sequence of str
        Bold on a terminal.
    right : sequence of int
        Columns aligned to the right.
    """
    cells = [[show_line(str(cell)) for cell in row] for row in ([header] if header else [])]
    cells += [[show_line(str(cell)) for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(width(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for number, row in enumerate(cells):
        parts = []
        for i, cell in enumerate(row):
            pad = " " * (widths[i] - width(cell))
            parts.append(pad + cell if i in right else cell + pad)
        line = "  ".join(parts).rstrip()
        lines.append(styled(line, "bold") if header and number == 0 else line)
    return "\n".join(lines)
