"""``steersman generate``: prompts, streams, JSON, and batches that survive anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner, scripted
from toys import ToyTransformer

from steersman.core.decode import STRATEGIES
from steersman.core.decode.types import Edit, Step, Token
from steersman.core.model import Capability
from steersman.tui.batch_input import parse

WORDS = [b"one", b" two", b" three"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(lambda: scripted(WORDS))
    return runner


def test_text_goes_to_stdout_alone(run: Runner) -> None:
    done = run("generate", "-p", "count:")
    assert (done.code, done.out, done.err) == (0, "one two three", "")


@pytest.mark.parametrize("terminal", [(), ("stdout",), ("stdout", "stderr")])
def test_streamed_or_not_the_text_is_the_same(run: Runner, terminal: tuple[str, ...]) -> None:
    for flag in ("--stream", "--no-stream"):
        done = run("generate", "-p", "x", flag, terminal=terminal)
        assert done.out.rstrip("\n") == "one two three"
        assert done.out.endswith("\n") == ("stdout" in terminal)
        assert ("tok/s" in done.err) == ("stderr" in terminal)
    assert run("generate", "-p", "x", "-q", terminal=("stderr",)).err == ""


def test_where_the_prompt_comes_from(run: Runner) -> None:
    (run.home / "p.txt").write_text("from a file\n")

    def prompt(*args: str, **kwargs: Any) -> str:
        done = run("generate", "--json", *args, **kwargs)
        assert done.code == 0, done.err
        return done.json["inputs"]["prompt"]

    assert prompt("p.txt") == prompt("-f", "p.txt") == "from a file"
    assert prompt(stdin="piped\n\n") == "piped\n"  # one newline at the end is the file's
    assert prompt("-p", "-", stdin="dash\r\n") == "dash"
    assert prompt("-p", "kept\n") == "kept\n"
    bad = run("generate", stdin=b"ok\n\xff")
    assert bad.code == 5 and "stdin:2: not UTF-8 text (byte 3)" in bad.err
    none = run("generate", terminal=("stdin",))
    assert none.code == 2 and "give -p TEXT, a FILE, or text on stdin" in none.err


def test_json_holds_everything(run: Runner) -> None:
    done = run("generate", "-p", "hi", "--json", "--seed", "5", "--top-logprobs", "2", "-n", "2")
    got = done.json
    assert got["command"] == "generate" and got["status"] == "ok" and got["exit_code"] == 0
    result = got["result"]
    assert result["text"] == "one two" and result["finish_reason"] == "length"
    assert result["prompt_token_ids"] == [104, 105] and result["token_ids"] == [256, 257]
    assert result["seed"] == 5
    first = result["logprobs"][0]
    assert first["token"] == "one" and bytes(first["bytes"]) == b"one"
    assert first["raw_logprob"] == pytest.approx(0, abs=1e-3)
    assert first["logprob"] == pytest.approx(0, abs=1e-3)
    assert len(first["top"]) == 2 and first["top"][0]["id"] == 256
    assert got["metrics"]["generated_tokens"] == 2 and got["metrics"]["calls"]
    assert got["resolved"]["model"]["backend"] == "toy"
    assert got["resolved"]["profile"] == "balanced"
    stopped = run("generate", "-p", "hi", "--json", "--stop", " th").json["result"]
    assert stopped["text"] == "one two" and stopped["finish_reason"] == "stop"
    assert stopped["stop"] == " th"


def test_raw_and_final_logprobs_are_told_apart(run: Runner) -> None:
    run.use(lambda: ToyTransformer(context=64))
    args = ("generate", "-p", "hello", "--json", "--seed", "1", "-n", "5")
    cut = run(*args, "--top-k", "2").json["result"]["logprobs"]
    assert all(t["logprob"] > t["raw_logprob"] for t in cut)
    plain = run(*args, "--profile", "openai-like").json["result"]["logprobs"]
    assert all(t["logprob"] == pytest.approx(t["raw_logprob"], abs=1e-5) for t in plain)


def test_seed_decides(run: Runner) -> None:
    run.use(lambda: ToyTransformer(context=64))

    def text(*args: str) -> str:
        return run("generate", "-p", "hello", "--json", "-n", "12", *args).json["result"]["text"]

    assert text("--seed", "3") == text("--seed", "3") != text("--seed", "4")
    assert text("--temp", "0", "--seed", "3") == text("--temp", "0", "--seed", "4")


def test_token_table(run: Runner) -> None:
    done = run("generate", "-p", "x", "--top-logprobs", "1")
    assert done.out.startswith("one two three")
    assert "raw logprob" in done.out and "' two'" in done.out


def test_chat_uses_the_template_once(run: Runner) -> None:
    done = run("generate", "-p", "hi", "-s", "Be brief.", "--json")
    assert done.code == 0, done.err
    ids = done.json["result"]["prompt_token_ids"]
    start, end = 256 + len(WORDS) + 2, 256 + len(WORDS) + 3
    assert ids.count(start) == 3 and ids.count(end) == 2
    raw = run("generate", "-p", "<|im_start|>", "--json").json["result"]["prompt_token_ids"]
    assert start not in raw  # a prompt cannot write control tokens
    run.use(lambda: scripted(WORDS, chat=False))
    refused = run("generate", "-p", "hi", "--chat")
    assert refused.code != 0 and "chat template" in refused.err


def test_too_long_a_prompt_is_refused_unless_told(run: Runner) -> None:
    run.use(lambda: scripted(WORDS, context=16))
    done = run("generate", "-p", "x" * 40)
    assert done.code == 5 and "40 tokens do not fit" in done.err and "--truncate" in done.err
    cut = run("generate", "-p", "x" * 40, "--truncate", "--json")
    assert cut.json["result"]["truncated"] == 25
    assert "the first 25 tokens were cut" in cut.err and cut.json["warnings"]


def test_show_chain(run: Runner) -> None:
    alone = run("generate", "--show-chain", "--temp", "0.5", terminal=("stdin",))
    assert alone.code == 0 and alone.err == "" and run.loads == []
    rows = {line.split()[0]: line.split()[1:] for line in alone.out.splitlines()[1:]}
    assert rows["logits.1.temperature.t"] == ["0.5", "flag"]
    assert rows["logits.0.min_p.p"][0] == "0.05"
    both = run("generate", "--show-chain", "-p", "x")
    assert both.out == "one two three" and "logits.0.min_p.p" in both.err


def test_missing_capability_is_said_before_the_first_token(run: Runner) -> None:
    done = run("generate", "-p", "x", "--profile", "contrastive")
    assert done.code == 3 and "HIDDEN" in done.err and done.out == ""


# -- withdrawn text -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rewinder:
    """Says "one two three", takes two tokens back, and says " three"."""

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS}

    @property
    def max_rows(self) -> int:
        return 1

    def init(self, request: Any, rng: Any) -> tuple[int, Step]:
        from steersman.core.model import Forward

        return 0, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: int, out: Any, rng: Any) -> tuple[int, Step]:
        from steersman.core.model import Forward

        edits = [
            Edit(keep=0, tokens=tuple(Token(id=i) for i in (256, 257, 258))),
            Edit(keep=1, tokens=(Token(id=258),)),
        ]
        ask = {"target": Forward(keep=1, tokens=[[1]])}
        return state + 1, Step(ask=ask, edit=edits[state], finish="eos" if state else None)


def test_withdrawn_text(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "rewinder", Rewinder)  # type: ignore[arg-type]
    (run.home / "r.yaml").write_text("strategy: rewinder\n")
    args = ("generate", "-p", "x", "--profile", "r.yaml")
    assert run(*args).out == "one three"  # into a pipe: only the end result
    shown = run(*args, terminal=("stdout",)).out
    assert "one two three" in shown and "[took back 10 characters]" in shown
    assert shown.endswith("\none three\n")
    forced = run(*args, "--stream")
    assert forced.out == "one two three three" and "leave out --stream" in forced.err
    result = run(*args, "--json").json["result"]
    assert result["text"] == "one three" and result["token_ids"] == [256, 258]


# -- batch ----------------------------------------------------------------------------------


def batch(run: Runner, lines: list[Any], *args: str, out: str = "out.jsonl") -> Any:
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (run.home / "in.jsonl").write_text(text)
    return run("generate", "--jsonl", "in.jsonl", "--out", out, *args)


def read(run: Runner, out: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.home / out).read_text().splitlines()]


def test_batch_in_input_order_with_fields_passed_through(run: Runner) -> None:
    lines = [
        {"id": 7, "prompt": "a", "answer": [1, {"x": None}], "max_tokens": 1},
        "",
        {"custom_id": "c", "prompt": "b", "stop": " three", "seed": 9},
        {"prompt": "c", "profile": "greedy", "temperature": 0.5, "logprobs": 1},
    ]
    done = batch(run, lines)
    assert done.code == 0, done.err
    one, two, three = read(run)
    assert one["id"] == 7 and one["answer"] == [1, {"x": None}]
    assert (one["text"], one["finish_reason"]) == ("one", "length")
    assert two["custom_id"] == "c" and two["text"] == "one two"
    assert two["steersman"]["seed"] == 9 and two["steersman"]["line"] == 3
    assert three["steersman"]["profile"] == "greedy" and len(three["logprobs"][0]["top"]) == 1
    assert [r["error"] for r in (one, two, three)] == [None] * 3
    assert one["prompt_tokens"] == 1 and one["completion_tokens"] == 1


def test_batch_to_stdout_and_from_stdin(run: Runner) -> None:
    done = run("generate", "--jsonl", "-", stdin='{"prompt": "a"}\n{"prompt": "b"}')
    assert [json.loads(x)["text"] for x in done.out.splitlines()] == ["one two three"] * 2
    assert run("generate", "--jsonl", "-", "--json", stdin="{}").code == 2


def test_lines_draw_independently_and_reproducibly(run: Runner) -> None:
    run.use(lambda: ToyTransformer(context=64))
    lines = [{"prompt": "same"}] * 3
    batch(run, lines, "--seed", "1", "-n", "16")
    batch(run, lines, "--seed", "1", "-n", "16", out="again.jsonl")
    texts = [r["text"] for r in read(run)]
    assert texts == [r["text"] for r in read(run, "again.jsonl")]
    assert len(set(texts)) == 3
    alone = run("generate", "-p", "same", "--seed", "2", "-n", "16", "--json")
    assert alone.json["result"]["text"] == texts[1]  # line 2 of seed 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "must hold one of 'prompt' and 'messages'"),
        ('{"prompt": "a", "messages": []}', "must hold one of"),
        ('{"prompt": 5}', "prompt: must be text, got int"),
        ('{"prompt": "\\ud800"}', "prompt: holds a lone surrogate"),
        ('{"messages": []}', "messages: must be a list"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content: must be text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "only parts of"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens: must be a whole number"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens: must be a whole number"),
        ('{"prompt": "a", "seed": -1}', "seed: must be a whole number"),
        ('{"prompt": "a", "temperature": "hot"}', "expected a number, got 'hot'"),
        ('{"prompt": "a", "temperature": NaN}', "line 2 temperature.t"),
        ('{"prompt": "a", "profile": "nope"}', "profile 'nope': not found"),
        ('{"prompt": "a", "text": "x"}', "text: results use this name"),
        ('{"prompt": "a", "stop": [""]}', "stop: must be text"),
        ('{"prompt": ""}', "prompt: empty"),
        ('{"body": []}', "body: must be an object"),
        ('{"body": {"prompt": "a", "n": 2}}', "body.n: 2 is not supported"),
        ('{"body": {"prompt": "a", "best_of": 2}}', "body.best_of: not supported"),
        ('{"body": {"input": "a"}, "url": "/v1/embeddings"}', "is not served"),
        ("[" * 5000, "not valid JSON"),
        ('{"prompt": "' + "x" * 600 + '"}', "do not fit"),
    ],
)
def test_a_bad_line_is_named_and_the_others_go_on(run: Runner, line: str, message: str) -> None:
    done = batch(run, [{"prompt": "a"}, line, {"prompt": "b"}])
    assert done.code == 7
    (error,) = [x for x in done.err.splitlines() if x.startswith("error: ")]
    assert "line 2" in error and message in error
    good, bad, last = read(run)
    assert good["text"] == last["text"] == "one two three"
    assert bad["error"]["message"] and bad["steersman"]["line"] == 2


def test_not_utf8_and_byte_order_mark(run: Runner) -> None:
    (run.home / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xff"}\n')
    done = run("generate", "--jsonl", "in.jsonl", "--out", "out.jsonl")
    assert done.code == 7 and "line 2: not UTF-8 text" in done.err
    assert read(run)[0]["text"] == "one two three"


def test_openai_lines_get_openai_answers(run: Runner) -> None:
    chat = {
        "custom_id": "r1", "method": "POST", "url": "/v1/chat/completions",
        "body": {
            "model": "gpt-x", "max_completion_tokens": 2, "n": 1, "logprobs": True,
            "top_logprobs": 1, "messages": [{"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        },
    }  # fmt: skip
    plain = {
        "custom_id": "r2",
        "url": "/v1/completions",
        "body": {"prompt": ["x"], "temperature": 0},
    }
    done = batch(run, [chat, plain])
    assert done.code == 0, done.err
    assert "body.model 'gpt-x' is not obeyed" in done.err
    one, two = read(run)
    choice = one["response"]["body"]["choices"][0]
    assert one["custom_id"] == "r1" and one["response"]["status_code"] == 200
    assert choice["message"] == {"role": "assistant", "content": "one two"}
    assert choice["finish_reason"] == "length" and len(choice["logprobs"]["content"]) == 2
    usage = one["response"]["body"]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 2
    assert two["response"]["body"]["choices"][0]["text"] == "one two three"
    assert two["response"]["body"]["choices"][0]["finish_reason"] == "stop"


def test_penalties_of_a_line_count_the_whole_text() -> None:
    item = parse(b'{"prompt": "a", "frequency_penalty": 0.5}', line=1)
    assert item.overrides == {"penalties.frequency": 0.5, "penalties.last_n": -1}


def test_a_killed_batch_goes_on_where_it_stopped(run: Runner) -> None:
    lines: list[Any] = [{"prompt": f"p{i}", "id": i} for i in range(5)]
    lines[1] = "{bad"
    batch(run, lines, "--seed", "1")
    whole = (run.home / "out.jsonl").read_bytes()
    # Cut anywhere: within a line, at its end, at the start.
    for size in (0, 10, whole.index(b"\n") + 1, len(whole) - 3, len(whole)):
        (run.home / "out.jsonl").write_bytes(whole[:size])
        done = batch(run, lines, "--seed", "1", "--json")
        assert done.code == 7
        assert (run.home / "out.jsonl").read_bytes() == whole
        assert done.json["metrics"] == {
            "done": 5, "failed": 1, "total": 5, "resumed": whole[:size].count(b"\n"),
        }  # fmt: skip


def test_results_of_other_runs_never_mix(run: Runner) -> None:
    batch(run, [{"prompt": "a"}])
    before = (run.home / "out.jsonl").read_bytes()
    for lines, args in [
        ([{"prompt": "b"}], ()),
        ([{"prompt": "a"}], ("--temp", "0.1")),
        ([{"prompt": "a"}], ("--chat",)),
        ([{"prompt": "a"}], ("--top-logprobs", "1")),
    ]:
        done = batch(run, lines, *args)
        assert done.code == 5 and "out.jsonl:1: made from another" in done.err
    (run.home / "in.jsonl").write_text('{"prompt": "a"}\n')
    (run.home / "notes.txt").write_text("dear diary\n")
    done = run("generate", "--jsonl", "in.jsonl", "--out", "notes.txt")
    assert done.code == 5 and "notes.txt:1: not a result of a batch" in done.err
    assert (run.home / "notes.txt").read_text() == "dear diary\n"
    assert (run.home / "out.jsonl").read_bytes() == before


def test_two_runs_on_one_file(run: Runner) -> None:
    fcntl = pytest.importorskip("fcntl")
    (run.home / "in.jsonl").write_text('{"prompt": "a"}\n')
    with open(run.home / "out.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = run("generate", "--jsonl", "in.jsonl", "--out", "out.jsonl")
    assert done.code == 5 and "another run is writing to it" in done.err


def test_ctrl_c_in_a_batch_loses_nothing(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from steersman.tui import generation

    calls = iter(range(10))
    original = generation.run

    def interrupted(*args: Any, cancel: Any, **options: Any) -> Any:
        if next(calls) == 2:
            cancel.set()
        return original(*args, cancel=cancel, **options)

    monkeypatch.setattr(generation, "run", interrupted)
    lines = [{"prompt": f"p{i}"} for i in range(4)]
    done = batch(run, lines, "--json", "--seed", "1")
    assert done.code == 130 and done.json["status"] == "cancelled"
    assert len(read(run)) == 2 and "goes on from here" in done.err
    assert batch(run, lines, "--seed", "1").code == 0
    assert len(read(run)) == 4


def test_missing_input_and_unwritable_output(run: Runner) -> None:
    assert run("generate", "--jsonl", "nope.jsonl").code == 4
    done = batch(run, [{"prompt": "a"}], out="no/such/folder.jsonl")
    assert done.code == 5 and "cannot be written" in done.err
