"""The terminal app of ``steersman trace show``: the trace screen and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.app import App

from .screens.trace import TraceScreen

if TYPE_CHECKING:
    from steersman.core.trace import Replay


class TraceApp(App[None]):
    """Shows one trace and ends when it is left.

    Parameters
    ----------
    replay : Replay
    request : int
        Place of the recording to begin with.
    """

    TITLE = "steersman trace"
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, replay: Replay, *, request: int = 0) -> None:
        super().__init__()
        self._replay = replay
        self._request = request

    def on_mount(self) -> None:
        """Open the screen."""
        screen = TraceScreen(self._replay, request=self._request)
        self.push_screen(screen, lambda _: self.exit())
