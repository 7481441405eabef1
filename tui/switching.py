"""What a person can switch in mid-conversation, and the palette that lists it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.screen import Screen

from steersman.core.errors import SteersmanError

from .safe_text import show_line
from .screens.choose import Choice, ChooseScreen

if TYPE_CHECKING:
    from steersman.core.profile import Profile

    from .engine import ChatEngine


class Switching(App[None]):
    """The part of the chat that chooses what answers next; the app is built on it."""

    engine: ChatEngine
    profile: Profile

    if TYPE_CHECKING:  # what the app itself adds

        def refresh_status(self) -> None: ...
        async def action_regenerate(self) -> None: ...
        def action_export(self) -> None: ...
        def action_record_trace(self) -> None: ...
        def action_show_trace(self) -> None: ...
        def action_toggle_truncate(self) -> None: ...

    def action_regenerate_with(self) -> None:
        """Choose a profile, then answer again."""

        async def chosen(name: str | None) -> None:
            if name is not None and self._set_profile(name):
                await self.action_regenerate()

        self._ask_profile(chosen)

    def _ask_profile(self, then: Callable[[str | None], Any]) -> None:
        from steersman.core.profile import list_profiles

        choices = [Choice(e.name, e.name, e.error or e.description) for e in list_profiles()]
        self.push_screen(ChooseScreen("Profile", choices, current=self.profile.name), then)

    def action_choose_profile(self) -> None:
        """Choose how to decode from the next answer on."""
        self._ask_profile(lambda name: name and self._set_profile(name))

    def _set_profile(self, name: str) -> bool:
        from steersman.core.profile import load_profile

        try:
            self.profile = load_profile(name)
        except SteersmanError as exc:
            self.notify(show_line(str(exc)), severity="error", markup=False)
            return False
        self.refresh_status()
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
