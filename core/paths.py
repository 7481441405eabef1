"""Where steersman keeps its files. ``STEERSMAN_HOME`` puts all of them under one folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_APP = "steersman"


def _folder(kind: str, default: str) -> Path:
    home = os.environ.get("STEERSMAN_HOME")
    return Path(home).expanduser() / kind if home else Path(default)


def config_dir() -> Path:
    """Profiles and settings of the user; not created here."""
    return _folder("config", platformdirs.user_config_dir(_APP, appauthor=False))


def data_dir() -> Path:
    """Conversations and other data worth keeping; not created here."""
    return _folder("data", platformdirs.user_data_dir(_APP, appauthor=False))


def cache_dir() -> Path:
    """Converted models, assembled files, hashes: all of it can be made again; not created here."""
    return _folder("cache", platformdirs.user_cache_dir(_APP, appauthor=False))


def state_dir() -> Path:
    """Logs and the state of interrupted runs; not created here."""
    return _folder("state", platformdirs.user_state_dir(_APP, appauthor=False))
