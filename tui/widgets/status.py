"""The bottom line: what answers, how fast, and how full the context is."""

from __future__ import annotations

from typing import Any

from rich.text import Text
from textual.reactive import reactive
from textual.widgets import Static

from ..safe_text import show_line


class StatusLine(Static):
    """Model, engine, profile, state, tokens per second, context use."""

    model: reactive[str] = reactive("")
    backend: reactive[str] = reactive("")
    profile: reactive[str] = reactive("")
    state: reactive[str] = reactive("ready")
    speed: reactive[float] = reactive(0.0)
    used: reactive[int] = reactive(0)
    context: reactive[int] = reactive(0)

    def __init__(self, **options: Any) -> None:
        super().__init__("", **options)

    def _line(self) -> str:
        parts = [f"{self.model} on {self.backend}", self.profile, self.state]
        if self.speed:
            parts.append(f"{self.speed:.1f} tok/s")
        if self.context:
            share = 100 * self.used / self.context
            parts.append(f"context {self.used}/{self.context} ({share:.0f} %)")
        return " │ ".join(parts)

    def render(self) -> Text:
        """Return the line, filtered."""
        return Text(show_line(self._line()), no_wrap=True, overflow="ellipsis")
