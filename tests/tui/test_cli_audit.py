"""``steersman audit`` and ``train coin``: the whole exchange, honest and not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import Runner
from safetensors.numpy import load_file, save_file
from toys import ToyTransformer

REASONING = "add three and four, which is seven; seven is prime. " * 4
ANSWER = "The sum is seven."


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    runner = Runner(monkeypatch, tmp_path_factory.mktemp("home"))
    runner.use(lambda: ToyTransformer(layers=2, context=128))
    return runner


@pytest.fixture
def names(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "trace.json").write_text(json.dumps({"reasoning": REASONING, "answer": ANSWER}))
    (tmp_path / "answer.txt").write_text(ANSWER)
    files = ("trace.json", "answer.txt", "receipt.json", "opening.safetensors",
             "challenge.json", "proof.safetensors")  # fmt: skip
    return {Path(f).stem: str(tmp_path / f) for f in files}


def exchange(cli: Runner, names: dict[str, str], *more: str) -> None:
    for arguments in (
        ("commit", names["trace"], "--receipt", names["receipt"], "--opening", names["opening"],
         "--block", "16", *more),
        ("ask", names["receipt"], "--out", names["challenge"], "--seed", "1"),
        ("prove", names["opening"], "--challenge", names["challenge"], "--out", names["proof"]),
    ):  # fmt: skip
        done = cli("audit", *arguments)
        assert done.code == 0, done.err


def check(cli: Runner, names: dict[str, str], *more: str) -> Any:
    return cli(
        "audit", "check", names["receipt"], "--challenge", names["challenge"], "--proof",
        names["proof"], "--answer", names["answer"], *more, "--json",
    )  # fmt: skip


@pytest.mark.parametrize("layer", ["0", "2"])
def test_an_honest_exchange_passes(cli: Runner, names: dict[str, str], layer: str) -> None:
    exchange(cli, names, "--embedding-layer", layer)
    found = check(cli, names)
    assert found.code == 0, found.err
    assert found.json["result"]["outcome"] == "accept"
    assert found.json["result"]["faults"] == []
    receipt = Path(names["receipt"]).read_text()
    assert "three" not in receipt
    again = cli("audit", "ask", names["receipt"], "--out", names["challenge"])
    assert again.code == 2
    assert "exists" in again.err
    little = cli("audit", "prove", names["opening"], "--challenge", names["challenge"], "--out",
                 names["proof"], "--most", "3", "--overwrite")  # fmt: skip
    assert little.code == 2
    assert "more than 3" in little.err


def test_a_changed_exchange_is_rejected(cli: Runner, names: dict[str, str]) -> None:
    from safetensors import safe_open

    exchange(cli, names)
    proof = Path(names["proof"])
    whole, arrays = proof.read_bytes(), load_file(proof)
    with safe_open(proof, framework="numpy") as file:
        facts = file.metadata()
    for name, change in (("leaves", 2**-12), ("siblings", 1), ("indices", 1)):
        other = {k: v.copy() for k, v in arrays.items()}
        other[name].reshape(-1)[0] += np.asarray(change, other[name].dtype)
        save_file(other, proof, metadata=facts)
        found = check(cli, names)
        assert found.code == 5, name
        assert found.json["result"]["outcome"] == "reject"
        assert found.json["result"]["faults"]
    proof.write_bytes(whole)
    Path(names["answer"]).write_text(ANSWER + "\n")
    found = check(cli, names)
    assert found.code == 5
    assert "the answer is not the one" in found.json["result"]["faults"][0]
    Path(names["answer"]).write_text(ANSWER)
    receipt = json.loads(Path(names["receipt"]).read_text())
    Path(names["receipt"]).write_text(json.dumps(receipt | {"tokens": 400}))
    found = check(cli, names)
    assert found.code == 5
    assert "its digest does not fit" in found.err


def test_heads_from_the_command_line(cli: Runner, names: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(20):
        letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 4)
        text = "".join(rng.choice(letters, 80))
        lines.append({"question": f"q{i}", "reasoning": text[:60], "answer": text[60:]})
    traces, out = tmp_path / "t.jsonl", str(tmp_path / "h.safetensors")
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = ("train", "coin", "--traces", str(traces), "--block", "16", "--out", out)
    done = cli(*train, "--epochs", "1", "--verdict-steps", "5", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"]["traces"] == 20
    exchange(cli, names)
    found = check(cli, names, "--heads", out)
    result = found.json["result"]
    assert result["outcome"] in ("accept", "reject", "undecided")
    assert found.code == {"accept": 0, "reject": 5, "undecided": 7}[result["outcome"]]
    assert 0 <= result["honest"] <= 1
    assert cli(*train).code == 2
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    few = cli(*train, "--overwrite")
    assert few.code == 5
    assert "ten questions" in few.err


def test_files_that_are_something_else(cli: Runner, names: dict[str, str]) -> None:
    exchange(cli, names)
    good = Path(names["challenge"]).read_text()
    for text, said in (("[1]", "not a challenge"), ("{", "not JSON"), ("\xff", "")):
        Path(names["challenge"]).write_text(text)
        found = check(cli, names)
        assert found.code == 5
        assert said in found.err
    Path(names["challenge"]).write_text(good)
    Path(names["proof"]).write_bytes(Path(names["opening"]).read_bytes())
    found = check(cli, names)
    assert found.code == 5
    assert "made by steersman audit prove" in found.err
