"""The full-screen chat, driven by key presses on a toy model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input, OptionList
from toys import TableModel, byte_tokenizer

from steersman.core.errors import MissingFile
from steersman.tui import common
from steersman.tui.app import SteersmanApp
from steersman.tui.history import History
from steersman.tui.safe_text import is_safe
from steersman.tui.screens.choose import ChooseScreen
from steersman.tui.widgets.message import AnswerMessage, UserMessage, parts

SIZE = (100, 30)


class Scripted(TableModel):
    """Says ``reply`` and ends; ``gate`` holds every token back until it is set."""

    def __init__(self, reply: str | bytes = "Yes, gladly.", *, name: str = "toy") -> None:
        tokenizer = byte_tokenizer()
        vocab = tokenizer.vocab_size
        import numpy as np

        super().__init__(
            tokenizer=tokenizer,
            table=np.full((vocab + 1, vocab), 1 / vocab),
            context=20000,
        )
        data = reply if isinstance(reply, bytes) else reply.encode()
        (end,) = {268 - 3} & tokenizer.eos_ids
        self.reply = [*data, end]
        self.gate: threading.Event | None = None
        self.at: int | None = None
        from dataclasses import replace

        self.info = replace(self.info, name=name)

    def probs(self, history: Any) -> Any:
        import numpy as np

        if self.gate is not None:
            self.gate.wait(5)
        # The answer begins after the last "assistant\n" of the template.
        tail = bytes(self.tokenizer.pieces[t][0] for t in history if t < 256)
        done = len(tail.rpartition(b"assistant\n")[2])
        out = np.full(self.tokenizer.vocab_size, 1e-30)
        out[self.reply[min(done, len(self.reply) - 1)]] = 1.0
        return out


def build(
    model: Any = None, *, history: History | None = None, opener: Callable[..., Any] | None = None
) -> SteersmanApp:
    model = model or Scripted()
    return SteersmanApp(
        common.ModelArgs(model="toy"),
        profile="greedy",
        history=history or History(":memory:"),
        opener=opener or (lambda **_: model),
        seed=0,
    )


async def until(pilot: Any, condition: Callable[[], bool]) -> None:
    """Wait for ``condition``, however busy the machine is; the suite's time-out bounds it."""
    while not condition():
        await pilot.pause(0.01)
    await pilot.pause()


async def settle(app: SteersmanApp, pilot: Any) -> None:
    await until(pilot, lambda: not app.busy)


async def choose(app: SteersmanApp, pilot: Any, key: str, value: str) -> None:
    """Open a list with ``key``, filter it by ``value``, and take what is highlighted."""
    await pilot.press(key)
    await until(pilot, lambda: isinstance(app.screen, ChooseScreen))
    app.screen.query_one(Input).value = value
    await pilot.pause()
    await pilot.press("enter")
    await until(pilot, lambda: not isinstance(app.screen, ChooseScreen))


async def say(app: SteersmanApp, pilot: Any, text: str, *, idle: bool = True) -> None:
    asked = len(transcript(app)) + 1
    app.prompt.load_text(text)
    await pilot.press("enter")
    await until(pilot, lambda: len(transcript(app)) > asked)
    if idle:
        await settle(app, pilot)


def transcript(app: SteersmanApp) -> list[tuple[str, str]]:
    found = []
    for view in app.transcript.children:
        if isinstance(view, UserMessage):
            found.append(("user", view.content))
        elif isinstance(view, AnswerMessage) and view.id != "welcome":
            found.append(("assistant", view.content))
    return found


async def test_a_message_is_answered_labelled_and_kept() -> None:
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press(*"Hello", "enter")
        await until(pilot, lambda: len(app.thread) == 2)
        assert transcript(app) == [("user", "Hello"), ("assistant", "Yes, gladly.")]
        assert app.thread[-1].facts["profile"] == "greedy"
        assert app.thread[-1].facts["model"] == "toy"
        label = app.query(AnswerMessage).last().query_one(".label").render().plain
        assert "toy" in label and "greedy" in label
        assert app.status.context == 20000
        assert app.status.used > 0


async def test_enter_sends_and_shift_enter_breaks_the_line() -> None:
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("a", "ctrl+j", "b", "enter")
        await until(pilot, lambda: len(app.thread) == 2)
        assert transcript(app)[0] == ("user", "a\nb")


async def test_a_blank_message_is_not_sent() -> None:
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("space", "enter")
        await settle(app, pilot)
        assert transcript(app) == []


async def test_switching_the_profile_takes_effect_with_the_next_answer() -> None:
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        await choose(app, pilot, "f2", "precise")
        assert app.profile.name == "precise"
        await say(app, pilot, "two")
        assert [m.facts.get("profile") for m in app.thread] == [None, "greedy", None, "precise"]


async def test_switching_model_and_engine_reopens_with_the_next_answer() -> None:
    opened: list[dict[str, Any]] = []

    def opener(**options: Any) -> Scripted:
        opened.append(options)
        return Scripted(name=options["model"])

    app = build(opener=opener)
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        await choose(app, pilot, "f4", "torch")
        await choose(app, pilot, "f3", "some/path.gguf")
        assert len(opened) == 1  # nothing is opened before it is needed
        await say(app, pilot, "two")
        assert [(o["model"], o.get("backend")) for o in opened] == [
            ("toy", None),
            ("some/path.gguf", "torch"),
        ]
        assert app.thread[-1].facts["model"] == "some/path.gguf"


async def test_a_model_that_cannot_be_opened_is_reported_and_the_chat_goes_on() -> None:
    good = Scripted()

    def opener(**options: Any) -> Scripted:
        if options["model"] != "toy":
            raise MissingFile("--model 'nowhere': no such model")
        return good

    app = build(opener=opener)
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        app.engine.choose(model="nowhere")
        await say(app, pilot, "two")
        note = app.query(AnswerMessage).last().query_one(".note")
        assert "no such model" in note.render().plain
        assert note.has_class("error")
        app.engine.choose(model="toy")
        await pilot.press("f5")
        await until(pilot, lambda: len(app.thread) == 4)
        assert transcript(app)[-2:] == [("user", "two"), ("assistant", "Yes, gladly.")]


async def test_escape_stops_at_once_and_keeps_what_was_written() -> None:
    model = Scripted("word " * 3000)
    app = build(model)
    app.profile = app.profile.override({"generation.max_tokens": 15000})
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "go on", idle=False)
        await until(pilot, lambda: len(transcript(app)[-1][1]) > 20)
        await pilot.press("escape")
        await settle(app, pilot)
        assert app.thread[-1].facts["finish_reason"] == "cancelled"
        assert 0 < len(app.thread[-1].content) < 15000
        assert app.thread[-1].content.startswith("word word")
        await say(app, pilot, "again", idle=False)
        await pilot.press("escape")
        await settle(app, pilot)


async def test_regenerate_keeps_the_old_version() -> None:
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        first = app.thread[-1].id
        await pilot.press("f5")
        await until(pilot, lambda: len(app.thread) == 2 and app.thread[-1].id != first)
        assert app.history.siblings(first) == [first, app.thread[-1].id]
        await pilot.press("alt+left")
        await until(pilot, lambda: app.thread[-1].id == first)


async def test_edit_and_resend_makes_another_branch() -> None:
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        await say(app, pilot, "two")
        await pilot.press("f7")
        await until(pilot, lambda: app.prompt.text == "two")
        assert len(transcript(app)) == 2
        await pilot.press("!", "enter")
        await until(pilot, lambda: len(app.thread) == 4)
        assert [m.content for m in app.thread if m.role == "user"] == ["one", "two!"]


async def test_conversations_are_resumed(tmp_path: Any) -> None:
    path = tmp_path / "history.sqlite"
    app = build(history=History(path))
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "remember me")
    app = build(history=History(path))
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("f8")
        await until(pilot, lambda: isinstance(app.screen, ChooseScreen))
        assert app.screen.query_one(OptionList).option_count == 1
        await pilot.press("enter")
        await until(pilot, lambda: len(transcript(app)) == 2)
        assert transcript(app) == [("user", "remember me"), ("assistant", "Yes, gladly.")]
        await say(app, pilot, "more")
        assert len(app.thread) == 4


async def test_command_palette_switches_profiles() -> None:
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("ctrl+p")
        await pilot.pause()
        await pilot.press(*"Profile: creative")
        await until(pilot, lambda: "Stories" in screen_text(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.profile.name == "creative")


CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x200B]))


def screen_text(app: SteersmanApp) -> str:
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


async def test_no_control_character_reaches_the_terminal() -> None:
    evil = f"x{CONTROLS}y \x1b]52;c;aGk=\x07 \x1b[2J [red]m[/red]"
    app = build(Scripted(evil.encode(), name=evil))
    async with app.run_test(size=(120, 60)) as pilot:
        app.prompt.load_text(evil)
        await pilot.pause()
        assert is_safe(screen_text(app))
        await pilot.press("enter")
        await until(pilot, lambda: len(app.thread) == 2)
        assert app.thread[-1].content == evil  # kept as it was; only what is shown is filtered
        shown = screen_text(app)
        assert is_safe(shown)
        assert "␛" in shown and "[red]m[/red]" in shown
        for key in ("f8", "f2", "f3", "f4"):
            await pilot.press(key)
            await pilot.pause()
            assert is_safe(screen_text(app)), key
            await pilot.press("escape")
            await pilot.pause()
        app.engine.choose(model=evil)
        app.refresh_status()
        await pilot.pause()
        assert is_safe(screen_text(app))


async def test_a_link_is_shown_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    app = build(Scripted("[harmless](http://example.org/where?it=goes)"))
    opened: list[str] = []
    monkeypatch.setattr(app, "open_url", lambda url, **_: opened.append(url))
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "link please")
        answer = app.query(AnswerMessage).last().markdown
        answer.post_message(answer.LinkClicked(answer, "http://example.org/where?it=goes"))
        await pilot.pause()
        assert "http://example.org/where?it=goes" in screen_text(app)
        await pilot.press("n")
        await pilot.pause()
        assert opened == []


def test_cutting_changes_no_text_and_stays_out_of_blocks() -> None:
    text = "".join(
        f"Paragraph {i}.\n\n- item\n\n  more of the item\n\n```python\nx = {i}\n\n\ny = x\n```\n\n"
        f"| a | b |\n|---|---|\n| {i} | 2 |\n\n"
        for i in range(60)
    )
    cut = parts(text)
    assert "".join(cut) == text
    assert len(cut) > 3
    for part in cut:
        assert part.count("```") % 2 == 0
        assert not part.startswith((" ", "-", "|", "\n"))


async def test_a_long_answer_is_all_there() -> None:
    text = "".join(f"Paragraph {i} with *some* words.\n\n" for i in range(120))
    app = build(Scripted(text))
    app.profile = app.profile.override({"generation.max_tokens": 15000})
    async with app.run_test(size=SIZE) as pilot:
        app.prompt.load_text("long")
        await pilot.press("enter")
        await until(pilot, lambda: len(app.thread) == 2)
        assert app.thread[-1].content == text
        shown = app.query(AnswerMessage).last().parts
        assert len(shown) > 1
        assert all(part.display for part in shown)
        assert not app.query(".stand-in")
        assert sum(len(part.children) for part in shown) == 120


async def test_what_is_taken_back_is_shown_struck_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wavering(Scripted):
        def probs(self, history: Any) -> Any:
            out = 0.9 * super().probs(history)
            out[ord("x")] += 0.1
            return out

    path = tmp_path / "ban.yaml"
    path.write_text("logits: [{temperature: {t: 0}}]\nstrategy: {antislop: {phrases: [gladly]}}\n")
    notes: list[Any] = []
    plain = AnswerMessage.took_back

    def recorded(view: AnswerMessage, text: str, times: int) -> None:
        plain(view, text, times)
        notes.append(view.query_one(".note").render())

    monkeypatch.setattr(AnswerMessage, "took_back", recorded)
    app = SteersmanApp(
        common.ModelArgs(model="toy"),
        profile=str(path),
        history=History(":memory:"),
        opener=lambda **_: Wavering("Yes, gladly."),
        seed=0,
    )
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "Do you?")
        assert app.thread[-1].content == "Yes, xladly."
        assert app.thread[-1].facts["rewinds"] == 1
        label = app.query(AnswerMessage).last().query_one(".label").render().plain
        assert "took back 1 passage" in label
    (note,) = notes
    assert note.plain == "took back gladly"
    assert "strike" in str(note.spans) or "strike" in str(note.markup)
