"""A recorded text, step by step: what the model proposed and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Footer, Static

from steersman.core.errors import SteersmanError

from .. import trace_text
from ..safe_text import show_line

if TYPE_CHECKING:
    from steersman.core.trace import Recording, Replay

JUMP = 20
SPEEDS = (2, 5, 10, 20, 50, 100)  # steps per second


class TraceScreen(ModalScreen[None]):
    """Walks through a trace; needs neither engine nor model.

    Parameters
    ----------
    replay : Replay
    request : int
        Place of the recording to begin with.
    """

    CSS_PATH = "trace.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Back", priority=True),
        Binding("right", "step(1)", "Forward", priority=True),
        Binding("home", "go(0)", "First", show=False, priority=True),
        Binding("end", "go(-1)", "Last", show=False, priority=True),
        Binding("pageup", f"step(-{JUMP})", f"{JUMP} back", show=False, priority=True),
        Binding("pagedown", f"step({JUMP})", f"{JUMP} forward", show=False, priority=True),
        Binding("space", "play", "Play", priority=True),
        Binding("plus", "speed(1)", "Faster", show=False),
        Binding("minus", "speed(-1)", "Slower", show=False),
        Binding("m", "mark(1)", "Next mark"),
        Binding("b", "mark(-1)", "Mark before", show=False),
        Binding("c", "colour", "Colour"),
        Binding("n", "request(1)", "Next text"),
        Binding("p", "request(-1)", "Text before", show=False),
        Binding("q,escape", "leave", "Leave", priority=True),
    ]

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (98, "-wide")]  # noqa: RUF012 - as Screen has it

    at: reactive[int] = reactive(0, init=False)
    mode: reactive[str] = reactive(trace_text.MODES[0], init=False)

    def __init__(self, replay: Replay, *, request: int = 0) -> None:
        super().__init__()
        self.replay = replay
        self._request = request
        self._timer: Timer | None = None
        self._speed = SPEEDS[2]
        self._usual: str | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="trace-title")
        with VerticalScroll(id="trace-text"):
            yield Static(id="trace-shown")
        yield Static(id="trace-legend")
        yield Static(id="trace-step")
        yield Static(id="trace-notes")
        with Horizontal(id="trace-tables"):
            yield Static(id="trace-stages")
            yield Static(id="trace-alternatives")
        yield Footer()

    def on_mount(self) -> None:
        """Show the first text from its first step."""
        self.query_one("#trace-text").can_focus = False
        self._open(self._request)

    @property
    def recording(self) -> Recording:
        """The text on show."""
        return self.replay.recordings[self._request]

    @property
    def playing(self) -> bool:
        """Whether steps follow by themselves."""
        return self._timer is not None

    def _open(self, request: int) -> None:
        self._request = request
        self._usual = trace_text.usual_role(self.recording)
        self._stop()
        count = len(self.replay.recordings)
        place = f" · text {request + 1} of {count}" if count > 1 else ""
        cut = " · ends at its size limit" if self.replay.full and request == count - 1 else ""
        head = show_line(f"{self.replay.path.name}{place}") + " · "
        line = Text(
            head + trace_text.title(self.recording) + cut, no_wrap=True, overflow="ellipsis"
        )
        self.query_one("#trace-title", Static).update(line)
        self.set_reactive(TraceScreen.at, 0)
        self._refresh()

    def watch_at(self) -> None:
        """Show another step."""
        self._refresh()

    def watch_mode(self) -> None:
        """Colour the text in another way."""
        self._refresh()

    def _refresh(self) -> None:
        recording = self.recording
        shown = trace_text.text_at(recording, self.at, self.mode, self._usual)
        self.query_one("#trace-shown", Static).update(shown)
        self.query_one("#trace-text", VerticalScroll).scroll_end(animate=False)
        self.query_one("#trace-legend", Static).update(trace_text.legend(self.mode, self._usual))
        detail: dict[str, Any] = {}
        line, said = "the trace holds no step of this text", []
        if recording.frames:
            frame = recording.frames[self.at]
            line = trace_text.step_line(recording, self.at)
            said = trace_text.notes_of(recording, frame)
            try:
                detail = self.replay.detail(frame) if frame.kind == "token" else {}
            except SteersmanError as exc:  # somebody changed the file meanwhile
                said = [show_line(str(exc))]
        step = Text(line, no_wrap=True, overflow="ellipsis")
        self.query_one("#trace-step", Static).update(step)
        notes = self.query_one("#trace-notes", Static)
        notes.update(Text("\n".join(said)))
        notes.display = bool(said)
        stages: Any = trace_text.stage_table(detail) if "id" in detail else Text("")
        self.query_one("#trace-stages", Static).update(stages)
        others = trace_text.alternative_table(recording, detail)
        self.query_one("#trace-alternatives", Static).update(others)

    # -- keys ----------------------------------------------------------------------------------

    def action_step(self, by: int) -> None:
        """Go some steps on."""
        self._stop()
        self._move(self.at + by)

    def _move(self, to: int) -> None:
        self.at = max(0, min(to, len(self.recording.frames) - 1))

    def action_go(self, to: int) -> None:
        """Go to a step; negative ones count from the end."""
        self._stop()
        self._move(to if to >= 0 else len(self.recording.frames) + to)

    def action_mark(self, by: int) -> None:
        """Go to where something was taken back, refused, routed or remarked."""
        self._stop()
        frames = self.recording.frames
        at = self.at + by
        while 0 <= at < len(frames) and not frames[at].marked:
            at += by
        if 0 <= at < len(frames):
            self._move(at)

    def action_play(self) -> None:
        """Go on by itself, or stop."""
        if self.playing:
            self._stop()
            return
        if self.at >= len(self.recording.frames) - 1:
            self._move(0)
        self._start()

    def _start(self) -> None:
        self._timer = self.set_interval(1 / self._speed, self._tick)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    def _tick(self) -> None:
        self._move(self.at + 1)
        if self.at >= len(self.recording.frames) - 1:
            self._stop()

    def action_speed(self, by: int) -> None:
        """Play faster or slower."""
        place = max(0, min(SPEEDS.index(self._speed) + by, len(SPEEDS) - 1))
        self._speed = SPEEDS[place]
        if self.playing:
            self._stop()
            self._start()

    def action_colour(self) -> None:
        """Colour by something else."""
        place = trace_text.MODES.index(self.mode) + 1
        self.mode = trace_text.MODES[place % len(trace_text.MODES)]

    def action_request(self, by: int) -> None:
        """Show the next text of the trace."""
        to = self._request + by
        if 0 <= to < len(self.replay.recordings):
            self._open(to)

    def action_leave(self) -> None:
        """Leave the trace."""
        self._stop()
        self.dismiss(None)
