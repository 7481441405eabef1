"""The full-screen chat."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Markdown

from steersman.core.errors import SteersmanError

from . import common, messages
from .answering import Answer
from .conversation import Conversation, label
from .engine import ChatEngine, Opener
from .history import History, Message
from .recording import Recording
from .safe_text import show_line
from .screens.choose import Choice, ChooseScreen
from .screens.link import LinkScreen
from .switching import Switching
from .widgets.message import AnswerMessage, UserMessage
from .widgets.prompt import PromptArea
from .widgets.status import StatusLine

WELCOME = (
    "Write below; Enter sends. F2 switches the profile, F3 the model, F4 the engine: the next "
    "answer uses them. Ctrl+P lists everything."
)


class SteersmanApp(Recording, Switching):
    """Chat with a local model, and change how it decodes on the way.

    Parameters
    ----------
    args : ModelArgs
        Model and engine to begin with.
    profile : str, optional
        Name or path of the first profile.
    history : History, optional
        Where conversations are kept; the user's own file if None.
    opener : callable, optional
        Stand-in for ``steersman.core.load``.
    seed : int, optional
        Seed of every answer; a fresh one each time if None.
    """

    CSS_PATH = "app.tcss"
    TITLE = "steersman"
    # Priority: the text area has function keys of its own.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "f2",
            "choose_profile",
            "Profile",
            tooltip="Decode in another way from now on",
            priority=True,
        ),
        Binding("f3", "choose_model", "Model", tooltip="Let another model answer", priority=True),
        Binding(
            "f4",
            "choose_backend",
            "Engine",
            tooltip="Run the model on another engine",
            priority=True,
        ),
        Binding(
            "f5", "regenerate", "Again", tooltip="Answer the last message again", priority=True
        ),
        Binding(
            "f6",
            "regenerate_with",
            "Again with",
            tooltip="Again, with another profile",
            priority=True,
        ),
        Binding(
            "f7",
            "edit_last",
            "Edit",
            tooltip="Change the last message and resend it",
            priority=True,
        ),
        Binding(
            "f8",
            "conversations",
            "Chats",
            tooltip="Go on with an earlier conversation",
            priority=True,
        ),
        Binding("f9", "new", "New", tooltip="Begin a new conversation", priority=True),
        Binding("f10", "copy_answer", "Copy", tooltip="Copy the last answer", priority=True),
        Binding("alt+left", "sibling(-1)", "Previous version", show=False),
        Binding("alt+right", "sibling(1)", "Next version", show=False),
        Binding("escape", "cancel", "Stop", tooltip="Stop the answer", priority=True),
        Binding("ctrl+q", "quit", "Quit", show=False, priority=True),
    ]

    def __init__(
        self,
        args: common.ModelArgs | None = None,
        *,
        profile: str | None = None,
        history: History | None = None,
        opener: Opener | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        from steersman.core.profile import load_profile

        self._args = args or common.ModelArgs()
        self.engine = ChatEngine(self._args, opener=opener)
        self.profile = load_profile(profile or common.DEFAULT_PROFILE)
        self.history = history or History(_history_path())
        self.seed = seed
        self.truncate = False
        self.conversation: int | None = None
        self.thread: list[Message] = []
        self._answer: Answer | None = None
        self._view: AnswerMessage | None = None
        self._answers = 0

    # -- screen ----------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        yield VerticalScroll(id="transcript")
        yield PromptArea(id="prompt", soft_wrap=True)
        yield StatusLine(id="status")
        yield Footer()

    async def on_mount(self) -> None:
        """Show the first line of advice and what will answer."""
        self.transcript.anchor()
        self.refresh_status()
        await self._show_thread()
        self.prompt.focus()

    @property
    def transcript(self) -> VerticalScroll:
        """The messages."""
        return self.query_one("#transcript", VerticalScroll)

    @property
    def prompt(self) -> PromptArea:
        """Where one writes."""
        return self.query_one("#prompt", PromptArea)

    @property
    def status(self) -> StatusLine:
        """The bottom line."""
        return self.query_one("#status", StatusLine)

    def refresh_status(self) -> None:
        """Show what will answer, and how full the context is."""
        wanted = self.engine.args.resolve(self.profile)
        status = self.status
        status.model = str(wanted["model"]).rsplit("/", 1)[-1]
        status.backend = str(wanted.get("backend", "auto"))
        if self.engine.model is not None and status.backend == "auto":
            status.backend = self.engine.model.info.backend
        helpers = [role for role in self.profile.strategy.requires if role != "target"]
        status.model += "".join(f" + {role}" for role in helpers)
        status.profile = self.profile.name
        status.used, status.context = self.engine.context

    async def _show_thread(self) -> None:
        await self.transcript.remove_children()
        if not self.thread:
            await self.transcript.mount(AnswerMessage(WELCOME, "steersman", id="welcome"))
            return
        await self.transcript.mount_all([self._view_of(m) for m in self.thread])
        self.transcript.anchor()

    def _view_of(self, message: Message) -> UserMessage | AnswerMessage:
        if message.role == "user":
            return UserMessage(message.content)
        versions = self.history.siblings(message.id)
        note = _ended(str(message.facts.get("finish_reason", "")))
        if len(versions) > 1:
            place = f"version {versions.index(message.id) + 1} of {len(versions)} (Alt+←/→)"
            note = f"{note}; {place}" if note else place
        return AnswerMessage(message.content, label(message.facts), note)

    # -- answering -------------------------------------------------------------------------

    @on(PromptArea.Sent)
    async def send(self, event: PromptArea.Sent) -> None:
        """Answer what was written."""
        if not self._idle():
            return
        self.prompt.load_text("")
        if self.conversation is None:
            self.conversation = self.history.create()
        parent = self.thread[-1].id if self.thread else None
        message = self.history.add(self.conversation, "user", event.text, parent=parent)
        if not self.thread:
            await self.transcript.remove_children()
        self.thread.append(message)
        await self.transcript.mount(UserMessage(message.content))
        await self._begin_answer()

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way, or models are being opened for a profile."""
        return self._answer is not None or self.changing

    async def _begin_answer(self) -> None:
        self._answers += 1
        self._answer = Answer(
            id=self._answers,
            thread=[{"role": m.role, "content": m.content} for m in self.thread],
            profile=self.profile,
            seed=self.seed,
            truncate=self.truncate,
            recorder=self.recorder,
        )
        self._view = AnswerMessage("", f"… · {self.profile.name}")
        await self.transcript.mount(self._view)
        self.transcript.anchor()
        self.status.state, self.status.speed = "opening the model", 0.0
        self._run(self._answer)

    @work(thread=True, group="answer", exit_on_error=False)
    def _run(self, answer: Answer) -> None:
        answer.run(self.engine, self.post_message)

    def _current(self, answer: int) -> AnswerMessage | None:
        return self._view if self._answer is not None and self._answer.id == answer else None

    @on(messages.AnswerStarted)
    def _started(self, event: messages.AnswerStarted) -> None:
        if (view := self._current(event.answer)) is not None:
            view.set_label(event.label)
            self.refresh_status()
            self.status.state = "reading"

    @on(messages.AnswerProgress)
    def _progress(self, event: messages.AnswerProgress) -> None:
        if self._current(event.answer) is not None:
            self.status.state = f"reading {event.done}/{event.total}"

    @on(messages.AnswerText)
    async def _text(self, event: messages.AnswerText) -> None:
        view = self._current(event.answer)
        if view is None:
            return
        await view.write(event.withdrawn, event.text)
        if event.taken:
            view.took_back(event.taken, event.rewinds)
        self.status.state = "answering"
        if event.seconds > 0 and event.tokens > 1:
            self.status.speed = (event.tokens - 1) / event.seconds
        self.status.used, self.status.context = self.engine.context

    @on(messages.AnswerDone)
    async def _done(self, event: messages.AnswerDone) -> None:
        view = self._current(event.answer)
        if view is None or self.conversation is None:
            return
        message = self.history.add(
            self.conversation, "assistant", event.text, parent=self.thread[-1].id,
            facts=event.facts,
        )  # fmt: skip
        self.thread.append(message)
        note = _ended(event.facts["finish_reason"])
        if event.truncated:
            note += f" the first {event.truncated} tokens of the conversation were cut"
        versions = self.history.siblings(message.id)
        if len(versions) > 1:
            note += f" version {len(versions)} of {len(versions)} (Alt+←/→)"
        view.set_label(label(event.facts))
        await view.finish(event.text, note.strip())
        speed = event.facts["timings"].get("tokens_per_second", 0.0)
        self._end_answer(speed=speed, state=note.strip())

    @on(messages.AnswerFailed)
    async def _failed(self, event: messages.AnswerFailed) -> None:
        if (view := self._current(event.answer)) is not None:
            await view.stop()
            view.set_note(event.reason, error=True)
            self._end_answer()

    def _end_answer(self, speed: float = 0.0, state: str = "") -> None:
        self._answer = self._view = None
        self.refresh_status()
        self.status.state, self.status.speed = state or "ready", speed

    def action_cancel(self) -> None:
        """Stop the answer; what was written stays. In a dialog: close it.

        While models are opened for another profile: keep the old one.
        """
        if isinstance(self.screen, ModalScreen):
            self.screen.dismiss(None)
        elif self.stop_change():
            self.refresh_status()
        elif self._answer is not None:
            self._answer.cancel.set()
            self.status.state = "stopping"

    # -- going back ------------------------------------------------------------------------

    async def _rewind(self, to: int | None) -> None:
        """Show the thread that ends at message ``to``."""
        if self.conversation is not None:
            self.history.set_head(self.conversation, to)
            self.thread = self.history.thread(self.conversation) if to is not None else []
            await self._show_thread()

    def _idle(self) -> bool:
        if self.busy:
            what = "the opening of models" if self.changing else "the running answer"
            self.notify(f"Esc stops {what} first.", severity="warning")
        return not self.busy

    async def action_regenerate(self) -> None:
        """Answer the last message again; the old answer stays as another version."""
        asked = next((m for m in reversed(self.thread) if m.role == "user"), None)
        if asked is None or not self._idle():
            return
        await self._rewind(asked.id)
        await self._begin_answer()

    async def action_edit_last(self) -> None:
        """Take the last message back into the input; sending it makes another version."""
        asked = next((m for m in reversed(self.thread) if m.role == "user"), None)
        if asked is None or not self._idle():
            return
        await self._rewind(asked.parent)
        self.prompt.load_text(asked.content)
        self.prompt.move_cursor(self.prompt.document.end)
        self.prompt.focus()

    async def action_sibling(self, step: int) -> None:
        """Show the previous or next version of the last message that has several."""
        if not self._idle():
            return
        for message in reversed(self.thread):
            versions = self.history.siblings(message.id)
            if len(versions) > 1:
                place = versions.index(message.id) + step
                if 0 <= place < len(versions):
                    await self._rewind(self.history.newest_leaf(versions[place]))
                return

    # -- conversations -----------------------------------------------------------------------

    def action_conversations(self) -> None:
        """Choose a conversation to go on with."""
        if not self._idle():
            return
        choices = [
            Choice(str(c.id), c.title, f"{c.messages} messages, {c.updated[:16]}")
            for c in self.history.conversations()
        ]

        async def chosen(value: str | None) -> None:
            if value is not None:
                self.conversation = int(value)
                self.thread = self.history.thread(self.conversation)
                await self._show_thread()

        current = str(self.conversation or "")
        self.push_screen(ChooseScreen("Conversations", choices, current=current), chosen)

    async def action_new(self) -> None:
        """Begin a new conversation."""
        if self._idle():
            self.conversation, self.thread = None, []
            await self._show_thread()
            self.prompt.focus()

    async def action_delete(self) -> None:
        """Delete the open conversation."""
        if self.conversation is not None and self._idle():
            self.history.delete(self.conversation)
            await self.action_new()

    def action_toggle_truncate(self) -> None:
        """Cut conversations that do not fit from the front, or refuse them (the default)."""
        self.truncate = not self.truncate
        self.notify(f"Long conversations are {'cut' if self.truncate else 'refused'} from now on.")

    def action_copy_answer(self) -> None:
        """Copy the last answer to the clipboard."""
        answer = next((m for m in reversed(self.thread) if m.role == "assistant"), None)
        if answer is not None:
            self.copy_to_clipboard(answer.content)
            self.notify("Copied the last answer.")

    def action_export(self) -> None:
        """Write the conversation to a Markdown file in the current folder."""
        path = Path(f"conversation-{self.conversation or 0}.md")
        kept = [{"role": m.role, "content": m.content, **m.facts} for m in self.thread]
        try:
            Conversation(messages=kept).save(path)
        except SteersmanError as exc:
            self.notify(show_line(str(exc)), severity="error", markup=False)
        else:
            self.notify(f"Saved as {path}.", markup=False)

    @on(Markdown.LinkClicked)
    def _link(self, event: Markdown.LinkClicked) -> None:
        event.stop()

        def answered(opens: bool | None) -> None:
            if opens:
                self.open_url(event.href)

        self.push_screen(LinkScreen(event.href), answered)

    async def on_unmount(self) -> None:
        """Stop the answer and free the model."""
        if self._change is not None:
            self._change.cancel.set()
        if self._answer is not None:
            self._answer.cancel.set()
        self.close_trace()
        self.history.close()


def _ended(reason: str) -> str:
    """Return a remark on why an answer ended; nothing for the usual end."""
    return {"length": "cut at the token limit", "cancelled": "stopped"}.get(reason, "")


def _history_path() -> Path:
    from steersman.core.paths import data_dir

    return data_dir() / "conversations.sqlite"


def run_app(args: common.ModelArgs, *, profile: str | None = None) -> None:
    """Open the chat and stay until it is closed."""
    app = SteersmanApp(args, profile=profile)
    app.run()
    app.engine.close()
