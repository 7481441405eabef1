"""``steersman verify``: fit, score and rerank, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner
from toys import CHATML, ToyTransformer, byte_tokenizer

from steersman.core.verification import DeltaReader

LINES: list[dict[str, Any]] = [
    {
        "id": name,
        "prompt": f"{a} + {b} =",
        "level": 3,
        "responses": [
            {"response": f"<think>{a} and {b} make {c}</think> #### {c}", "correct": c == a + b}
            for c in (a + b, a + b + 1, a + b)
        ],
    }
    for name, a, b in (("one", 1, 2), ("two", 5, 5), ("three", 7, 1))
]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    runner = Runner(monkeypatch, tmp_path_factory.mktemp("home"))
    runner.use(lambda: ToyTransformer(layers=2, context=128, tokenizer=byte_tokenizer()))
    return runner


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def fit(cli: Runner, traces: Path, *more: str) -> Path:
    out = traces.with_name("c.safetensors")
    done = cli("verify", "fit", str(traces), "--out", str(out), *more)
    assert done.code == 0, done.err
    return out


def test_fit_score_and_rerank(cli: Runner, traces: Path, tmp_path: Path) -> None:
    out = fit(cli, traces)
    assert not list(tmp_path.glob("*.part"))
    found = cli("verify", "score", str(traces), "--centroids", str(out), "--json").json
    assert found["metrics"] == {"done": 3, "resumed": 0, "failed": 0}
    rows = [row for record in found["result"] for row in record["scores"]]
    assert len(rows) == 9
    for row in rows:
        right = row["success_distance"] < row["failure_distance"]
        assert row["verdict"] == ("correct" if right else "incorrect")
    ranked = cli("verify", "rerank", str(traces), "--centroids", str(out), "--vote", "1,3")
    records = [json.loads(line) for line in ranked.out.splitlines()]
    assert [r["id"] for r in records] == ["one", "two", "three"]
    for record in records:
        assert record["level"] == 3
        near = [c["success_distance"] for c in record["candidates"]]
        assert near == sorted(near)
        assert record["top"] == record["candidates"][0]["index"]
        assert record["votes"]["1"]["answer"] == record["candidates"][0]["answer"]
        assert record["votes"]["3"]["answer"] in ("3", "10", "8")
    piped = cli(
        "verify", "rerank", "-", "--centroids", str(out), "--vote", "1,3",
        stdin=traces.read_bytes(),
    )  # fmt: skip
    assert piped.out == ranked.out


def test_a_stopped_job_loses_nothing(
    cli: Runner, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(cli, traces).read_bytes()
    out, read = tmp_path / "again.safetensors", DeltaReader.read
    calls = []

    def stops(self: DeltaReader, span: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(self, span)

    monkeypatch.setattr(DeltaReader, "read", stops)
    arguments = ("verify", "fit", str(traces), "--out", str(out))
    assert cli(*arguments).code == 130
    assert not out.exists()
    calls.clear()
    calls.extend([1] * 10)
    other = cli(*arguments, "--span", "response")
    assert other.code == 5
    assert "begun with other traces, model or settings" in other.err
    assert cli(*arguments).code == 0
    assert len(calls) == 10 + 6  # the first problem was kept
    assert out.read_bytes() == whole
    results = tmp_path / "scores.jsonl"
    score = ("verify", "score", str(traces), "--centroids", str(out), "--out", str(results))
    calls.clear()
    assert cli(*score).code == 130
    kept = results.read_text()
    assert kept.count("\n") == 1
    results.write_text(kept + '{"id": "tw')  # what a kill leaves
    done = cli(*score, "--json").json
    assert done["metrics"] == {"done": 3, "resumed": 1, "failed": 0}
    assert results.read_text().startswith(kept)
    mixed = cli(*score, "--standardise")
    assert mixed.code == 5
    assert "made with other input, model or settings" in mixed.err


def test_bad_lines_are_reported_and_the_rest_goes_on(cli: Runner, traces: Path) -> None:
    out = fit(cli, traces)
    bad = [
        "{",
        '{"prompt": "x"}',
        '{"prompt": "x", "response": "<think>a</think>", "correct": 1}',
        json.dumps({"prompt": "x", "response": f"<think>{'a' * 200}</think>"}),
        '{"id": "good", "prompt": "x", "response": "<think>a</think>"}',
        '{"id": "good", "prompt": "x", "response": "<think>a</think>"}',
    ]
    traces.write_text("\n".join(bad) + "\n")
    found = cli("verify", "score", str(traces), "--centroids", str(out), "--json")
    assert found.code == 7
    said = [e["message"] for e in found.json["errors"]]
    for number, part in enumerate(
        ("not JSON", "response or responses", "correct: must be", "context holds 128"), start=1
    ):
        assert f"traces.jsonl:{number}: " in said[number - 1]
        assert part in said[number - 1]
    assert "was used at" in said[4]
    assert [r["id"] for r in found.json["result"]] == ["good"]


def test_traces_without_a_span(cli: Runner, traces: Path) -> None:
    out = fit(cli, traces)
    line = {"prompt": "x", "responses": ["no tags #### 3", "<think>a</think> #### 4"]}
    traces.write_text(json.dumps(line) + "\n")
    found = cli("verify", "rerank", str(traces), "--centroids", str(out)).out
    record = json.loads(found)
    assert [c["index"] for c in record["candidates"]] == [1, 0]
    assert record["candidates"][1]["success_distance"] is None
    scored = json.loads(cli("verify", "score", str(traces), "--centroids", str(out)).out)
    assert scored["scores"][0] == {"answer": "3", "span": False, "verdict": "incorrect"}


def test_refusals(cli: Runner, traces: Path, tmp_path: Path) -> None:
    out = fit(cli, traces)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML + "x"
    cli.use(lambda: ToyTransformer(layers=2, context=128, tokenizer=tokenizer))
    other = cli("verify", "score", str(traces), "--centroids", str(out))
    assert other.code == 2
    assert "c.safetensors: made with template" in other.err
    cases = [
        (("fit", str(traces), "--out", "c.bin"), 2, "must end in .safetensors"),
        (("fit", str(traces), "--out", str(out)), 2, "exists"),
        (("fit", "nowhere.jsonl", "--out", "d.safetensors"), 4, "nowhere.jsonl"),
        (("score", str(traces), "--centroids", "no.safetensors"), 4, "no such file"),
        (("rerank", str(traces), "--centroids", str(out), "--vote", "0"), 2, "--vote"),
        (("score", "-", "--centroids", str(out), "--out", "x"), 2, "needs a file"),
    ]
    for arguments, code, said in cases:
        found = cli("verify", *arguments)
        assert (found.code, said in found.err) == (code, True), (arguments, found.err)
    one_sided = [dict(line, responses=line["responses"][:1]) for line in LINES]
    traces.write_text("".join(json.dumps(line) + "\n" for line in one_sided))
    empty = cli("verify", "fit", str(traces), "--out", str(tmp_path / "e.safetensors"))
    assert empty.code == 5
    assert "got 3 right and 0 wrong" in empty.err
