"""Input of one record per line: read as it comes, errors that name file and line, unique ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from .errors import InvalidInput, MissingFile

T = TypeVar("T")
Report = Callable[[InvalidInput], None]
MAX_LINE = 256 << 20  # bytes


class InputProblem(InvalidInput):
    """Something wrong with a place in the input, told apart by kind so that it can be counted.

    Attributes
    ----------
    kind : str
        One word: "malformed_line", "duplicate_query", "empty_passage" ...
    count : int
        How often it stands in that place.
    """

    def __init__(self, message: str, kind: str, count: int = 1) -> None:
        super().__init__(message)
        self.kind = kind
        self.count = count


class UniqueIds:
    """Ids that may stand once each.

    Parameters
    ----------
    key : str
        Where an id stands in its line.
    thing : str
        What has ids: "query" gives problems of the kind "duplicate_query".
    """

    def __init__(self, key: str, thing: str) -> None:
        self._key, self._thing = key, thing
        self._seen: dict[str, str] = {}

    def take(self, name: str, where: str) -> None:
        """Note that ``name`` stands at ``where``, or raise InputProblem if it stood before."""
        first = self._seen.setdefault(name, where)
        if first != where:
            raise InputProblem(
                f"{where}: {self._key}: {name!r} was used at {first}; "
                f"give each {self._thing} its own",
                f"duplicate_{self._thing}",
            )


def open_text(path: Path) -> IO[bytes]:
    """Open a file, a ``.gz`` one unpacked, for reading bytes.

    Raises
    ------
    MissingFile
    """
    try:
        if path.suffix == ".gz":
            import gzip

            return gzip.open(path, "rb")  # type: ignore[return-value]
        return path.open("rb")
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except OSError as error:
        raise MissingFile(f"{path}: cannot be read: {error.strerror or error}") from None


def read_records(
    lines: Iterable[bytes],
    name: str,
    parse: Callable[[str, str], T],
    *,
    report: Report | None = None,
) -> Iterator[T]:
    """Yield what ``parse`` makes of every line that is not blank, as they come.

    Parameters
    ----------
    lines : iterable of bytes
        An open file, or stdin.
    name : str
        What to call it in errors.
    parse : callable
        Takes a line and its ``name:line``; raises InvalidInput for a line that cannot be used.
    report : callable, optional
        Called with an InvalidInput for each such line, and reading goes on; if None, the first one
        is raised.
    """
    for where, text in numbered_lines(lines, name, report):
        try:
            record = parse(text, where)
        except InvalidInput as error:
            tell(report, error)
        else:
            yield record


def line_id(where: str) -> str:
    """Return the id of a record that has none: ``line-`` and its number."""
    return f"line-{where.rpartition(':')[2]}"


def numbered_lines(
    lines: Iterable[bytes], name: str, report: Report | None
) -> Iterator[tuple[str, str]]:
    """Yield ``("name:line", text)`` for every line that is not blank.

    Lines that are not UTF-8 are reported and left out. Works line by line, so a pipe is read as it
    comes. A byte order mark at the start and CR before LF are dropped.
    """
    for number, data in enumerate(_bounded(lines), start=1):
        where = f"{name}:{number}"
        if data is None:
            problem = f"{where}: longer than {MAX_LINE >> 20} MiB; one line holds one record"
            tell(report, InputProblem(problem, "long_line"))
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            text = data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            tell(report, InputProblem(f"{where}: not UTF-8 at byte {error.start}", "not_utf8"))
            continue
        if text.strip():
            yield where, text


def _bounded(lines: Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield the lines, None for each that is too long to be held in memory."""
    readline = getattr(lines, "readline", None)
    if readline is None:
        yield from lines
        return
    while data := readline(MAX_LINE + 1):
        if len(data) <= MAX_LINE or data.endswith(b"\n"):
            yield data
            continue
        while data and not data.endswith(b"\n"):
            data = readline(1 << 20)
        yield None


def tell(report: Report | None, error: InvalidInput) -> None:
    """Hand an error to ``report``, or raise it if nobody listens."""
    if report is None:
        raise error
    report(error)
