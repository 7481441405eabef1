"""Errors a person can act on, each with the exit code that the command line ends with.

Every message is one line that names the place (file, key), the value and the remedy. Backends and
core raise these; only ``tui`` turns them into output.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteersmanError(Exception):
    """Base of every error that steersman raises on purpose.

    Attributes
    ----------
    exit_code : int
        What the command line exits with; 6 unless a subclass says otherwise.
    code : str
        Stable machine name, used in ``--json`` output.
    retryable : bool
        True when the same call may succeed later without a change.
    """

    exit_code = 6
    code = "runtime_error"
    retryable = False


class UsageError(SteersmanError):
    """An argument or option that cannot be used as given (exit code 2)."""

    exit_code = 2
    code = "bad_argument"


class MissingDependency(SteersmanError):
    """A package or device that is not installed or not present (exit code 3)."""

    exit_code = 3
    code = "missing_prerequisite"


class MissingFile(SteersmanError):
    """A file, folder or model that does not exist (exit code 4)."""

    exit_code = 4
    code = "missing_file"


class InvalidInput(SteersmanError):
    """A file or value that exists but cannot be accepted (exit code 5)."""

    exit_code = 5
    code = "invalid_input"


class ProfileError(InvalidInput):
    """A profile that does not parse or names something unknown (exit code 5)."""

    code = "invalid_profile"


class ContextOverflow(InvalidInput):
    """A prompt that does not fit into the context (exit code 5)."""

    code = "context_overflow"


class CapabilityError(SteersmanError):
    """A strategy needs what the loaded model does not offer (exit code 3)."""

    exit_code = 3
    code = "missing_capability"


class BackendError(SteersmanError):
    """The engine failed (exit code 6)."""

    code = "backend_error"


class Cancelled(SteersmanError):
    """The caller asked to stop (exit code 130)."""

    exit_code = 130
    code = "cancelled"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the nearest known name, or the list when none is near.

    Parameters
    ----------
    name : str
        What was written.
    known : iterable of str
        What would have been accepted.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f", did you mean {near[0]!r}?"
    return f"; known: {', '.join(choices)}" if choices else ""
