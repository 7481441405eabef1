"""``--trace`` on every command that generates, and ``steersman trace`` without any engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner, scripted
from test_cli_safety import ALL, EVIL, assert_harmless
from trace_files import STARTED, eventful, note, token, write_trace

from steersman.core.trace import Replay, read_trace


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(lambda: scripted([b"one", b" two", b" three"]))
    return runner


# -- recording -----------------------------------------------------------------------------------


def test_generate_records_and_says_nothing_else(run: Runner) -> None:
    plain = run("generate", "-p", "x", "--seed", "1")
    done = run("generate", "-p", "x", "--seed", "1", "--trace", "t.jsonl", "--trace-top", "2")
    assert (done.code, done.out, done.err) == (plain.code, plain.out, plain.err)
    (one,) = Replay("t.jsonl").recordings
    assert [one.name(f.token) for f in one.frames[:3]] == ["one", " two", " three"]
    assert one.started["prompt"] == "x" and one.started["seed"] == 1
    raw = Replay("t.jsonl").detail(one.frames[0])["raw"]
    assert len(raw["top"]) == 2 and raw["p"] > 0.99


def test_json_names_the_file_and_is_not_changed_by_it(run: Runner) -> None:
    done = run("generate", "-p", "x", "--json", "--seed", "1", "--trace", "t.jsonl")
    assert done.json["artifacts"] == {"trace": "t.jsonl"}
    other = run("generate", "-p", "x", "--json", "--seed", "1")
    assert done.json["result"]["logprobs"] == other.json["result"]["logprobs"]


def test_an_existing_file_is_refused_before_anything_is_loaded(run: Runner) -> None:
    (run.home / "t.jsonl").write_text("mine")
    for args in (["generate", "-p", "x"], ["chat"], ["generate", "--jsonl", "-"]):
        done = run(*args, "--trace", "t.jsonl", stdin='{"prompt": "x"}\n')
        assert done.code == 5 and "t.jsonl: exists already; choose another name" in done.err
        assert run.loads == []
    assert (run.home / "t.jsonl").read_text() == "mine"
    assert run("generate", "-p", "", "--trace", "new.jsonl").code == 2
    assert not (run.home / "new.jsonl").exists()  # nothing began


def test_the_limit_is_told_and_the_text_is_whole(run: Runner) -> None:
    done = run("generate", "-p", "x", "--trace", "t.jsonl", "--trace-limit", "1K")
    assert done.code == 0 and done.out == "one two three"
    assert done.err.count("reached 1024 bytes and ends there") == 1
    assert (run.home / "t.jsonl").stat().st_size <= 1024
    shown = run("trace", "show", "t.jsonl")
    assert "reached its size limit" in shown.err or "holds no text yet" in shown.err


@pytest.mark.parametrize("size", ["0", "64X", "-1", "", "1e9", "999999999999G"])
def test_sizes_that_are_none(run: Runner, size: str) -> None:
    done = run("generate", "-p", "x", "--trace", "t", "--trace-limit", size)
    assert done.code == 2 and "is not a size from 1K to 1024G" in done.err


def test_defaults_come_from_settings_files_and_the_environment(run: Runner) -> None:
    (run.home / "steersman.yaml").write_text("trace_top: 1\ntrace_limit: 2G\n")
    assert run("generate", "-p", "x", "--trace", "a.jsonl").code == 0
    assert (
        len(Replay("a.jsonl").detail(Replay("a.jsonl").recordings[0].frames[0])["raw"]["top"]) == 1
    )
    run.patch.setenv("STEERSMAN_TRACE_TOP", "3")
    assert run("generate", "-p", "x", "--trace", "b.jsonl").code == 0
    assert (
        len(Replay("b.jsonl").detail(Replay("b.jsonl").recordings[0].frames[0])["raw"]["top"]) == 3
    )


def test_a_batch_is_one_file_and_goes_on_where_it_stopped(run: Runner) -> None:
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in ("a", "b", "c"))
    (run.home / "in.jsonl").write_text(lines.replace('"b"', "5"))
    args = ["generate", "--jsonl", "in.jsonl", "--out", "out.jsonl", "--trace", "t.jsonl"]
    done = run(*args)
    assert done.code == 7  # the second line is none
    assert [r.request for r in Replay("t.jsonl").recordings] == [1, 3]
    assert [r.started["prompt"] for r in Replay("t.jsonl").recordings] == ["a", "c"]
    whole = (run.home / "out.jsonl").read_bytes()
    (run.home / "out.jsonl").write_bytes(whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 1])
    assert run(*args).code == 7
    assert [r.request for r in Replay("t.jsonl").recordings] == [1, 3, 3]


def test_chat_records_every_answer(run: Runner) -> None:
    script = "hello\n/trace\nunheard\n/trace b.jsonl\nagain\n/trace b.jsonl\n"
    done = run("chat", "--trace", "a.jsonl", stdin=script)
    assert done.code == 7 and "b.jsonl: exists already" in done.err  # the last line's mistake
    for name, message in (("a.jsonl", "hello"), ("b.jsonl", "again")):
        (one,) = Replay(name).recordings
        assert message in one.started["prompt"] and one.finished


def test_a_run_that_was_killed_leaves_a_readable_prefix(run: Runner) -> None:
    code = (
        "import os, sys; sys.path[:0] = %r\n"
        "from cli_runner import scripted\n"
        "import steersman.core as core\n"
        "model = scripted([b'w%%d' %% i for i in range(90)])\n"
        "probs, calls = model.probs, []\n"
        "def fatal(history):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 20: os.kill(os.getpid(), 9)\n"
        "    return probs(history)\n"
        "model.probs = fatal\n"
        "core.load = lambda **_: model\n"
        "from steersman.tui.cli import main\n"
        "main(['generate', '-p', 'x', '--trace', 't.jsonl'])\n"
    ) % [p for p in sys.path if "tests" in p]
    done = subprocess.run([sys.executable, "-c", code], cwd=run.home, timeout=120)
    assert done.returncode == -9
    (one,) = Replay(run.home / "t.jsonl").recordings
    assert len(one.frames) == 19 and not one.finished


# -- looking -------------------------------------------------------------------------------------


def test_into_a_pipe_goes_a_table(run: Runner) -> None:
    write_trace(run.home / "t.jsonl", eventful())
    done = run("trace", "show", "t.jsonl")
    assert done.code == 0 and run.loads == []
    lines = done.out.splitlines()
    assert lines[0] == "request 0: toy on none, small tiny · antislop · seed 7"
    assert lines[2].split() == [
        "1", "0", "'", "upon'", "0.750", "1", "0.875", "2.250", "min_p:3", "temperature:3",
    ]  # fmt: skip
    assert "[took back 1 token, 2 left]" in lines[5] and "phrase 'a tapestry'" in lines[5]
    assert "refused here: ' long' ' ago'" in lines[8]
    assert "routed to small (score 0.75)" in lines[10]
    assert lines[-2] == "(the trace ends here)"
    assert run("trace", "show", "t.jsonl", "--plain", terminal=ALL).out.count("\n") == len(lines)
    only = run("trace", "show", "t.jsonl", "--request", "1").out
    assert only.startswith("request 1") and "upon" not in only
    none = run("trace", "show", "t.jsonl", "--request", "5")
    assert none.code == 2 and "--request 5: t.jsonl holds 0, 1" in none.err


def test_json_holds_the_lines_themselves(run: Runner) -> None:
    path = write_trace(run.home / "t.jsonl", eventful())
    done = run("trace", "show", "t.jsonl", "--json")
    assert done.json["result"]["events"] == [line.data for line in read_trace(path)][1:]
    one = run("trace", "show", "t.jsonl", "--json", "--request", "1").json["result"]
    assert [e["event"] for e in one["events"]] == ["started", "token"]


def test_stats_in_words_and_as_json(run: Runner) -> None:
    write_trace(run.home / "t.jsonl", eventful())
    shown = run("trace", "stats", "t.jsonl").out
    assert "phrase 'a tapestry': 1" in shown and "1 of 3 in 1 rounds" in shown
    assert "routed to small" in shown and "66.7%" in shown
    assert "█" in shown and "▁" in shown
    found = run("trace", "stats", "t.jsonl", "--json").json["result"]
    assert found["rewinds"] == 1 and found["kept"] == 9
    assert [s["name"] for s in found["stages"]] == ["min_p", "temperature"]


def test_a_trace_without_any_account_is_shown_too(run: Runner) -> None:
    bare = {"event": "token", "index": 0, "id": 3, "text": "x"}
    write_trace(run.home / "t.jsonl", [STARTED, bare])
    assert "'x'" not in run("trace", "show", "t.jsonl").out  # it has no name either
    assert "#3" in run("trace", "show", "t.jsonl").out
    assert run("trace", "stats", "t.jsonl").code == 0
    write_trace(run.home / "empty.jsonl", [])
    assert "holds no text yet" in run("trace", "show", "empty.jsonl").err
    assert run("trace", "stats", "empty.jsonl").code == 0


@pytest.mark.parametrize("command", ["show", "stats"])
def test_what_is_no_trace_is_one_line(run: Runner, command: str) -> None:
    (run.home / "bad.jsonl").write_text('{"format": "steersman.trace", "version": 2}\n')
    for name, code, message in [
        ("nowhere", 4, "nowhere: no such file"),
        (".", 5, "cannot be read"),
        ("bad.jsonl", 5, "bad.jsonl:1: version 2 of the format; this steersman reads 1: update"),
    ]:
        done = run("trace", command, name)
        assert done.code == code and message in done.err
        assert len(done.err.splitlines()) == 1 and done.out == ""


def evil_lines() -> list[dict[str, Any]]:
    """Return a trace with control characters wherever text may stand."""
    facts = {"name": EVIL, "backend": EVIL}
    evil = token(0, EVIL, 11, 0.5, 0.5, rank=2)
    evil["stages"][0]["name"] = EVIL
    return [
        {
            **STARTED, "prompt": EVIL, "models": {"target": facts, EVIL: facts},
            "profile": {"name": EVIL},
        },
        evil,
        note(**{EVIL: EVIL, "rewind": {"rule": EVIL, EVIL: 1}, "routed": EVIL, "rejected": [11]}),
        {"event": "withdrawn", "keep": 0, "tokens": 1},
        note(drafted=1, accepted=0, rejected=[11, 90]),
        token(0, EVIL, 11, 0.5, 0.5),
        {"event": "failed", "message": EVIL},
        {**STARTED, "request": 1},
        {**token(0, "x", 11, 0.5, 0.5), "request": 1},
        {"event": "finished", "request": 1, "reason": EVIL, "tokens": 1},
    ]  # fmt: skip


def test_nothing_in_a_trace_acts_on_the_terminal(run: Runner) -> None:
    write_trace(run.home / "t.jsonl", evil_lines())
    for args in (["show", "--plain"], ["show"], ["show", "--json"], ["stats"], ["stats", "--json"]):
        done = run("trace", args[0], "t.jsonl", *args[1:], terminal=("stdout", "stderr"))
        assert done.code == 0, done.err
        assert_harmless(done)
    assert "[bold]x[/bold]" in run("trace", "show", "t.jsonl").out


def test_no_engine_is_needed(run: Runner) -> None:
    write_trace(run.home / "t.jsonl", eventful())
    code = (
        "import sys\n"
        "for name in ('torch', 'mlx', 'llama_cpp', 'transformers'): sys.modules[name] = None\n"
        "from steersman.tui.cli import main\n"
        "sys.exit(main(['trace', sys.argv[1], 't.jsonl']))"
    )
    for name in ("show", "stats"):
        done = subprocess.run(
            [sys.executable, "-c", code, name], cwd=run.home, capture_output=True, timeout=120
        )
        assert done.returncode == 0 and b"min_p" in done.stdout
