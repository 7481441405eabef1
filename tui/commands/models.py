"""``steersman models``: what may stand after ``--model`` on this machine."""

from __future__ import annotations

import click

from .. import common, output
from ..envelope import Envelope


@click.command("models")
@click.option("--installed", is_flag=True, help="Only those that can be opened right now.")
@common.output_options
def command(installed: bool) -> None:
    """List models: known by name, in the hub's cache, and conversions; nothing is opened.

    Any GGUF file, Hugging Face folder (safetensors) or hub id (user/repo[:quant]) works as well.
    """
    from steersman.core.locate import list_models

    with Envelope("models") as envelope:
        entries = [e for e in list_models() if e.installed or not installed]
        envelope.result = [
            {
                "name": e.name,
                "origin": e.origin,
                "installed": e.installed,
                "path": None if e.path is None else str(e.path),
                "size": e.size,
                "description": e.description,
                "licence": e.licence,
                "install": e.install,
            }
            for e in entries
        ]
        if envelope.json:
            return
        rows = [
            [
                e.name,
                e.origin,
                "yes" if e.installed else "no",
                "" if e.size is None else _size(e.size),
                (e.description if e.installed else f"{e.description}; get it: {e.install}")
                + (f" ({e.licence})" if e.licence else ""),
            ]
            for e in entries
        ]
        header = ["name", "from", "installed", "size", "description"]
        print(output.table(rows, header=header, right=(3,)))


def _size(size: int) -> str:
    if size < 1_000_000:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 10**9 else f"{size / 1e9:.2f} GB"
