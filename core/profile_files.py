"""Where profiles lie: the user's folder, then the built-in one."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from .errors import InvalidInput, MissingFile, UsageError, did_you_mean
from .paths import config_dir

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def user_folder() -> Path:
    """Return the folder of the user's profiles; it need not exist."""
    return config_dir() / "profiles"


def builtin_folder() -> Path:
    """Return the folder of the profiles that come with steersman."""
    return (Path(__file__).parent.parent / "profiles").resolve()


def folders() -> list[tuple[str, Path]]:
    return [("user", user_folder()), ("built-in", builtin_folder())]


def profile_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {p.stem: p for p in sorted(folder.glob("*.yaml")) if _NAME.fullmatch(p.stem)}


def profile_names() -> list[str]:
    """Return all names, sorted, without reading any file."""
    return sorted({name for _, folder in folders() for name in profile_files(folder)})


def find_profile(name_or_path: str | Path) -> Path:
    """Return the file of a profile.

    Raises
    ------
    MissingFile
        With the nearest name.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text or os.sep in text:
        path = Path(text).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            raise MissingFile(f"profile {text}: a profile's file ends in .yaml")
        if not path.is_file():
            raise MissingFile(f"profile {text}: no such file")
        return path
    for _, folder in folders():
        path = folder / f"{text}.yaml"
        if _NAME.fullmatch(text) and path.is_file():
            return path
    raise MissingFile(f"profile {text!r}: not found{did_you_mean(text, profile_names())}")


def new_profile(name: str, *, template: str = "balanced") -> Path:
    """Copy a profile, comments included, to the user's folder under a new name.

    The file appears whole or not at all, and never replaces one.

    Raises
    ------
    UsageError
        The name is not usable.
    InvalidInput
        A profile of this name exists in the user's folder, or it cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"profile {name!r}: a name has letters, digits, '.', '_' and '-', at most 100 of them"
        )
    text = find_profile(template).read_bytes()
    folder = user_folder()
    target = folder / f"{name}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.link(temporary, target)  # fails when the target exists; a rename would replace it
        finally:
            os.unlink(temporary)
    except FileExistsError:
        raise InvalidInput(f"{target}: exists already; edit it or choose another name") from None
    except OSError as exc:
        raise InvalidInput(f"{target}: cannot be written: {exc.strerror}") from None
    return target
