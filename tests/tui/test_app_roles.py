"""Changing to a profile with a second role in mid-conversation, by key presses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from role_toys import PROFILE, Openings, registered
from test_app import SIZE, Scripted, choose, say, settle, until

from steersman.core.paths import config_dir
from steersman.tui import common
from steersman.tui.app import SteersmanApp
from steersman.tui.history import History


class Gated(Openings):
    """Holds the opening of ``small`` back until ``gate`` is set."""

    def __init__(self) -> None:
        super().__init__(lambda **o: Scripted(f"From {o['model']}."))
        self.gate = threading.Event()
        self.waiting = threading.Event()

    def __call__(self, **options: Any) -> Any:
        if options["model"] == "small":
            self.waiting.set()
            assert self.gate.wait(60)
        return super().__call__(**options)


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gated]:
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path))
    monkeypatch.delenv("STEERSMAN_THREADS", raising=False)
    folder = config_dir() / "profiles"
    folder.mkdir(parents=True)
    for name, model in (("mine", "small"), ("gone", "absent"), ("same", "toy")):
        (folder / f"{name}.yaml").write_text(
            f"{PROFILE}models: {{draft: {{model: {model}}}}}\n", encoding="utf-8"
        )
    (folder / "bare.yaml").write_text(PROFILE, encoding="utf-8")
    with registered(monkeypatch):
        made = Gated()
        made.fail = "absent"
        yield made
        made.gate.set()


def build(openings: Gated) -> SteersmanApp:
    return SteersmanApp(
        common.ModelArgs(model="toy"), profile="greedy", history=History(":memory:"),
        opener=openings, seed=0,
    )  # fmt: skip


async def test_the_second_model_is_opened_shown_used_and_freed(openings: Gated) -> None:
    app = build(openings)
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        await choose(app, pilot, "f2", "mine")
        await until(pilot, lambda: openings.waiting.is_set() and "draft" in app.status.state)
        assert app.status.state == "opening draft: small"
        assert app.profile.name == "greedy"  # until it is there
        app.prompt.load_text("too early")
        await pilot.press("enter")
        await pilot.pause()
        assert len(app.thread) == 2 and app.prompt.text == "too early"
        openings.gate.set()
        await until(pilot, lambda: app.profile.name == "mine")
        assert app.status.model == "toy + draft" and app.status.state == "ready"
        assert openings.names == ["toy", "small"]  # toy was reused
        app.prompt.load_text("")
        await say(app, pilot, "two")
        facts = app.thread[-1].facts
        assert facts["roles"] == {"draft": "small on toy"} and facts["profile"] == "mine"
        assert facts["timings"]["calls"]["draft"] > 0
        assert facts["timings"]["cached_tokens"] > 0  # the target's cache went along
        await choose(app, pilot, "f2", "greedy")
        await until(pilot, lambda: app.profile.name == "greedy" and not app.busy)
        assert openings.names == ["toy"]  # the draft's memory is free at once
        await say(app, pilot, "three")
        assert app.status.model == "toy"
        assert "roles" not in app.thread[-1].facts


async def test_escape_keeps_the_old_profile_and_frees_what_came_too_late(openings: Gated) -> None:
    app = build(openings)
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        await choose(app, pilot, "f2", "mine")
        await until(pilot, openings.waiting.is_set)
        await pilot.press("escape")
        await pilot.pause()
        assert not app.busy and app.status.state == "ready" and app.profile.name == "greedy"
        openings.gate.set()
        await say(app, pilot, "two")
        await until(pilot, lambda: openings.names == ["toy"])
        assert app.thread[-1].facts["profile"] == "greedy"


@pytest.mark.parametrize(
    ("name", "told"), [("gone", "absent"), ("bare", "models.draft of the profile")]
)
async def test_an_error_keeps_the_old_profile(name: str, told: str, openings: Gated) -> None:
    app = build(openings)
    said: list[str] = []
    async with app.run_test(size=SIZE) as pilot:
        app.notify = lambda message, **_: said.append(message)  # type: ignore[method-assign]
        await say(app, pilot, "one")
        await choose(app, pilot, "f2", name)
        await until(pilot, lambda: bool(said) and not app.busy)
        assert told in said[0] and app.profile.name == "greedy"
        await say(app, pilot, "two")
        assert app.thread[-1].content == "From toy." and openings.names == ["toy"]


async def test_again_with_waits_for_the_models(openings: Gated) -> None:
    app = build(openings)
    openings.gate.set()
    async with app.run_test(size=SIZE) as pilot:
        await say(app, pilot, "one")
        await choose(app, pilot, "f6", "mine")
        await until(pilot, lambda: app.thread[-1].facts.get("profile") == "mine")
        await settle(app, pilot)
        assert len(app.thread) == 2
        await choose(app, pilot, "f2", "same")  # all roles on the model that is open
        await until(pilot, lambda: app.profile.name == "same")
        assert openings.names == ["toy"]


async def test_a_first_profile_with_two_roles_is_opened_by_its_first_answer(
    openings: Gated,
) -> None:
    openings.gate.set()
    app = SteersmanApp(
        common.ModelArgs(model="toy"), profile="mine", history=History(":memory:"),
        opener=openings, seed=0,
    )  # fmt: skip
    async with app.run_test(size=SIZE) as pilot:
        assert openings.names == []
        await say(app, pilot, "one")
        assert openings.names == ["toy", "small"] and app.thread[-1].role == "assistant"
