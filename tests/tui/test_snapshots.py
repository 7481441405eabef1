"""How the chat looks: SVG snapshots, taken after key presses.

Update them with ``scripts/test tests/tui/test_snapshots.py --snapshot-update`` and look at the
result before committing it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from test_app import Scripted, build, say, until
from trace_files import eventful, write_trace

from steersman.core.trace import Replay
from steersman.tui.screens.choose import ChooseScreen
from steersman.tui.screens.trace import TraceScreen
from steersman.tui.trace_app import TraceApp
from steersman.tui.widgets.prompt import PromptArea
from steersman.tui.widgets.status import StatusLine

REPLY = """\
Three rivers, with their **lengths**:

| river | km |
|-------|----|
| Nile  | 6650 |
| Rhine | 1233 |

1. They all reach the sea.
2. `None` of them flows uphill.

```python
print("delta")
```
"""
SIZE = (96, 34)


async def stand_still(pilot: Any) -> None:
    """Set what a clock decides: the cursor blinks where the focus is, and there is a speed."""
    pilot.app.screen_stack[0].query_one(PromptArea).cursor_blink = False
    pilot.app.screen.set_focus(None)
    pilot.app.screen_stack[0].query_one(StatusLine).speed = 0.0
    await pilot.pause()


async def converse(pilot: Any) -> None:
    await say(pilot.app, pilot, "Name rivers.\nUse a table.")
    await stand_still(pilot)


def test_first_screen(snap_compare: Any) -> None:
    assert snap_compare(build(), terminal_size=SIZE, run_before=stand_still)


def test_an_answer(snap_compare: Any) -> None:
    assert snap_compare(build(Scripted(REPLY)), terminal_size=SIZE, run_before=converse)


def test_choosing_a_profile(snap_compare: Any) -> None:
    async def ask(pilot: Any) -> None:
        await converse(pilot)
        await pilot.press("f2")
        await until(pilot, lambda: isinstance(pilot.app.screen, ChooseScreen))
        await pilot.press("d", "o", "l")
        await stand_still(pilot)

    assert snap_compare(build(Scripted(REPLY)), terminal_size=SIZE, run_before=ask)


def test_controls_are_shown(snap_compare: Any) -> None:
    model = Scripted("a\x1b[2Jb\x07c\u202ed")

    async def ask(pilot: Any) -> None:
        await say(pilot.app, pilot, "evil\x1b]52;c;eA==\x07")
        await stand_still(pilot)

    assert snap_compare(build(model), terminal_size=SIZE, run_before=ask)


def test_a_trace_where_drafts_were_refused(snap_compare: Any, tmp_path: Path) -> None:
    async def step(pilot: Any) -> None:
        await until(pilot, lambda: isinstance(pilot.app.screen, TraceScreen))
        await pilot.press(*["right"] * 6)
        await pilot.pause()

    app = TraceApp(Replay(write_trace(tmp_path / "story.jsonl", eventful())))
    assert snap_compare(app, terminal_size=(104, 24), run_before=step)
