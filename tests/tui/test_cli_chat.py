"""``steersman chat``: the conversation, the commands that change it, and its files."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner, scripted
from toys import TableModel, ToyTransformer

WORDS = [b"one", b" two", b" three"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(lambda: scripted(WORDS))
    return runner


def test_lines_through_a_pipe_are_messages(run: Runner) -> None:
    done = run("chat", stdin="hi\n\n  \nagain\n")
    assert (done.code, done.out, done.err) == (0, "one two three\n" * 2, "")


def test_on_a_terminal(run: Runner) -> None:
    run.patch.setattr("builtins.input", _typed(["hi", KeyboardInterrupt, "/quit"]))
    done = run("chat", terminal=("stdin", "stdout", "stderr"))
    assert done.code == 0
    assert "one two three\n" in done.out
    assert "toy-table on toy, profile balanced" in done.err and "tok/s" in done.err
    assert "/quit or Ctrl-D leaves" in done.err
    run.patch.setattr("builtins.input", _typed([EOFError]))
    assert run("chat", terminal=("stdin", "stdout", "stderr")).code == 0


def _typed(lines: list[Any]) -> Any:
    rest = iter(lines)

    def read(_: str = "") -> str:
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    return read


def saved(run: Runner, name: str = "talk.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.home / name).read_text().splitlines()]


def test_save_jsonl_and_markdown(run: Runner) -> None:
    done = run(
        "chat", "-s", "Be brief.", "--seed", "3",
        stdin="a\\\nb\n//slash\n/save talk.jsonl\n/save talk.md\n/save talk.md\n/save\n",
    )  # fmt: skip
    assert done.code == 7  # two commands failed
    assert "talk.md: exists already" in done.err and "/save: name a file" in done.err
    header, system, *turns = saved(run)
    assert header["format"] == "steersman.conversation.v1" and header["messages"] == 5
    assert system == {"role": "system", "content": "Be brief."}
    assert [t["role"] for t in turns] == ["user", "assistant"] * 2
    assert turns[0]["content"] == "a\nb" and turns[2]["content"] == "/slash"
    answer = turns[1]
    assert answer["content"] == "one two three" and answer["seed"] == 3
    assert (answer["model"], answer["backend"], answer["profile"]) == (
        "toy-table", "toy", "balanced",
    )  # fmt: skip
    text = (run.home / "talk.md").read_text()
    assert "### You\n\na\nb\n" in text and "### toy-table, toy, balanced" in text


def test_profile_set_and_regenerate(run: Runner) -> None:
    done = run(
        "chat", "--temp", "0.9",
        stdin="hi\n/regenerate greedy\n/set temperature.t=0.4\n/show\n/set\n/show\n/profile\n"
        "/save talk.jsonl\n",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.startswith("one two three\none two three\n")
    rows = [line.split() for line in done.out.splitlines() if "temperature.t" in line]
    assert [row[1] for row in rows] == ["0.4", "0.0"]  # --temp went with the first profile
    assert [t.get("profile") for t in saved(run)[1:]] == [None, "greedy"]
    assert any(line.startswith("*  greedy") for line in done.out.splitlines())


def test_system_and_clear(run: Runner) -> None:
    done = run(
        "chat", "-s", "x",
        stdin="hi\n/clear\n/system new\nho\n/save a.jsonl\n/system\n/save b.jsonl\n",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [t["content"] for t in saved(run, "a.jsonl")[1:]] == ["new", "ho", "one two three"]
    assert [t["role"] for t in saved(run, "b.jsonl")[1:]] == ["user", "assistant"]


def test_model_and_backend(run: Runner) -> None:
    done = run("chat", stdin="/model\n/backend\n/model other\n/backend torch\nhi\n")
    assert done.out == "toy-table (<memory>)\ntoy\none two three\n" or "one two three" in done.out
    assert [o["model"] for o in run.loads] == ["smollm2", "other", "other"]
    assert run.loads[-1]["backend"] == "torch"


def test_a_model_that_does_not_open_changes_nothing(run: Runner) -> None:
    from steersman.core.errors import MissingFile

    models = iter([scripted(WORDS)])

    def load(**_: Any) -> Any:
        try:
            return next(models)
        except StopIteration:
            raise MissingFile("--model 'nope': no such file") from None

    run.patch.setattr("steersman.core.load", load)
    done = run("chat", stdin="/model nope\nhi\n")
    assert done.out == "one two three\n" and "no such file" in done.err and done.code == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/profil greedy", "/profil: no such command, did you mean '/profile'?"),
        ("/profile nope", "profile 'nope': not found"),
        ("/set temprature.t=1", "did you mean 'temperature'"),
        ("/set x", "write key=value"),
        ("/regenerate", "there is no answer yet"),
    ],
)
def test_mistakes_are_reported_and_the_chat_goes_on(run: Runner, line: str, message: str) -> None:
    done = run("chat", stdin=f"{line}\nhi\n")
    assert message in done.err and done.out == "one two three\n" and done.code == 7


def test_a_message_that_does_not_fit_is_not_kept(run: Runner) -> None:
    run.use(lambda: scripted(WORDS, context=80))
    done = run("chat", stdin=f"{'x' * 200}\nhi\n/save talk.jsonl\n")
    assert "do not fit" in done.err and done.out == "one two three\n"
    assert [t["content"] for t in saved(run)[1:]] == ["hi", "one two three"]


def test_the_cache_is_kept_between_turns(run: Runner) -> None:
    model = scripted(WORDS)
    run.use(lambda: model)
    run("chat", stdin="hi\n")
    first = model.calls["tokens"]
    model.calls.clear()
    run("chat", stdin="hi\nhi\n/save talk.jsonl\n")
    timings = [t["timings"] for t in saved(run) if t.get("role") == "assistant"]
    # The second prompt holds the first turn, of which all but its end is in the cache.
    assert timings[1]["cached_tokens"] >= timings[0]["prompt_tokens"]
    assert model.calls["tokens"] < 2 * first + timings[1]["prompt_tokens"]


def test_ctrl_c_stops_the_answer_not_the_chat(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(TableModel):
        pass

    from steersman.tui.commands import chat

    events: list[threading.Event] = []

    @contextmanager
    def recorded() -> Any:
        events.append(threading.Event())
        if len(events) == 1:
            events[0].set()  # before the first token
        yield events[-1]

    monkeypatch.setattr(chat, "ctrl_c_cancels", recorded)
    done = run("chat", stdin="first\nsecond\n/save talk.jsonl\n")
    assert done.code == 0 and "the message was taken back" in done.err
    assert [t["content"] for t in saved(run)[1:]] == ["second", "one two three"]


def test_a_cancelled_answer_keeps_its_text(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run.use(lambda: ToyTransformer(context=256))
    from steersman.tui.commands import chat

    class After:
        """Is set after some polls."""

        def __init__(self, polls: int) -> None:
            self.left = polls

        def is_set(self) -> bool:
            self.left -= 1
            return self.left < 0

        def __call__(self) -> bool:
            return self.is_set()

    @contextmanager
    def soon() -> Any:
        yield After(10)

    monkeypatch.setattr(chat, "ctrl_c_cancels", soon)
    run("chat", "--seed", "1", stdin="hello\n/save talk.jsonl\n")
    answer = saved(run)[2]
    assert answer["finish_reason"] == "cancelled"
    assert answer["timings"]["generated_tokens"] >= 1


def test_json_is_refused_with_the_alternative(run: Runner) -> None:
    done = run("chat", "--json", stdin="hi\n")
    assert done.code == 2 and "generate --chat --json" in done.err
