"""Second models on the command line: flags, profile, errors, and what is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner, scripted
from role_toys import PROFILE, Openings, registered

from steersman.core.errors import UsageError
from steersman.tui.roles import parse_roles

WORDS = (b"one", b" two", b" three")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with registered(monkeypatch):
        yield Runner(monkeypatch, tmp_path)


@pytest.fixture
def openings(run: Runner, monkeypatch: pytest.MonkeyPatch) -> Openings:
    made = Openings(lambda **_: scripted(WORDS))
    monkeypatch.setattr("steersman.core.load", made)
    monkeypatch.delenv("STEERSMAN_THREADS", raising=False)
    (run.home / "bare.yaml").write_text(PROFILE, encoding="utf-8")
    (run.home / "two.yaml").write_text(
        PROFILE + 'models: {draft: {layers: "0-1,3"}}\n', encoding="utf-8"
    )
    return made


GENERATE = ("generate", "-p", "go", "--seed", "0", "--profile")


@pytest.mark.parametrize(
    ("args", "draft"),
    [
        (["two.yaml"], {"model": "smollm2", "layers": "0-1,3"}),
        (["two.yaml", "-md", "small"], {"model": "small"}),
        (["bare.yaml", "--draft-model", "small,threads=2"], {"model": "small", "threads": 2}),
        (
            ["bare.yaml", "--model-for", "draft=layers=0-9,20-29,backend=torch"],
            {"model": "smollm2", "layers": "0-9,20-29", "backend": "torch"},
        ),
        (["bare.yaml", "--model-for", "draft=,layers=3"], {"model": "smollm2", "layers": "3"}),
        (["two.yaml", "-m", "big", "-t", "2"], {"model": "big", "threads": 2, "layers": "0-1,3"}),
        (["two.yaml", "-m", "big", "-c", "64", "-md", "small"], {"model": "small"}),
    ],
)
def test_generate_opens_what_the_role_asks(
    args: list[str], draft: dict[str, Any], run: Runner, openings: Openings
) -> None:
    done = run(*GENERATE, *args, "--json")
    assert done.code == 0, done.err
    assert done.json["result"]["text"] == "one two three"
    assert openings.asked[1] == {**draft, "offline": False}
    assert done.json["resolved"]["roles"]["draft"]["name"].startswith(draft["model"])
    assert done.json["metrics"]["calls"] == {"target": 3, "draft": 3}
    assert openings.open == []


def test_a_role_that_is_all_the_targets_own_is_opened_once(run: Runner, openings: Openings) -> None:
    done = run(*GENERATE, "bare.yaml", "--model-for", "draft=")
    assert (done.code, done.out) == (0, "one two three")
    assert len(openings.asked) == 1


def test_a_missing_role_is_told_before_anything_is_opened(run: Runner, openings: Openings) -> None:
    done = run(*GENERATE, "bare.yaml")
    assert done.code == 3 and openings.asked == []
    (line,) = done.err.splitlines()
    assert "'draft'" in line and "--draft-model NAME" in line and "models.draft" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["two.yaml", "--model-for", "drat=x"], "--model-for drat: strategy mean has the roles "
         "target, draft, did you mean 'draft'"),
        (["greedy", "--draft-model", "x"], "strategy sample has no role but target"),
        (["two.yaml", "--model-for", "draft"], "write ROLE=NAME"),
        (["two.yaml", "--model-for", "draft=x,layer=2"], "did you mean 'layers'"),
        (["two.yaml", "--model-for", "draft=x,layers=3-1"], "layers: '3-1': '3-1' is not a rising"),
        (["two.yaml", "--model-for", "draft=x,threads=many"], "threads: expected a whole number"),
        (["two.yaml", "-md", "a", "--model-for", "draft=b"], "has a model already"),
    ],
)  # fmt: skip
def test_slips_are_one_line(args: list[str], message: str, run: Runner, openings: Openings) -> None:
    done = run(*GENERATE, *args)
    assert done.code == 2 and message in done.err
    assert openings.asked == []


def test_a_standing_preference_is_no_slip(
    run: Runner, openings: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERSMAN_DRAFT_MODEL", "small")
    assert run(*GENERATE, "greedy").code == 0  # no role for it
    assert run(*GENERATE, "bare.yaml", "--json").code == 0
    assert openings.asked[-1]["model"] == "small"
    monkeypatch.delenv("STEERSMAN_DRAFT_MODEL")
    (run.home / "steersman.yaml").write_text("draft_model: other\n", encoding="utf-8")
    shown = run(*GENERATE, "bare.yaml", "--show-chain", "--json").json["resolved"]["settings"]
    (row,) = [s for s in shown if s["key"] == "models.draft.model"]
    assert row["value"] == "other" and row["origin"] == "steersman.yaml"


def test_layers_of_the_target(run: Runner, openings: Openings) -> None:
    assert run("score", str(_file(run)), "--layers", "0-3,7").code == 0
    assert openings.asked[-1]["layers"] == "0-3,7"
    assert run("check", "--layers", "2", "--only", "last").code == 0
    assert openings.asked[-1]["layers"] == "2"


def _file(run: Runner) -> Path:
    path = run.home / "text.txt"
    path.write_text("some text", encoding="utf-8")
    return path


def test_a_batch_opens_roles_once_and_keeps_them(run: Runner, openings: Openings) -> None:
    lines = [
        {"prompt": "a"},
        {"prompt": "b", "profile": "greedy"},
        {"prompt": "c", "profile": "bare.yaml"},
        {"prompt": "d"},
    ]
    (run.home / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = run("generate", "--jsonl", "in.jsonl", "--out", "o.jsonl", "--profile", "two.yaml")
    answers = [json.loads(x) for x in (run.home / "o.jsonl").read_text().splitlines()]
    assert [a.get("text") for a in answers] == ["one two three"] * 2 + [None, "one two three"]
    # Only the line whose profile says of no draft fails.
    assert done.code == 7 and "models.draft" in answers[2]["error"]["message"]
    assert openings.names == [] and len(openings.asked) == 2
    other = run("generate", "--jsonl", "in.jsonl", "--out", "o.jsonl", "--profile", "two.yaml",
                "-md", "small")  # fmt: skip
    assert other.code == 5 and "made from another input, model or settings" in other.err


def test_chat_changes_profiles_and_models_on_the_way(run: Runner, openings: Openings) -> None:
    done = run("chat", "--profile", "greedy", stdin="\n".join([
        "hello",
        "/profile bare.yaml",  # names no draft: refused, greedy stays
        "again",
        "/profile two.yaml",
        "more",
        "/model draft=small",
        "/model drift=small",
        "/profile greedy",
        "last",
        "/save talk.jsonl",
    ]))  # fmt: skip
    assert done.out.count("one two three") == 4
    assert "models.draft" in done.err and "--model-for drift" in done.err
    assert [a["model"] for a in openings.asked] == ["smollm2", "smollm2", "small"]
    answers = [json.loads(x) for x in (run.home / "talk.jsonl").read_text().splitlines()]
    made = [a for a in answers if a.get("role") == "assistant"]
    assert [a["profile"] for a in made] == ["greedy", "greedy", "two", "greedy"]
    assert made[2]["roles"] == {"draft": "smollm2 layers 0-1,3 on toy"}
    assert openings.open == []


def test_check_checks_every_role(run: Runner, openings: Openings) -> None:
    done = run("check", "--profile", "two.yaml", "--only", "last", "--only", "fork", "--json")
    assert done.code == 0, done.err
    titles = [c["title"] for c in done.json["result"]]
    assert len(titles) == 4 and titles[0].startswith("target: ") and titles[2].startswith("draft: ")
    same = run("check", "--profile", "bare.yaml", "--model-for", "draft=", "--only", "last")
    assert same.code == 0 and len(openings.asked) == 3
    refused = run("check", "--draft-model", "small")
    assert refused.code == 2 and "--profile" in refused.err


def test_role_texts() -> None:
    assert parse_roles("a/b:Q8_0,threads=3", ("second=x.gguf,layers=1,3-4,dtype=q4",)) == {
        "draft": {"model": "a/b:Q8_0", "threads": 3},
        "second": {"model": "x.gguf", "layers": "1,3-4", "dtype": "q4"},
    }
    assert parse_roles("odd,name.gguf", ()) == {"draft": {"model": "odd,name.gguf"}}
    with pytest.raises(UsageError, match="ROLE=NAME"):
        parse_roles(None, ("=x",))
