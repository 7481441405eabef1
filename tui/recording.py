"""Recording traces in the full-screen chat, and looking at them there."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import App

from steersman.core.errors import SteersmanError

from .safe_text import show_line
from .tracing import Recorder

if TYPE_CHECKING:

    class _Base(App[None]):
        @property
        def busy(self) -> bool: ...
else:
    _Base = object


class Recording(_Base):
    """The part of the chat that records how answers come about."""

    recorder: Recorder | None = None
    trace_path: Path | None = None  # of the newest trace

    def action_record_trace(self) -> None:
        """Record answers from the next one on, or stop."""
        if self.recorder is not None:
            if self.busy:
                self.notify("Esc stops the running answer first.", severity="warning")
                return
            self.recorder.close()
            self.recorder = None
            self.notify("Nothing is recorded from now on.")
            return
        path = Path(f"trace-{datetime.now():%Y%m%d-%H%M%S}.jsonl")
        try:
            self.recorder = Recorder(path, warn=self._warn_about_trace)
        except SteersmanError as exc:
            self.notify(show_line(str(exc)), severity="error", markup=False)
            return
        self.trace_path = path
        self.notify(f"Recording the next answers to {path}.", markup=False)

    def _warn_about_trace(self, message: str) -> None:
        self.notify(show_line(message), severity="warning", markup=False)

    def action_show_trace(self) -> None:
        """Walk through the newest recorded answer."""
        path = self.trace_path
        if path is None or not path.exists():
            self.notify("No answer was recorded yet: choose Record trace first.")
            return
        from steersman.core.trace import Replay

        from .screens.trace import TraceScreen

        try:
            replay = Replay(path)
        except SteersmanError as exc:
            self.notify(show_line(str(exc)), severity="error", markup=False)
            return
        if replay.recordings:
            self.push_screen(TraceScreen(replay, request=len(replay.recordings) - 1))

    def close_trace(self) -> None:
        """Close the file, if one is open."""
        if self.recorder is not None:
            self.recorder.close()
