"""What a shell offers where a name may stand: profiles, models, adapters, engines, else files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]
_PLAIN = re.compile(r"[\w./:+-]+")  # what a shell takes as it is


def _offering(names: Callable[[], Iterable[str]], *, otherwise: str | None = None) -> Complete:
    def complete(
        _context: click.Context, _parameter: click.Parameter, begun: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from steersman.core.errors import SteersmanError

        try:
            found = sorted({n for n in names() if n.startswith(begun) and _PLAIN.fullmatch(n)})
        except SteersmanError:
            found = []  # the command itself will say what is wrong
        if found or otherwise is None:
            return [CompletionItem(name) for name in found]
        return [CompletionItem(begun, type=otherwise)]

    return complete


def _profiles() -> Iterable[str]:
    from steersman.core.profile_files import folders, profile_files

    return [name for _, folder in folders() for name in profile_files(folder)]


def _models() -> Iterable[str]:
    from steersman.core.locate import list_models

    return [entry.name for entry in list_models() if entry.installed]


def _adapters() -> Iterable[str]:
    from steersman.core.adapters import adapter_names

    return adapter_names()


profiles = _offering(_profiles, otherwise="file")
models = _offering(_models, otherwise="file")
adapters = _offering(_adapters, otherwise="dir")
engines = _offering(lambda: ("auto", "llamacpp", "mlx", "torch"))
