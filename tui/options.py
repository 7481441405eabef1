"""What the options of several commands have in common: files, whole numbers, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from steersman.core.errors import UsageError

from . import common

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
WIDE = {"max_content_width": 100}  # context_settings of commands with long help texts


def whole(low: int, high: int = 1 << 31) -> common.Finite:
    """Return the type of a whole number in ``low..high``."""
    return common.Finite(low, high, whole=True)


def file_option(*names: str, **settings: Any) -> Callable[[F], F]:
    """Return an option that names a file; none is taken from the environment."""
    return common.option(*names, **{"type": FILE, "metavar": "FILE", "envvar": None, **settings})


def overwrite_option(help: str = "Replace files that are there.") -> Callable[[F], F]:
    """Return ``--overwrite``, which goes with :func:`refuse_existing`."""
    return common.option("--overwrite", is_flag=True, help=help)


def learning_rate_option(default: float, help: str, **settings: Any) -> Callable[[F], F]:
    """Return ``--learning-rate`` of a training."""
    return common.option(
        "--learning-rate", type=common.Finite(1e-9, 1), default=default, help=help, **settings
    )


train_device_option = common.option(
    "--train-device", metavar="cpu|cuda", default="cpu", help="For the training [cpu]."
)


def refuse_existing(*paths: Path | None, overwrite: bool) -> None:
    """Raise UsageError for a file that would be replaced, unless ``overwrite``."""
    for path in paths:
        if path is not None and path.exists() and not overwrite:
            raise UsageError(f"{path}: exists; choose another name or give --overwrite")


def require_safetensors(flag: str, path: Path) -> None:
    """Raise UsageError unless the file that ``flag`` names ends in ``.safetensors``."""
    if path.suffix != ".safetensors":
        raise UsageError(f"{flag} {path}: must end in .safetensors")
