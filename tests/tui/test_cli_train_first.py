"""``steersman train first`` on a tiny model, and what it leaves for ``steersman rerank``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runner import Runner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parent.parent / "backends"))
from tiny_torch import write_tiny  # noqa: E402


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(monkeypatch, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path / "windows.jsonl"
    rows = [
        {"query": "largest", "passages": [f"number {n}" for n in p], "relevance": p}
        for p in (generator.permutation(9)[:4].tolist() for _ in range(8))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(tiny: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "first", "--data", str(data), "--out", str(out), "-m", str(tiny), "--threads", "1",
        "--accumulation", "2", "--steps", "3", "--warmup", "1", "--learning-rate", "1e-2",
        "--max-words", "5", "--max-length", "500", *more,
    ]  # fmt: skip


def test_an_adapter_and_reranking_with_it(
    cli: Runner, tiny: Path, data: Path, tmp_path: Path
) -> None:
    wording = tmp_path / "wording.yaml"
    wording.write_text('system: ""\nopening: "{query}"\nclosing: "Best:"\n')
    out = tmp_path / "first"
    more = ["--prompt-file", str(wording), "--lora-rank", "4", "--last-layers", "2", "--json"]
    found = cli(*arguments(tiny, data, out, *more))
    assert found.code == 0, found.err
    assert found.json["metrics"]["updates"] == 3
    losses = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert (out / "loss.svg").exists()
    note = json.loads((out / "adapter" / "steersman.json").read_text())
    assert note["rerank"] == {"window_size": 4, "max_words": 5}
    assert str(tiny.parent) not in (out / "adapter" / "adapter_config.json").read_text()
    again = cli(*arguments(tiny, data, out, *more))  # nothing is left to do
    assert again.code == 0, again.err
    assert [json.loads(x) for x in (out / "losses.jsonl").read_text().splitlines()] == losses
    other = cli(*arguments(tiny, data, out, *more, "--seed", "7"))
    assert other.code == 2
    assert "another seed" in other.err


def test_all_weights(cli: Runner, tiny: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "first"
    found = cli(*arguments(tiny, data, out, "--lora-rank", "0", "--loss", "listnet"))
    assert found.code == 0, found.err
    assert (out / "model" / "model.safetensors").exists()
    assert (out / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--loss", "hinge"], 2, "hinge"),
        (["--layers", "2"], 2, "do not go with train first"),
        (["--backend", "mlx"], 2, "training runs on torch"),
        (["--last-layers", "9"], 2, "--last-layers 9: the model has 3"),
        (["--max-length", "20"], 5, "no example fits"),
        (["--data", "absent.jsonl"], 4, "absent.jsonl"),
    ],
)
def test_bad_arguments(
    cli: Runner, tiny: Path, data: Path, tmp_path: Path, more: list[str], code: int, said: str
) -> None:
    found = cli(*arguments(tiny, data, tmp_path / "out", *more))
    assert found.code == code
    assert said in found.err
    assert not (tmp_path / "out" / "adapter").exists()


def test_two_processes_come_to_the_losses_of_one(
    cli: Runner, tiny: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    more = ["--lora-rank", "0", "--device", "cpu", "--quiet"]
    found = cli(*arguments(tiny, data, tmp_path / "alone", *more))
    assert found.code == 0, found.err
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run(
        [
            sys.executable, "-m", *launcher, "steersman.tui",
            *arguments(tiny, data, tmp_path / "together", *more),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    alone, together = (
        [json.loads(x) for x in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
        for name in ("alone", "together")
    )
    assert [line["step"] for line in together] == [1, 2, 3]
    for one, two in zip(alone, together):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
