"""The trace screen, driven by key presses, in its own app and in the chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_app import SIZE, build, say, until
from test_cli_trace import evil_lines
from textual.widgets import Static
from trace_files import STARTED, eventful, token, write_trace

from steersman.core.trace import Replay
from steersman.tui.safe_text import is_safe
from steersman.tui.screens.trace import TraceScreen
from steersman.tui.trace_app import TraceApp

WIDE = (110, 32)


def opened(tmp_path: Path, lines: Any = None) -> TraceApp:
    return TraceApp(Replay(write_trace(tmp_path / "t.jsonl", lines or eventful())))


def shown(app: Any, name: str) -> str:
    """Return the plain text of one part of the screen."""
    content = app.screen.query_one(f"#trace-{name}", Static).render()
    return str(getattr(content, "plain", content))


def on_screen(app: Any) -> str:
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


async def ready(app: Any, pilot: Any) -> None:
    await until(pilot, lambda: isinstance(app.screen, TraceScreen) and app.screen.is_mounted)


async def test_stepping_forwards_and_backwards(tmp_path: Path) -> None:
    app = opened(tmp_path)
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        assert shown(app, "shown") == "Once upon"
        assert "toy on none, small tiny · antislop · seed 7" in shown(app, "title")
        assert "p 0.750 → 0.875 · rank 1" in shown(app, "step")
        await pilot.press("right", "right")
        assert shown(app, "shown") == "Once upon a tapestry"
        # What was taken back is still there at this step, and gone at the next.
        await pilot.press("right")
        assert shown(app, "shown") == "Once upon a tapestry"
        assert "took back 1 token, 2 left" in shown(app, "step")
        assert "rule phrase 'a tapestry'" in shown(app, "notes")
        await pilot.press("right")
        assert shown(app, "shown") == "Once upon a time"
        await pilot.press("left", "left")
        assert shown(app, "shown") == "Once upon a tapestry"
        await pilot.press("end")
        assert shown(app, "shown").endswith("was one.\n[finished: eos]")
        await pilot.press("home", "left")
        assert app.screen.at == 0
        await pilot.press("pagedown")
        assert app.screen.at == 10
        await pilot.press("pageup")
        assert app.screen.at == 0


async def test_the_tables_of_a_token(tmp_path: Path) -> None:
    app = opened(tmp_path)
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        await pilot.press("right", "right")
        text = on_screen(app)
        row = next(line for line in text.splitlines() if "temperature " in line)
        assert row.split()[:8] == [
            "temperature", "3", "0.000", "0.700", "0.012", "0.050", "0.062", "!",
        ]  # fmt: skip
        assert "▶ ' tapestry'" in text and "' other'" in text and "model" in text


async def test_refused_drafts_routing_and_marks(tmp_path: Path) -> None:
    app = opened(tmp_path)
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        places = []
        for _ in range(9):
            await pilot.press("m")
            places.append(app.screen.at)
        assert places == [3, 5, 6, 7, 8, 9, 10, 10, 10]
        await pilot.press("b")
        assert app.screen.at == 9
        app.screen.at = 6
        await pilot.pause()
        assert "time,⟨ long ago⟩ there" in shown(app, "shown")
        assert "refused here: ' long' ' ago'" in shown(app, "notes")
        await pilot.press("right")
        assert "⟨" not in shown(app, "shown")
        assert shown(app, "notes") == "routed to target (score 0.25)"
        assert "not small" in shown(app, "legend")


async def test_playing_colouring_and_other_texts(tmp_path: Path) -> None:
    app = opened(tmp_path)
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        screen = app.screen
        await pilot.press(*["minus"] * 9, "space")
        assert screen.playing
        await pilot.press(*["plus"] * 9)  # also while it plays
        await until(pilot, lambda: screen.at == 10 and not screen.playing)
        await pilot.press(*["minus"] * 9, "space")  # from the end it begins again
        assert screen.playing and screen.at < 10
        await pilot.press("left")
        assert not screen.playing
        modes = []
        for _ in range(3):
            modes.append(screen.mode)
            assert shown(app, "legend").startswith(screen.mode)
            await pilot.press("c")
        assert modes == ["probability", "rank", "change"] and screen.mode == "probability"
        await pilot.press("n", "n")
        assert "text 2 of 2" in shown(app, "title") and shown(app, "shown") == "Once more"
        await pilot.press("p")
        assert "text 1 of 2" in shown(app, "title")


@pytest.mark.parametrize("key", ["q", "escape"])
async def test_leaving_ends_the_app(tmp_path: Path, key: str) -> None:
    app = opened(tmp_path)
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        await pilot.press(key)
        await until(pilot, lambda: not app.is_running or app._exit)


def test_what_was_taken_back_is_struck_through_and_routing_is_underlined(tmp_path: Path) -> None:
    from steersman.tui import trace_text

    (one, _) = Replay(write_trace(tmp_path / "t.jsonl", eventful())).recordings
    usual = trace_text.usual_role(one)
    assert usual == "small"

    def styles(at: int) -> dict[str, Any]:
        text = trace_text.text_at(one, at, "probability", usual)
        return {text.plain[s.start : s.end]: s.style for s in text.spans}

    assert "strike" in str(styles(3)[" tapestry"])
    assert styles(9)["\nwas"].underline and not styles(9)[" a"].underline
    assert styles(1)[" a"].reverse and not styles(2)[" a"].reverse
    assert styles(9)[" upon"].color.name != styles(9)[" there"].color.name


@pytest.mark.parametrize("size", [(60, 20), (110, 40), (20, 8)])
async def test_no_control_character_reaches_the_terminal(tmp_path: Path, size: Any) -> None:
    app = opened(tmp_path, evil_lines())
    async with app.run_test(size=size) as pilot:
        await ready(app, pilot)
        for key in ("right", "right", "right", "c", "c", "n", "end"):
            assert is_safe(on_screen(app)), key
            await pilot.press(key)
        assert is_safe(on_screen(app))


async def test_a_long_text_is_drawn_from_where_it_matters(tmp_path: Path) -> None:
    lines = [STARTED, *(token(i, f" w{i}", 11, 0.5, 0.5) for i in range(4000))]
    app = opened(tmp_path, lines)
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        await pilot.press("end")
        assert shown(app, "shown").startswith("… 2500 tokens before")
        assert "w3999" in on_screen(app)


async def test_a_file_that_changed_meanwhile_is_told(tmp_path: Path) -> None:
    app = opened(tmp_path)
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        (tmp_path / "t.jsonl").write_text("x\n")
        await pilot.press("right")
        assert "not JSON" in shown(app, "notes")


async def test_a_text_without_steps(tmp_path: Path) -> None:
    app = opened(tmp_path, [STARTED])
    async with app.run_test(size=WIDE) as pilot:
        await ready(app, pilot)
        for key in ("right", "end", "m", "space", "c"):
            await pilot.press(key)
        assert "no step" in shown(app, "step") and shown(app, "shown") == "Once"


async def test_the_chat_records_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = build()
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "unheard")
        app.action_show_trace()
        await pilot.pause()
        assert not isinstance(app.screen, TraceScreen)
        app.action_record_trace()
        await say(app, pilot, "one")
        await say(app, pilot, "two")
        await pilot.press("ctrl+p")
        await pilot.pause()
        await pilot.press(*"Show trace")
        await until(pilot, lambda: "newest recorded" in on_screen(app))
        await pilot.press("enter")
        await ready(app, pilot)
        assert "text 2 of 2" in shown(app, "title")
        await pilot.press("end")
        assert shown(app, "shown").endswith("Yes, gladly.\n[finished: eos]")
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, TraceScreen))
        app.action_record_trace()
        assert app.recorder is None
        await say(app, pilot, "three")
    (path,) = tmp_path.glob("trace-*.jsonl")
    texts = [r.started["prompt"] for r in Replay(path).recordings]
    assert (
        len(texts) == 2 and "two" in texts[1] and all(r.finished for r in Replay(path).recordings)
    )
