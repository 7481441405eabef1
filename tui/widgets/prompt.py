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

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "send", "Send")]

    @dataclass
    class Sent(Message):
        """A person pressed Enter on something."""

        text: str

    def action_send(self) -> None:
        """Send what is there, unless it is blank."""
        if self.text.strip():
            self.post_message(self.Sent(self.text))

    async def _on_key(self, event: events.Key) -> None:
        # Here and not as priority bindings: those overtake letters that are still on their way.
        if event.key in ("enter", "shift+enter", "ctrl+j"):
            event.stop()
            event.prevent_default()
            if event.key == "enter":
                self.action_send()
            else:
                self.insert("\n")
            return
        await super()._on_key(event)

    def load_text(self, text: str) -> None:
        """Replace the text, filtered."""
        super().load_text(show(text))

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        event.stop()
        if not self.read_only:
            self.insert(show(event.text.replace("\r\n", "\n").replace("\r", "\n")))
