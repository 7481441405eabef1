"""Ask before a link that a model wrote is opened."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, Static

from ..safe_text import show_line


class LinkScreen(ModalScreen[bool]):
    """Shows a link's whole target; dismisses with True when it shall be opened."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Open"),
        Binding("n,escape,enter", "answer(False)", "Do not open"),
    ]

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = target

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Label(Text("Open this link in the browser? (y/n)"))
            yield Static(Text(show_line(self._target), overflow="fold"))

    def action_answer(self, opens: bool) -> None:
        """Answer."""
        self.dismiss(opens)
