"""The machine-readable answer of every command, and how an exception becomes one.

``--json`` (or ``--output json``) prints exactly one object on stdout, whatever happens:

``schema_version``, ``command``, ``mode``, ``status`` ("ok", "partial", "error", "cancelled"),
``exit_code``, ``inputs`` (what was asked), ``resolved`` (what that came to), ``artifacts`` (files
written), ``validation``, ``metrics``, ``warnings``, ``errors`` (``code``, ``message``,
``retryable``) and ``result``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import click

from steersman.core.errors import SteersmanError
from steersman.core.strict_json import to_json as to_json

from . import output

SCHEMA_VERSION = "steersman.cli.v1"

OK, BAD_ARGUMENT, MISSING, MISSING_FILE, INVALID, RUNTIME, PARTIAL, CANCELLED = (
    0, 2, 3, 4, 5, 6, 7, 130,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error as the command line reports it."""

    code: str
    message: str
    retryable: bool = False
    exit_code: int = RUNTIME

    def as_dict(self) -> dict[str, Any]:
        """Return the three fields that stand in an envelope."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable}


def problem(exc: BaseException) -> Problem:
    """Return what to tell a person about ``exc``, on one line."""
    if isinstance(exc, SteersmanError):
        return Problem(
            code=exc.code,
            message=_one_line(str(exc)),
            retryable=exc.retryable,
            exit_code=exc.exit_code,
        )
    if isinstance(exc, KeyboardInterrupt | click.Abort):
        return Problem(code="cancelled", message="cancelled", exit_code=CANCELLED)
    if isinstance(exc, click.FileError):
        return Problem(
            code="missing_file", message=_one_line(exc.format_message()), exit_code=MISSING_FILE
        )
    if isinstance(exc, click.ClickException):
        return Problem(
            code="bad_argument", message=_one_line(exc.format_message()), exit_code=BAD_ARGUMENT
        )
    if isinstance(exc, FileNotFoundError):
        return Problem(code="missing_file", message=_os_error(exc), exit_code=MISSING_FILE)
    if isinstance(exc, PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError):
        return Problem(code="invalid_input", message=_os_error(exc), exit_code=INVALID)
    if isinstance(exc, OSError):
        return Problem(code="os_error", message=_os_error(exc), retryable=True)
    if isinstance(exc, MemoryError):
        return Problem(
            code="out_of_memory",
            message="out of memory; use a smaller model, --ctx-size or --dtype",
        )
    said = _one_line(str(exc))
    return Problem(
        code="unexpected_error",
        message=f"unexpected {type(exc).__name__}{': ' if said else ''}{said} "
        "(--debug shows the traceback)",
    )


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _os_error(exc: OSError) -> str:
    where = f"{exc.filename}: " if exc.filename is not None else ""
    return _one_line(f"{where}{exc.strerror or exc}")


class Envelope:
    """The answer of one command; used as a context manager around its work.

    In JSON mode leaving the block prints the object, after an exception too (which then goes on
    to set the exit code). In text mode it prints nothing: the command does.

    Parameters
    ----------
    command : str
    mode : str
        "run", "dry-run" or "validate".
    """

    def __init__(self, command: str, mode: str = "run") -> None:
        self.command = command
        self.mode = mode
        self.exit_code = OK
        self.inputs: dict[str, Any] = {}
        self.resolved: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.errors: list[Problem] = []
        self.result: Any = None

    @property
    def json(self) -> bool:
        """True when the answer is printed as JSON."""
        return output.state.json

    def warn(self, message: str) -> None:
        """Record a warning, and show it on stderr."""
        self.warnings.append(message)
        output.warn(message)

    def fail(self, error: Problem | Exception, *, exit_code: int | None = None) -> None:
        """Record an error that does not stop the command, and show it on stderr.

        The command then ends with ``exit_code`` (default: the error's own).
        """
        found = error if isinstance(error, Problem) else problem(error)
        self.errors.append(found)
        self.exit_code = found.exit_code if exit_code is None else exit_code
        output.error(found.message)

    def note_artifacts(self) -> None:
        """Say on stderr which files were written."""
        for kind, path in self.artifacts.items():
            output.note(f"{kind}: {path}")

    @property
    def status(self) -> str:
        """One word for how it went."""
        known = {OK: "ok", PARTIAL: "partial", CANCELLED: "cancelled"}
        return known.get(self.exit_code, "error")

    def as_dict(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "mode": self.mode,
            "status": self.status,
            "exit_code": self.exit_code,
            "inputs": self.inputs,
            "resolved": self.resolved,
            "artifacts": self.artifacts,
            "validation": self.validation,
            "metrics": self.metrics,
            "warnings": self.warnings,
            "errors": [e.as_dict() for e in self.errors],
            "result": self.result,
        }

    def emit(self) -> None:
        """Print the object (once per call of the program)."""
        if not output.state.emitted:
            output.state.emitted = True
            output.print_json(to_json(self.as_dict()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(exc, BrokenPipeError | click.exceptions.Exit | SystemExit):
            return
        if exc is not None:
            found = problem(exc)
            self.errors.append(found)
            self.exit_code = found.exit_code
        if self.json:
            self.emit()
        if exc is None and self.exit_code:
            raise click.exceptions.Exit(self.exit_code)
