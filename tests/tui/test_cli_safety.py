"""Nothing a model, a document or a file says reaches a terminal as a control sequence.

Every printed path is fed every control character. On a terminal the only escape sequences are the
program's own colours.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Result, Runner, scripted

from steersman.core.locate import ModelEntry
from steersman.tui.envelope import to_json

CONTROLS = [chr(c) for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\t\n"]
BIDI = [chr(c) for c in [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]]
EVIL = "".join(CONTROLS + BIDI) + "\x1b]52;c;AAAA\x07\x1b[2J\x9b2J[bold]x[/bold]"
# A file name holds neither NUL nor a slash.
EVIL_NAME = EVIL.replace("\x00", "").replace("/", "_")
ALL = ("stdin", "stdout", "stderr")
OWN_STYLE = re.compile(r"\x1b\[(?:[0-9]+;?)*m")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(lambda: scripted([b"ok "] + [c.encode() for c in EVIL]))
    return runner


def assert_harmless(done: Result) -> None:
    for stream in (done.out, done.err):
        rest = OWN_STYLE.sub("", stream)
        bad = [
            hex(ord(c))
            for c in rest
            if (unicodedata.category(c) == "Cc" and c not in "\t\n") or c in BIDI
        ]
        assert bad == [], stream[:300]


def test_generated_text_on_a_terminal_streamed_or_not(run: Runner) -> None:
    for flags in (["--stream"], ["--no-stream"], ["--chat"], ["--top-logprobs", "2"]):
        done = run("generate", "-p", "x", *flags, terminal=ALL)
        assert done.code == 0, done.err
        assert_harmless(done)
        assert "␛" in done.out and "\\x9b" in done.out and "<U+202E>" in done.out
        assert "[bold]x[/bold]" in done.out  # markup is text


def test_into_a_pipe_goes_what_the_model_wrote(run: Runner) -> None:
    assert run("generate", "-p", "x").out == "ok " + EVIL
    assert run("generate", "-p", "x", "--stream").out == "ok " + EVIL


def test_json_escapes_everything(run: Runner) -> None:
    done = run("generate", "-p", EVIL[1:], "--json", "--top-logprobs", "3", terminal=ALL)
    assert done.code == 0, done.err
    assert_harmless(done)
    assert done.out.isascii() and done.json["result"]["text"] == "ok " + EVIL
    assert to_json({EVIL: [EVIL, "\ud800"]}).isprintable()


def test_batch_results_and_errors(run: Runner) -> None:
    lines = [
        {"prompt": "a", "note": EVIL},
        {"prompt": 1, EVIL: 2},
        {"prompt": "a", "profile": EVIL},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + EVIL + "\n"
    # Quiet: a progress bar moves by carriage returns of its own.
    done = run("generate", "--jsonl", "-", "-q", stdin=text, terminal=("stdout", "stderr"))
    assert done.code == 7
    assert_harmless(done)
    assert json.loads(done.out.splitlines()[0])["note"] == EVIL


def test_chat(run: Runner) -> None:
    evil = EVIL.replace("\r", "")  # Python reads a lone carriage return as a line end
    text = f"hello {evil}\n/profile {evil}\n/{evil}\n/set {evil}=1\n/set x\n/save {evil}/x\n"
    text += "/regenerate\n/system " + evil + "\n/save talk.md\n/show\n/profile\n"
    done = run("chat", stdin=text, terminal=("stdout", "stderr"))
    assert_harmless(done)
    assert "␛" in done.out


def test_score_table(run: Runner) -> None:
    (run.home / "t.txt").write_bytes(EVIL.encode())
    done = run("score", "t.txt", "-q", terminal=ALL)
    assert done.code == 0, done.err
    assert_harmless(done)
    assert "␛" in done.out


def test_prompt_show(run: Runner) -> None:
    for flags in ([], ["--chat"], ["-s", EVIL]):
        done = run("prompt", "show", "-p", EVIL, *flags, terminal=ALL)
        assert done.code == 0, done.err
        assert_harmless(done)


def test_models_with_evil_names(run: Runner) -> None:
    entry = ModelEntry(
        name=EVIL, origin="hub", installed=True, path=Path("/" + EVIL), size=5,
        description=EVIL, licence=EVIL,
    )  # fmt: skip
    run.patch.setattr("steersman.core.locate.list_models", lambda: [entry])
    for flags in ([], ["--json"]):
        done = run("models", *flags, terminal=ALL)
        assert done.code == 0
        assert_harmless(done)


def test_profiles_with_evil_content_and_names(run: Runner) -> None:
    folder = run.home / "config" / "profiles"
    folder.mkdir(parents=True)
    shown = EVIL.replace("\x00", "").encode("unicode_escape").decode()
    printable = "".join(c for c in EVIL if c.isprintable())
    # YAML itself refuses raw control characters, but takes them escaped.
    (folder / "evil.yaml").write_text(f'description: "{shown}"\nlogits: [min_p]\n')
    (folder / "raw.yaml").write_text(f"description: {EVIL}\n")
    (folder / "key.yaml").write_text(f'"{shown}": 1\n')
    (folder / f"{EVIL_NAME[:60]}.yaml").write_text("description: name\n")
    outside = run.home / f"{EVIL_NAME[:60]}.yaml"
    outside.write_text(f"description: {printable}\n")
    for args in (
        ["list"],
        ["show", "evil"],
        ["show", "raw"],
        ["show", "evil", "--effective"],
        ["validate"],
        ["validate", str(outside), "key", EVIL[1:]],
        ["diff", "evil", "greedy"],
        ["path", EVIL[1:]],
        ["path", str(outside)],
        ["new", EVIL[1:]],
        ["new", "fine", "--from", EVIL[1:]],
        ["show", "evil", "-o", EVIL[1:] + "=1"],
    ):
        for flags in ([], ["--json"]):
            assert_harmless(run("profiles", *args, *flags, terminal=ALL))
    assert run("profiles", "list").code == 0


def test_error_lines(run: Runner) -> None:
    evil = EVIL[1:]
    for args in (
        [evil],
        ["generate", evil],
        ["generate", "-p", "x", "--profile", evil],
        ["generate", "-p", "x", "-o", evil],
        ["generate", "-p", "x", "-o", f"{evil}=1"],
        ["generate", "-p", "x", "-o", f"temperature.t={evil}"],
        ["generate", "-p", "x", "--temp", evil],
        ["generate", f"--{evil}"],
        ["score", evil],
        ["doctor", evil],
        ["completion", evil],
        ["paths", evil],
    ):
        for extra in ([], ["--json"], ["--debug"]):
            done = run(*args, *extra, terminal=ALL)
            assert done.code in (2, 4, 5), args
            assert_harmless(done)


def test_exceptions_of_an_engine(run: Runner) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError(EVIL)

    run.patch.setattr("steersman.core.load", broken)
    for args in (["generate", "-p", "x"], ["chat"], ["prompt", "show", "-p", "x"]):
        done = run(*args, "--debug", terminal=("stdout", "stderr"))
        assert done.code == 6 and "␛" in done.err
        assert_harmless(done)


def test_settings_file(run: Runner) -> None:
    for text in (EVIL, f'"{EVIL[1:].encode("unicode_escape").decode()}": 1'):
        (run.home / "steersman.yaml").write_text(text)
        done = run("generate", "-p", "x", terminal=ALL)
        assert done.code == 5
        assert_harmless(done)


def test_doctor_and_version_with_a_lying_engine(run: Runner) -> None:
    from steersman.tui import environment

    engine = environment.Engine(name=EVIL, missing=(EVIL,), install=EVIL, versions={EVIL: EVIL})
    run.patch.setattr(environment, "engines", lambda: iter([engine]))
    for args in (["doctor"], ["--version"], ["--list-devices"], ["doctor", "--json"]):
        assert_harmless(run(*args, terminal=ALL))


def test_paths(run: Runner) -> None:
    run.patch.setenv("STEERSMAN_HOME", "/tmp/" + EVIL_NAME)
    done = run("paths", terminal=ALL)
    assert done.code == 0
    assert_harmless(done)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_real_terminal(tmp_path: Path) -> None:
    """The same through a pseudo-terminal, where isatty is not told but true."""
    folder = tmp_path / "config" / "profiles"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text(
        'description: "\\e]52;c;AAAA\\a\\e[2J\\x9b2J\\u202e"\nlogits: [min_p]\n# \\e\n'
    )
    code = "import sys; from steersman.tui.cli import main; sys.exit(main(sys.argv[1:]))"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "profiles", "list"],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "STEERSMAN_HOME": str(tmp_path), "TERM": "xterm"}, cwd=tmp_path,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = OWN_STYLE.sub("", shown.decode()).replace("\r\n", "\n")
    assert "\x1b" in shown.decode()  # it did colour its header, so it knew the terminal
    assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text
    assert "␛]52;c;AAAA␇" in text and "<U+202E>" in text
