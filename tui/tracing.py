"""``--trace FILE``: recording how texts came about, from the commands and the chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from steersman.core.errors import InvalidInput

from . import common, output

if TYPE_CHECKING:
    from steersman.core.decode.events import Event
    from steersman.core.model import Model
    from steersman.core.profile import Profile
    from steersman.core.trace import TraceWriter

DEFAULT_TOP = 5
DEFAULT_LIMIT = 64 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, such as 500K, 64M or 2G."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return bytes, or fail naming the range."""
        match = re.fullmatch(r"(\d{1,12})\s*([KMG]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
        if not 1 << 10 <= size <= 1 << 40:
            self.fail(f"{value!r} is not a size from 1K to 1024G, such as 64M", param, ctx)
        return size


@dataclass(frozen=True, kw_only=True)
class TraceArgs:
    """What the person asked about the trace."""

    trace: str | None = None
    trace_top: int = DEFAULT_TOP
    trace_limit: int = DEFAULT_LIMIT

    def recorder(self, *, append: bool = False) -> Recorder:
        """Return what records, or does nothing if no file was named.

        Raises
        ------
        InvalidInput
            The file exists, unless ``append``.
        """
        return Recorder(self.trace, top=self.trace_top, limit=self.trace_limit, append=append)


def trace_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--trace`` and its companions; the command takes ``trace_args: TraceArgs``."""
    decorators = [
        common.collect(["trace", "trace_top", "trace_limit"], "trace_args", TraceArgs),
        common.option(
            "--trace", metavar="FILE", envvar=None,
            help="Record how each token came about; see steersman trace.",
        ),
        common.option(
            "--trace-top", type=common.Finite(0, 100, whole=True), default=DEFAULT_TOP,
            show_default=True, help="Likeliest tokens to record per token and stage.",
        ),
        common.option(
            "--trace-limit", type=Size(), default="64M", show_default=True, metavar="SIZE",
            help="Most bytes of the trace; the text goes on without it.",
        ),
    ]  # fmt: skip
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


class Recorder:
    """Passes events on and writes them to a trace, if there is one.

    The file is made when the first text begins, so that a run that fails before leaves none.

    Parameters
    ----------
    path : str or None
    top, limit
        As the options say.
    append : bool
        Go on with a trace that is there.
    warn : callable
        Told once if the trace had to end early.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        top: int = DEFAULT_TOP,
        limit: int = DEFAULT_LIMIT,
        append: bool = False,
        warn: Callable[[str], None] = output.warn,
    ) -> None:
        self.path = path
        self._top = top
        self._limit = limit
        self._append = append
        self._warn = warn
        self._writer: TraceWriter | None = None
        if path is not None and not append and Path(path).exists():
            raise InvalidInput(f"--trace {path}: exists already; choose another name")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    @property
    def top(self) -> int | None:
        """What ``stream`` takes as ``trace``: nothing once nothing more would be written."""
        if self.path is None or (self._writer is not None and not self._writer.open):
            return None
        return self._top

    def follow(
        self,
        events: Iterable[Event],
        *,
        models: Model | Mapping[str, Model],
        profile: Profile,
        request: int | None = None,
    ) -> Iterator[Event]:
        """Yield ``events`` on, recorded."""
        if self.top is None:
            yield from events
            return
        if self._writer is None:
            from steersman.core.trace import TraceWriter

            assert self.path is not None
            self._writer = TraceWriter(self.path, limit=self._limit, append=self._append)
        try:
            yield from self._writer.record(events, models=models, profile=profile, request=request)
        finally:
            self._tell()

    def _tell(self) -> None:
        writer = self._writer
        if writer is None or writer.open:
            return
        if writer.problem is not None:
            self._warn(f"--trace {writer.problem}")
        else:
            self._warn(
                f"--trace {writer.path}: reached {writer.limit} bytes and ends there; "
                "--trace-limit allows more"
            )
