"""Folders that steersman reads and writes.

The platform's own places (through platformdirs), or one folder for all of them when
``$STEERSMAN_HOME`` is set. Nothing is created here: whoever writes makes the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "STEERSMAN_HOME"


def _folder(kind: str) -> Path:
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home).expanduser() / kind
    import platformdirs

    found = getattr(platformdirs, f"user_{kind}_path")("steersman", appauthor=False)
    return Path(found)


def config_dir() -> Path:
    """Return the folder of ``config.yaml`` and of the user's profiles."""
    return _folder("config")


def data_dir() -> Path:
    """Return the folder of conversations and of models put there by hand."""
    return _folder("data")


def cache_dir() -> Path:
    """Return the folder of what can be made again: converted models, results of checks."""
    return _folder("cache")


def state_dir() -> Path:
    """Return the folder of history and logs."""
    return _folder("state")
