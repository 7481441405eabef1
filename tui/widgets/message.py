"""One message in the transcript."""

from __future__ import annotations

from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from ..safe_text import show, show_line


class UserMessage(Vertical):
    """What a person wrote, as plain text."""

    def __init__(self, content: str, **options: Any) -> None:
        super().__init__(**options)
        self.content = content

    def compose(self) -> ComposeResult:
        yield Static(Text("You"), classes="label")
        yield Static(Text(show(self.content)), classes="body")


class AnswerMessage(Vertical):
    """An answer, as Markdown that grows.

    Text is filtered for the terminal before the Markdown parser sees it. Growing appends to the
    parsed document instead of parsing it anew; only withdrawn text costs a fresh parse.
    """

    def __init__(self, content: str = "", label: str = "", note: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.content = content
        self._label = label
        self._note = note
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Static(Text(show_line(self._label)), classes="label")
        # A link's target is shown and confirmed before anything is opened.
        yield Markdown(show(self.content), open_links=False, classes="body")
        yield Static(Text(show_line(self._note)), classes="note")

    @property
    def markdown(self) -> Markdown:
        """The growing document."""
        return self.query_one(Markdown)

    def set_label(self, label: str) -> None:
        """Say what made this answer."""
        self._label = label
        self.query_one(".label", Static).update(Text(show_line(label)))

    def set_note(self, note: str, *, error: bool = False) -> None:
        """Show a remark below the answer."""
        self._note = note
        widget = self.query_one(".note", Static)
        widget.update(Text(show_line(note)))
        widget.set_class(error, "error")

    async def write(self, withdrawn: int, text: str) -> None:
        """Take back ``withdrawn`` characters, then append ``text``."""
        if withdrawn:
            self.content = self.content[: len(self.content) - withdrawn] + text
            await self.stop()
            await self.markdown.update(show(self.content))
            return
        self.content += text
        if self._stream is None:
            self._stream = Markdown.get_stream(self.markdown)
        await self._stream.write(show(text))

    async def stop(self) -> None:
        """Finish writing what is on its way."""
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None

    async def finish(self, text: str, note: str) -> None:
        """Set the final text, if it differs from what was streamed, and the note."""
        await self.stop()
        if text != self.content:
            self.content = text
            await self.markdown.update(show(text))
        self.set_note(note)
