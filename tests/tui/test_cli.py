"""The command line as a whole: help, laziness, errors, settings, closed pipes, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from cli_runner import Runner, scripted

from steersman.core.errors import BackendError, SteersmanError, UsageError
from steersman.tui import envelope
from steersman.tui.cli import COMMANDS, NESTED, cli, main

HEAVY = ("torch", "mlx", "llama_cpp", "transformers", "textual", "jinja2", "numpy", "rich", "yaml")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(lambda: scripted([b"one", b" two", b" three"]))
    return runner


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["profiles", "--help"]])
def test_help_imports_no_engine_and_no_numpy(args: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from steersman.tui.cli import main; code = main(sys.argv[1:]); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "Usage: steersman" in done.stdout
    assert done.stderr.strip() == "[]"


def test_help_lists_every_command_of_the_table(run: Runner) -> None:
    shown = run("--help").out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert run().out == shown  # not on a terminal, a bare call is a request for help


@pytest.mark.parametrize(
    "name", sorted(n for n in COMMANDS if find_spec(f"steersman.tui.commands.{n}"))
)  # fmt: skip
def test_every_command_has_help_and_a_name_that_matches(name: str, run: Runner) -> None:
    done = run(name, "--help")
    assert done.code == 0 and f"Usage: steersman {name}" in done.out
    with cli.make_context("steersman", [name, "--help"], resilient_parsing=True) as ctx:
        command = cli.get_command(ctx, name)
    assert command is not None and command.name == name


def test_every_flag_has_a_twin_or_is_positional_text(run: Runner) -> None:
    with cli.make_context("steersman", ["generate"], resilient_parsing=True) as ctx:
        command = cli.get_command(ctx, "generate")
    assert command is not None
    without = {p.opts[-1] for p in command.params if isinstance(p, click.Option) and not p.envvar}
    # What names one run's own input and output makes no sense as a lasting setting.
    assert without == {"--prompt", "--file", "--jsonl", "--out", "--trace", "--evidence"}


def test_version_names_engines(run: Runner) -> None:
    lines = run("--version").out.splitlines()
    assert lines[0].startswith("steersman ")
    assert {line.split(":")[0] for line in lines[2:]} >= {"llamacpp", "torch", "mlx"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["genrate"], 2, "'genrate': no such command, did you mean 'generate'?"),
        (["generate", "--tmep", "1"], 2, "--tmep"),
        (["generate", "-p", "x", "--temp", "nan"], 2, "nan is not in 0..1e+06"),
        (["generate", "-p", "x", "--temp", "inf"], 2, "inf is not in"),
        (["generate", "-p", "x", "-n", "-1"], 2, "-1 is not in"),
        (["generate", "-p", "x", "--top-k", "1.5"], 2, "'1.5' is not a whole number"),
        (["generate", "-p", "x", "--seed", str(2**64)], 2, "is not in"),
        (["generate", "-p", "x", "-f", "y"], 2, "give one of -p, -f and FILE"),
        (["generate", "-p", "x", "-o", "temperature.t"], 2, "write key=value"),
        (["generate", "-p", "x", "-o", "temprature.t=1"], 2, "did you mean 'temperature'"),
        (["generate", "-p", "x", "--top-p", "0"], 2, "flag top_p.p: top_p: p must be in (0, 1]"),
        (["generate", "-p", "x", "--profile", "balancd"], 4, "did you mean 'balanced'"),
        (["generate", "no such file"], 4, "no such file: no such file"),
        (["generate", "-p", ""], 2, "prompt: empty"),
        (["generate", "-p", "x", "--out", "f"], 2, "--out: belongs to --jsonl"),
        (["-m", "x", "generate"], 2, "write it after the command"),
        (["--json", "generate"], 2, "--json"),
        (["score", "nowhere.txt"], 4, "nowhere.txt: no such file"),
        (["profiles", "show", "greddy"], 4, "did you mean 'greedy'"),
    ],
)
def test_errors_are_one_line_with_a_code(
    args: list[str], code: int, message: str, run: Runner
) -> None:
    done = run(*args)
    assert done.code == code, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert done.out == ""


def test_json_errors_keep_the_shape(run: Runner) -> None:
    for args, code in [
        (["generate", "--json", "-p", "x", "--profile", "nope"], 4),
        (["generate", "--output", "json", "--temp", "x"], 2),
        (["score", "--json", "nowhere.txt"], 4),
        (["genrate", "--json"], 2),
    ]:
        done = run(*args)
        got = done.json
        assert done.code == code == got["exit_code"]
        assert got["schema_version"] == "steersman.cli.v1" and got["status"] == "error"
        assert set(got["errors"][0]) == {"code", "message", "retryable"}
        assert done.err.startswith("error: ")


def test_unexpected_failures_say_so_and_debug_shows_where(run: Runner) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("engine fell over\nsecond line")

    run.patch.setattr("steersman.core.load", broken)
    done = run("generate", "-p", "x")
    assert done.code == 6
    assert done.err == (
        "error: unexpected RuntimeError: engine fell over second line "
        "(--debug shows the traceback)\n"
    )
    assert "Traceback" in run("generate", "-p", "x", "--debug").err
    run.patch.setenv("STEERSMAN_DEBUG", "1")
    assert "Traceback" in run("generate", "-p", "x").err


@pytest.mark.parametrize(
    ("exc", "code", "exit_code"),
    [
        (UsageError("x"), "bad_argument", 2),
        (BackendError("x"), "backend_error", 6),
        (KeyboardInterrupt(), "cancelled", 130),
        (click.UsageError("x"), "bad_argument", 2),
        (FileNotFoundError(2, "No such file", "a.txt"), "missing_file", 4),
        (PermissionError(13, "Permission denied", "a.txt"), "invalid_input", 5),
        (OSError(28, "No space left on device", "a.txt"), "os_error", 6),
        (MemoryError(), "out_of_memory", 6),
        (ZeroDivisionError(), "unexpected_error", 6),
    ],
)
def test_exceptions_become_problems(exc: BaseException, code: str, exit_code: int) -> None:
    found = envelope.problem(exc)
    assert (found.code, found.exit_code) == (code, exit_code)
    assert "\n" not in found.message and found.message


def test_every_error_class_has_a_published_exit_code() -> None:
    classes = [SteersmanError]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    assert {c.exit_code for c in classes} <= {2, 3, 4, 5, 6, 130}


# -- precedence -----------------------------------------------------------------------------


def chosen(run: Runner, *args: str) -> dict[str, tuple[object, str]]:
    done = run("generate", "--json", "-p", "x", *args)
    assert done.code == 0, done.err
    return {
        re.sub(r"^logits\.\d+\.", "", s["key"]): (s["value"], s["origin"])
        for s in done.json["resolved"]["settings"]
    }


def test_flag_over_environment_over_project_over_user_over_profile(run: Runner) -> None:
    key = "temperature.t"
    value, origin = chosen(run)[key]
    assert value == 0.7 and "balanced.yaml:" in origin  # the profile
    user = run.home / "config"
    user.mkdir()
    (user / "config.yaml").write_text("temp: 0.1\nmodel: from-user\ntop-k: 3\n")
    assert chosen(run)[key] == (0.1, str(user / "config.yaml"))
    (run.home / "steersman.yaml").write_text("generate: {temp: 0.2}\ntemp: 0.9\n")
    assert chosen(run)[key] == (0.2, "steersman.yaml")
    run.patch.setenv("STEERSMAN_TEMP", "0.3")
    assert chosen(run)[key] == (0.3, "environment")
    found = chosen(run, "--temp", "0.4")
    assert found[key] == (0.4, "flag")
    assert found["model"] == ("from-user", str(user / "config.yaml"))
    assert found["top_k.k"] == (3, str(user / "config.yaml"))
    assert found["backend"] == ("auto", "built-in")
    assert run.loads[-1]["model"] == "from-user"
    # -o is the last word.
    assert chosen(run, "--temp", "0.4", "-o", "temperature.t=0.5")[key] == (0.5, "flag")


def test_settings_reach_the_engine(run: Runner) -> None:
    run.patch.setenv("STEERSMAN_BACKEND", "torch")
    run.patch.setenv("STEERSMAN_OFFLINE", "1")
    chosen(run, "-c", "100", "-t", "2", "--dtype", "bfloat16", "--device", "cpu")
    assert run.loads[-1] == {
        "model": "smollm2", "backend": "torch", "context": 100, "threads": 2,
        "dtype": "bfloat16", "device": "cpu", "offline": True,
    }  # fmt: skip


def test_a_profile_may_name_its_model_and_flags_are_stronger(run: Runner) -> None:
    run.patch.delenv("STEERSMAN_THREADS", raising=False)
    (run.home / "p.yaml").write_text("models: {target: {model: theirs, backend: mlx}}\n")
    found = chosen(run, "--profile", "p.yaml")
    assert found["model"] == ("theirs", "p.yaml:1") and run.loads[-1]["backend"] == "mlx"
    chosen(run, "--profile", "p.yaml", "--backend", "torch")
    assert run.loads[-1] == {"model": "theirs", "backend": "torch", "offline": False}


def test_several_stop_texts_in_the_environment_are_lines(run: Runner) -> None:
    run.patch.setenv("STEERSMAN_STOP", " two\nfour five")
    done = run("generate", "--json", "-p", "x")
    assert done.json["result"]["text"] == "one"
    assert done.json["inputs"]["stop"] == [" two", "four five"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tmep: 1", "steersman.yaml:1: tmep: unknown key, did you mean 'temp'?"),
        ("model: x\ntemp: hot", "steersman.yaml:2: temp: must be a number, got 'hot'"),
        ("generate:\n  top_q: 1", "steersman.yaml:2: generate.top_q: unknown key"),
        ("generate: 5", "steersman.yaml:1: generate: must hold names and values"),
        ("offline: 1", "steersman.yaml:1: offline: must be true or false"),
        ("max_tokens: true", "max_tokens: must be a whole number"),
        ("stop: [1]", "stop: must be text or a list of texts"),
        ("- a", "must hold names and values"),
        ("a: &x 1", "anchors (&x) are not allowed"),
    ],
)
def test_settings_files_are_checked(text: str, message: str, run: Runner) -> None:
    (run.home / "steersman.yaml").write_text(text)
    done = run("generate", "-p", "x")
    assert done.code == 5 and message in done.err
    assert run("--help").code == 0  # help always works


def test_settings_reach_commands_inside_groups(run: Runner) -> None:
    with cli.make_context("steersman", [], resilient_parsing=True) as ctx:
        groups = {n: c for n in COMMANDS if isinstance(c := cli.get_command(ctx, n), click.Group)}
    assert {n: tuple(c.commands) for n, c in groups.items()} == NESTED
    (run.home / "steersman.yaml").write_text("model: mine\nprompt: {ctx_size: 99}\n")
    assert run("prompt", "show", "-p", "x").code == 0
    assert run.loads[-1]["model"] == "mine" and run.loads[-1]["context"] == 99
    (run.home / "steersman.yaml").write_text("output: json\n")
    assert run("profiles", "list").json["command"] == "profiles list"


# -- pipes and signals ----------------------------------------------------------------------

SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from toys import ToyTransformer
import steersman.core
class Slow(ToyTransformer):
    prefill_chunk = 4
    def session(self, **options):
        session = super().session(**options)
        run = session._run
        def slow(plan):
            time.sleep(0.02)
            return run(plan)
        session._run = slow
        return session
steersman.core.load = lambda **_: Slow(context=4096)
from steersman.tui.cli import main
import steersman.core.decode
print("ready", file=sys.stderr, flush=True)
sys.exit(main(sys.argv[1:]))
"""


FOREVER = ("-o", "logit_bias.bias={265: -.inf, 267: -.inf}")  # the toy's end tokens


def start(tmp_path: Path, *args: str) -> subprocess.Popen[bytes]:
    script = SLOW.format(tests=str(Path(__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "STEERSMAN_HOME": str(tmp_path)}, cwd=tmp_path,
    )  # fmt: skip


def test_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    process = start(tmp_path, "generate", "-p", "hello", "-n", "2000", "--stream", *FOREVER)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()  # as `| head -c 1` does
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b"ready\n"
    process.stderr.close()


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    process = start(tmp_path, "generate", "-p", "hello", "-n", "2000", "--json", *FOREVER)
    assert process.stderr is not None and process.stderr.readline() == b"ready\n"
    time.sleep(2)  # 2000 tokens take at least 40 seconds
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    got = json.loads(out)
    assert got["status"] == "cancelled" and got["exit_code"] == 130
    assert got["result"]["finish_reason"] == "cancelled"
    assert 0 < len(got["result"]["token_ids"]) < 2000


def test_main_returns_codes_and_never_raises(run: Runner) -> None:
    assert isinstance(main, object)
    assert run("profiles", "path").code == 0
    group = run("profiles")  # a group without a command shows its help
    assert group.code == 2 and group.err.startswith("Usage: steersman profiles")
