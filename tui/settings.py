"""Default values of options from files: ``./steersman.yaml``, then the user's ``config.yaml``.

Both hold the long option names (``max_tokens`` or ``max-tokens``), and may hold a section per
command with the same names::

    model: smollm2
    backend: llamacpp
    generate: {profile: precise, max_tokens: 200}

Order of precedence: flag, environment (``STEERSMAN_...``), project file, user file, profile,
built-in value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steersman.core.errors import InvalidInput, did_you_mean

PROJECT_FILE = "steersman.yaml"
USER_FILE = "config.yaml"

# What may stand in a file: option name -> accepted Python types.
NUMBER = (int, float)
SETTINGS: Mapping[str, tuple[type, ...]] = {
    "model": (str,),
    "backend": (str,),
    "ctx_size": (int,),
    "threads": (int,),
    "dtype": (str,),
    "device": (str,),
    "setting": (str,),
    "layers": (int, str),
    "draft_model": (str,),
    "model_for": (str, list),
    "offline": (bool,),
    "profile": (str,),
    "max_tokens": (int,),
    "temp": NUMBER,
    "top_k": (int,),
    "top_p": NUMBER,
    "min_p": NUMBER,
    "seed": (int,),
    "stop": (str, list),
    "truncate": (bool,),
    "trace_top": (int,),
    "trace_limit": (int, str),
    "quiet": (bool,),
    "output": (str,),
    "system": (str,),
}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Defaults:
    """Merged values per command, and the file each came from."""

    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origins: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def origin(self, command: str, name: str) -> str:
        """Return the file that set ``name`` for ``command``."""
        return self.origins.get((command, name), "a settings file")


def files() -> list[Path]:
    """Return the settings files that exist, the strongest first."""
    from steersman.core.paths import config_dir

    candidates = [Path(PROJECT_FILE), config_dir() / USER_FILE]
    return [path for path in candidates if path.is_file()]


def read_defaults(commands: Iterable[str]) -> Defaults:
    """Read the settings files.

    Raises
    ------
    InvalidInput
        With file and line: an unknown name or a value of the wrong type.
    """
    names = list(commands)
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    origins: dict[tuple[str, str], str] = {}
    for path in files():  # the first file to set a value wins
        found = _read(path, names)
        for command in names:
            for section in (found.get(command, {}), found.get("", {})):
                for key, value in section.items():
                    if key not in values[command]:
                        values[command][key] = value
                        origins[command, key] = str(path)
    return Defaults(values, origins)


def _read(path: Path, commands: list[str]) -> dict[str, dict[str, Any]]:
    from steersman.core import strict_yaml

    document = strict_yaml.read(path, error_type=InvalidInput)
    if document.data is None:
        return {}
    if not isinstance(document.data, dict):
        document.error((), "must hold names and values, such as 'model: smollm2'")
    sections: dict[str, dict[str, Any]] = {"": {}}
    for key, value in document.data.items():
        if key in commands:
            if not isinstance(value, dict):
                document.error((key,), "must hold names and values")
            sections[key] = {
                _name(document, (key, inner)): _checked(document, (key, inner), given)
                for inner, given in value.items()
            }
        else:
            name = _name(document, (key,), commands)
            sections[""][name] = _checked(document, (key,), value)
    return sections


def _name(document: Any, path: tuple[str, ...], commands: Iterable[str] = ()) -> str:
    name = path[-1].replace("-", "_")
    if name not in SETTINGS:
        document.error(path, f"unknown key{did_you_mean(path[-1], [*SETTINGS, *commands])}")
    return name


def _checked(document: Any, path: tuple[str, ...], value: Any) -> Any:
    types = SETTINGS[path[-1].replace("-", "_")]
    right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if right and isinstance(value, list):
        right = all(isinstance(item, str) for item in value)
    if not right:
        wanted = "text or a list of texts" if list in types else _WORDS[types[-1]]
        document.error(path, f"must be {wanted}, got {value!r}")
    return [value] if list in types and isinstance(value, str) else value
