"""Where a person writes: Enter sends, Shift+Enter or Ctrl+J breaks the line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from ..safe_text import show


class PromptArea(TextArea):
    """Multi-line input.

    What is pasted passes the terminal filter: it goes back to the terminal as one types.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send", priority=True),
        Binding("shift+enter,ctrl+j", "newline", "New line", show=False, priority=True),
    ]

    @dataclass
    class Sent(Message):
        """A person pressed Enter on something."""

        text: str

    def action_send(self) -> None:
        """Send what is there, unless it is blank."""
        if self.text.strip():
            self.post_message(self.Sent(self.text))

    def action_newline(self) -> None:
        """Break the line."""
        self.insert("\n")

    def load_text(self, text: str) -> None:
        """Replace the text, filtered."""
        super().load_text(show(text))

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        event.stop()
        if not self.read_only:
            self.insert(show(event.text.replace("\r\n", "\n").replace("\r", "\n")))
