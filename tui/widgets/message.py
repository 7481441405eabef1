"""One message in the transcript."""

from __future__ import annotations

import re
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widget import Widget
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


# Whenever an answer grows, every widget of the transcript is laid out anew, seen or not, and
# Markdown makes a widget of every paragraph. So a long answer is cut into parts, and while it grows
# all but the last few stand as one widget each, with their source text: growing then costs the same
# at the end as at the beginning. When the answer is done, all parts are shown as they should be.
PART_LENGTH = 700
LIVE_PARTS = 3
SHOWN_TAKEN = 60  # characters of a passage that was taken back
# Where a cut changes nothing: after a blank line, before a paragraph or heading. Not before what
# may belong to a list, a table, a quotation or indented code.
_CUT = re.compile(r"\n\n(?=[#*_`(\"'A-Za-z\u00c0-\U0010ffff])(?![*`_-]+\s)(?!```)")


def next_cut(text: str) -> int | None:
    """Return the first place from ``PART_LENGTH`` on where ``text`` may be cut, if there is one."""
    for match in _CUT.finditer(text, max(0, PART_LENGTH - 2)):
        if text.count("```", 0, match.end()) % 2 == 0:
            return match.end()
    return None


def parts(text: str) -> list[str]:
    """Cut Markdown into parts that look the same one below the other."""
    found = []
    while (at := next_cut(text)) is not None:
        found.append(text[:at])
        text = text[at:]
    return [*found, text]


class AnswerMessage(Vertical):
    """An answer, as Markdown that grows.

    Holds the label, the note and the first part; further parts follow it in the same parent. Text
    is filtered for the terminal before the Markdown parser sees it. Growing appends to the last
    part of the parsed document; only withdrawn text costs a fresh parse.
    """

    def __init__(self, content: str = "", label: str = "", note: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.content = content
        self._label = label
        self._note = note
        first, *self._rest = parts(content)
        self._tail = first  # what the last part holds
        self.parts = [self._part(first)]
        self._sources: list[str] = []  # of the parts that are complete
        self._stand_ins: list[Static] = []
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Static(Text(show_line(self._label)), classes="label")
        note = Static(Text(show_line(self._note)), classes="note")
        note.display = bool(self._note)
        yield note
        yield self.parts[0]

    async def on_mount(self) -> None:
        """Add the parts of an answer that is there already."""
        rest, self._rest = self._rest, []
        for part in rest:
            await self._add(part)

    async def _add(self, text: str) -> None:
        """Begin another part."""
        parent, last = self.parent, self.parts[-1]
        if not isinstance(parent, Widget):  # removed meanwhile
            return
        self.parts.append(self._part(text))
        self._tail = text
        await parent.mount(self.parts[-1], after=self if last is self.parts[0] else last)

    async def _rest_parts(self) -> None:
        """Let a stand-in take the place of the part that has just become old."""
        old = len(self.parts) - 1 - LIVE_PARTS
        parent = self.parent
        if old < 1 or old >= len(self._sources) or not isinstance(parent, Widget):
            return
        source = Text(show(self._sources[old].rstrip()))
        self._stand_ins.append(Static(source, classes="stand-in"))
        await parent.mount(self._stand_ins[-1], before=self.parts[old])
        self.parts[old].display = False

    async def _show_parts(self) -> None:
        """Show every part as Markdown again."""
        for part in self.parts:
            part.display = True
        for stand_in in self._stand_ins:
            await stand_in.remove()
        self._stand_ins.clear()

    @staticmethod
    def _part(text: str) -> Markdown:
        # A link's target is shown and confirmed before anything is opened.
        return Markdown(show(text), open_links=False, classes="body")

    @property
    def markdown(self) -> Markdown:
        """The growing part of the document."""
        return self.parts[-1]

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
        widget.display = bool(note)

    def took_back(self, text: str, times: int) -> None:
        """Show what was just taken back, struck through, and how often that has happened."""
        gone = show_line(text.strip() or "blank space")
        if len(gone) > SHOWN_TAKEN:
            gone = "…" + gone[-SHOWN_TAKEN:]
        count = "" if times == 1 else f" ({times} times so far)"
        widget = self.query_one(".note", Static)
        widget.update(Text.assemble("took back ", (gone, "strike"), count))
        widget.set_class(False, "error")
        widget.display = True

    async def write(self, withdrawn: int, text: str) -> None:
        """Take back ``withdrawn`` characters, then append ``text``."""
        if withdrawn:
            await self._show(self.content[: len(self.content) - withdrawn] + text)
            return
        self.content += text
        self._tail += text
        while (at := next_cut(self._tail)) is not None:
            before, text = self._tail[:at], self._tail[at:]
            await self.stop()
            await self.markdown.update(show(before))
            await self._add("")
            self._tail = text
            self._sources.append(before)
            await self._rest_parts()
        if self._stream is None:
            self._stream = Markdown.get_stream(self.markdown)
        await self._stream.write(show(text))

    async def _show(self, content: str) -> None:
        """Show other content than what was streamed."""
        await self.stop()
        await self._show_parts()
        self.content = content
        for part in self.parts[1:]:
            await part.remove()
        del self.parts[1:]
        self._tail, *rest = parts(content)
        self._sources = [self._tail, *rest][:-1]
        await self.markdown.update(show(self._tail))
        for text in rest:
            await self._add(text)

    async def stop(self) -> None:
        """Finish writing what is on its way."""
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None

    async def finish(self, text: str, note: str) -> None:
        """Set the final text, if it differs from what was streamed, and the note."""
        await self.stop()
        await self._show_parts()
        if text != self.content:
            await self._show(text)
        self.set_note(note)
