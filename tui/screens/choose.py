"""A list to choose from, with a filter to type into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList
from textual.widgets.option_list import Option

from ..safe_text import show_line


@dataclass(frozen=True)
class Choice:
    """One line: what is returned, what is shown, and a remark."""

    value: str
    title: str
    remark: str = ""


class ChooseScreen(ModalScreen[str | None]):
    """Dismisses with the chosen value, or None.

    Parameters
    ----------
    title : str
    choices : sequence of Choice
    current : str
        Highlighted first and marked.
    free : bool
        Whether what was typed may be taken as it is when nothing matches (a model's path).
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel"),
        Binding("down", "move(1)", "Next", show=False, priority=True),
        Binding("up", "move(-1)", "Previous", show=False, priority=True),
    ]

    def __init__(
        self, title: str, choices: Sequence[Choice], *, current: str = "", free: bool = False
    ) -> None:
        super().__init__()
        self._title = title
        self._choices = list(choices)
        self._current = current
        self._free = free

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Label(Text(self._title))
            hint = "type to filter, or a path" if self._free else "type to filter"
            yield Input(placeholder=hint)
            yield OptionList()

    def on_mount(self) -> None:
        """Fill the list."""
        self._fill("")

    def _fill(self, wanted: str) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        named = None  # what was typed is often a name, and names occur in the remarks of others
        for choice in self._choices:
            if wanted.lower() not in f"{choice.title} {choice.remark}".lower():
                continue
            if wanted and choice.title.lower() == wanted.lower():
                named = options.option_count
            mark = "● " if choice.value == self._current else "  "
            line = Text(mark + show_line(choice.title))
            if choice.remark:
                line.append("  " + show_line(choice.remark), style="dim")
            options.add_option(Option(line, id=f"n{self._choices.index(choice)}"))
            if choice.value == self._current:
                options.highlighted = options.option_count - 1
        if named is not None:
            options.highlighted = named
        elif options.highlighted is None and options.option_count:
            options.highlighted = 0

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as one types."""
        self._fill(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take the highlighted line, or what was typed."""
        options = self.query_one(OptionList)
        if options.highlighted is not None and options.option_count:
            self._take(options.get_option_at_index(options.highlighted))
        elif self._free and event.value.strip():
            self.dismiss(event.value.strip())

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take a line that was clicked."""
        self._take(event.option)

    def _take(self, option: Option) -> None:
        self.dismiss(self._choices[int((option.id or "n0")[1:])].value)

    def action_move(self, step: int) -> None:
        """Move the highlight while the filter keeps the focus."""
        options = self.query_one(OptionList)
        if options.option_count:
            options.highlighted = ((options.highlighted or 0) + step) % options.option_count

    def action_cancel(self) -> None:
        """Choose nothing."""
        self.dismiss(None)
