"""``steersman paths``: where everything lies."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .. import common, output
from ..settings import PROJECT_FILE, USER_FILE


@click.command("paths")
@common.output_options
def command() -> None:
    """Print the folders and files in use. STEERSMAN_HOME moves all of them but the project file."""
    from steersman.core import paths, profile

    places = {
        "config": paths.config_dir(),
        "settings (user)": paths.config_dir() / USER_FILE,
        "settings (project)": Path(PROJECT_FILE).absolute(),
        "profiles (user)": profile.user_folder(),
        "profiles (built-in)": profile.builtin_folder(),
        "data": paths.data_dir(),
        "cache": paths.cache_dir(),
        "state": paths.state_dir(),
        "hub cache": hub_cache(),
    }
    with common.Envelope("paths") as envelope:
        envelope.result = {
            name: {"path": str(path), "exists": path.exists()} for name, path in places.items()
        }
        if not envelope.json:
            rows = [[n, p, "" if p.exists() else "(not there)"] for n, p in places.items()]
            print(output.table(rows))


def hub_cache() -> Path:
    """Return the folder that the Hugging Face hub client downloads to."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(home).expanduser() / "hub"
