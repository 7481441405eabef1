"""What a person can switch in mid-conversation, and the palette that lists it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from textual import on, work
from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.screen import Screen

from steersman.core.errors import SteersmanError

from . import messages
from .envelope import problem
from .safe_text import show_line
from .screens.choose import Choice, ChooseScreen

if TYPE_CHECKING:
    from steersman.core.profile import Profile

    from .engine import ChatEngine
    from .widgets.status import StatusLine


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """A profile whose models are being opened, and what to do when they are."""

    profile: Profile
    then: Callable[[], Any] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)


class Switching(App[None]):
    """The part of the chat that chooses what answers next; the app is built on it."""

    engine: ChatEngine
    profile: Profile

    if TYPE_CHECKING:  # what the app itself adds

        @property
        def busy(self) -> bool: ...
        @property
        def status(self) -> StatusLine: ...
        def refresh_status(self) -> None: ...
        async def action_regenerate(self) -> None: ...
        def action_export(self) -> None: ...
        def action_record_trace(self) -> None: ...
        def action_show_trace(self) -> None: ...
        def action_toggle_truncate(self) -> None: ...

    _change: Change | None = None

    @property
    def changing(self) -> bool:
        """Whether models are being opened for another profile."""
        return self._change is not None

    def action_regenerate_with(self) -> None:
        """Choose a profile, then answer again."""

        def chosen(name: str | None) -> None:
            if name is not None:
                self._set_profile(name, self.action_regenerate)

        self._ask_profile(chosen)

    def _ask_profile(self, then: Callable[[str | None], Any]) -> None:
        from steersman.core.profile import list_profiles

        choices = [Choice(e.name, e.name, e.error or e.description) for e in list_profiles()]
        self.push_screen(ChooseScreen("Profile", choices, current=self.profile.name), then)

    def action_choose_profile(self) -> None:
        """Choose how to decode from the next answer on."""

        def chosen(name: str | None) -> None:
            if name is not None:
                self._set_profile(name)

        self._ask_profile(chosen)

    def _set_profile(self, name: str, then: Callable[[], Any] | None = None) -> None:
        """Decode with another profile from the next answer on, and do ``then``.

        Models that it needs and that are not open are opened first; until they are, and if they
        cannot be, the profile stays as it is.
        """
        from steersman.core.profile import load_profile

        self.stop_change()
        try:
            change = Change(profile=load_profile(name), then=then)
            ready = self.engine.ready(change.profile)
            if ready:
                self.engine.settle(change.profile)
        except SteersmanError as exc:
            self.notify(show_line(str(exc)), severity="error", markup=False)
            return
        if ready:
            self._take(change)
        elif self.busy:  # the engine can do one thing at a time
            self.notify("Esc stops the running answer first.", severity="warning")
        else:
            self._change = change
            self.status.state = "opening models"
            self._open(change)

    def _take(self, change: Change) -> None:
        self.profile = change.profile
        self.refresh_status()
        if change.then is not None:
            self.call_next(change.then)

    @work(thread=True, group="change", exit_on_error=False)
    def _open(self, change: Change) -> None:
        def opening(role: str, what: str) -> None:
            self.post_message(messages.ModelOpening(role, what))

        reason = None
        try:
            self.engine.prepare(change.profile, opening=opening, cancelled=change.cancel.is_set)
        except Exception as exc:  # an engine's own failure must not take the chat down
            reason = problem(exc).message
        self.post_message(messages.ProfileChanged(change, reason))

    @on(messages.ModelOpening)
    def _opening(self, event: messages.ModelOpening) -> None:
        if self.busy:
            whose = "" if event.role == "target" else f"{event.role}: "
            self.status.state = f"opening {whose}{event.what}"

    @on(messages.ProfileChanged)
    def _changed(self, event: messages.ProfileChanged) -> None:
        if self._change is None or event.change is not self._change:
            return  # it was stopped meanwhile
        change, self._change = self._change, None
        self.status.state = "ready"
        if event.reason is None:
            self._take(change)
        else:
            self.refresh_status()
            self.notify(show_line(event.reason), severity="error", markup=False)

    def stop_change(self) -> bool:
        """Keep the profile as it is if another one's models are being opened; say whether so.

        What is just being opened is freed once it is there.
        """
        if self._change is None:
            return False
        self._change.cancel.set()
        self._change = None
        self.status.state = "ready"
        return True

    def action_choose_model(self) -> None:
        """Choose a known, installed or cached model, or type a path or hub id."""
        from steersman.core.locate import list_models

        choices = [Choice(m.name, m.name, m.description) for m in list_models() if m.installed]
        current = str(self.engine.args.resolve(self.profile)["model"])
        screen = ChooseScreen("Model", choices, current=current, free=True)
        self.push_screen(screen, self._switcher("model"))

    def action_choose_backend(self) -> None:
        """Choose an engine."""
        from steersman.core.backend import BACKENDS, known_backends, missing_modules

        choices = [Choice("auto", "auto", "the first installed engine that suits the file")]
        for name in known_backends():
            missing = missing_modules(name)
            remark = f"not installed: {BACKENDS[name].install}" if missing else ""
            choices.append(Choice(name, name, remark))
        current = str(self.engine.args.resolve(self.profile).get("backend", "auto"))
        screen = ChooseScreen("Engine", choices, current=current)
        self.push_screen(screen, self._switcher("backend"))

    def _switcher(self, what: str) -> Callable[[str | None], None]:
        def chosen(name: str | None) -> None:
            if name is not None:
                self.engine.choose(**{what: name})
                self.refresh_status()

        return chosen

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Fill the command palette: every action, and every profile by name."""
        from steersman.core.profile import list_profiles

        for binding in self.BINDINGS:
            if isinstance(binding, Binding) and binding.tooltip and binding.key != "escape":
                yield SystemCommand(
                    binding.description, binding.tooltip, _runner(self, binding.action)
                )
        yield SystemCommand("Export", "Write this conversation to a file", self.action_export)
        yield SystemCommand(
            "Record trace", "Record how the next answers come about, or stop",
            self.action_record_trace,
        )  # fmt: skip
        yield SystemCommand(
            "Show trace", "Walk through the newest recorded answer", self.action_show_trace
        )
        yield SystemCommand("Delete", "Delete this conversation", _runner(self, "delete"))
        yield SystemCommand(
            "Truncate", "Cut conversations that do not fit, or refuse them",
            self.action_toggle_truncate,
        )  # fmt: skip
        for entry in list_profiles():
            if not entry.error:
                yield SystemCommand(
                    f"Profile: {show_line(entry.name)}",
                    show_line(entry.description),
                    lambda name=entry.name: self._set_profile(name),
                )
        yield from super().get_system_commands(screen)


def _runner(app: App[Any], action: str) -> Callable[[], Any]:
    async def run() -> None:
        await app.run_action(action)

    return run
