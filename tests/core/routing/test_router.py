"""R2R's network, threshold, labels and file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman.core.array import to_numpy
from steersman.core.errors import InvalidInput, MissingFile
from steersman.core.objectives import binary_cross_entropy
from steersman.core.ops import entropy, erf, gelu
from steersman.core.routing import (
    Router,
    RouterShape,
    choose_threshold,
    init_weights,
    router_logits,
)
from steersman.core.routing.labels import (
    answer_labels,
    judge_labels,
    last_number,
    mismatch_labels,
    parse_verdict,
)
from steersman.core.routing.router import read_router, save_router

# The worked example: two features, three logits, one block, identity projection.
UP = np.full((8, 2), 0.5)
UP[::2, 1] = -0.5
EXAMPLE = {
    "logits.weight": [[0.1, 0, 0], [0, 0.1, 0.1]],
    "combine.weight": [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]],
    "project.weight": np.eye(2),
    "blocks.0.up.weight": UP,
    "blocks.0.down.weight": np.full((2, 8), 0.25),
    "head.weight": [[1, 2]],
}
SHAPE = RouterShape(features=2, top=3, width=2, blocks=1)


def example(lib: Any) -> dict[str, Any]:
    weights = {}
    for name, size in SHAPE.parameters.items():
        value = EXAMPLE.get(name, np.ones(size) if name.endswith("norm.weight") else np.zeros(size))
        weights[name] = lib(value)
    return weights


def test_worked_network(lib: Any) -> None:
    logit = router_logits(example(lib), lib([2, 1, 0]), lib([1, -1]), lib([0.5, 0.5]))
    assert float(logit) == pytest.approx(-0.999991, abs=2e-6)
    assert 1 / (1 + math.exp(-float(logit))) == pytest.approx(0.268943, abs=1e-6)


def test_rows_are_independent(lib: Any) -> None:
    generator = np.random.default_rng(0)
    shape = RouterShape(features=6, top=5, width=8, blocks=2)
    weights = {name: lib(value) for name, value in init_weights(shape, seed=1).items()}
    rows = [generator.standard_normal((3, n)) for n in (5, 6, 6)]
    together = to_numpy(router_logits(weights, *map(lib, rows)))
    alone = [float(router_logits(weights, *(lib(r[i]) for r in rows))) for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_numbers_of_parameters() -> None:
    assert RouterShape(features=1536).size == 56_302_081
    assert RouterShape(features=576, width=128, blocks=2).size == 560_321
    shape = RouterShape(features=4, top=3, width=6, blocks=2)
    weights = init_weights(shape, seed=0)
    assert {n: w.shape for n, w in weights.items()} == shape.parameters


def test_activations(lib: Any) -> None:
    x = np.linspace(-4, 4, 33)
    expected = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(to_numpy(erf(lib(x))), expected, atol=2e-6)
    normal = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x]))
    np.testing.assert_allclose(to_numpy(gelu(lib(x))), x * normal, atol=5e-6)


def test_weighted_cross_entropy(lib: Any) -> None:
    logits, labels = lib([0.5, -1, 2]), lib([1, 0, 0])
    loss = binary_cross_entropy(logits, labels, positive_weight=2.0)
    assert float(loss) == pytest.approx(1.129448, abs=1e-6)
    assert np.isfinite(float(binary_cross_entropy(lib([900.0, -900.0]), lib([0, 1]))))


def test_entropy_of_the_example(lib: Any) -> None:
    assert float(entropy(lib([2, 1, 0, -1]))) == pytest.approx(0.947537, abs=1e-6)


def test_threshold_rule() -> None:
    probs = np.array([0.05, 0.2, 0.35, 0.4, 0.6, 0.9, 0.1, 0.8])
    labels = np.array([0, 0, 1, 0, 1, 1, 0, 1])
    found = choose_threshold(probs, labels)
    assert found.value == pytest.approx(0.20798, abs=1e-5)
    assert (found.recall, found.positive_rate) == (1.0, 0.625)
    # Out of reach: the highest recall.
    found = choose_threshold(np.array([0.001, 0.5]), np.array([1, 1]))
    assert found.recall == 0.5
    assert choose_threshold(np.array([0.3, 0.6]), np.array([0, 0])).positive_rate == 0.0


def test_labels_of_mismatch() -> None:
    labels = mismatch_labels(np.array([1, 2, 3]), [1, 5, 3])
    assert labels.divergent.tolist() == [0, 1, 0]
    assert labels.differs.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("1", 1), ("0.", 0), ("Answer: 1\n", 1), ("10", -1), ("0.5", -1), ("yes", -1), ("", -1)],
)
def test_verdicts(reply: str, verdict: int) -> None:
    assert parse_verdict(reply) == verdict


def test_last_number() -> None:
    assert last_number("It costs $1,250.50 in all.") == "1250.5"
    assert last_number("3 + 4 = 7.") == "7"
    assert last_number("none") is None


@pytest.mark.weights
def test_labels_by_trying_and_by_judging(llamacpp_model: Any) -> None:
    model = llamacpp_model
    prompt = model.tokenizer.encode("2 + 3 = 5\n4 + 4 = 8\n5 + 2 =")
    answer = model.tokenizer.encode(" 7\n")
    other = model.tokenizer.encode(" 9\n")
    choice = np.array([answer[0], other[1], answer[2]])
    assert other[1] != answer[1]
    found = answer_labels(model, prompt, answer, choice, max_tokens=1, checks=4)
    assert found.divergent.tolist() == [0, 1, 0]
    assert answer_labels(
        model, prompt, answer, choice, max_tokens=1, checks=0
    ).divergent.tolist() == [0, -1, 0]
    judged = judge_labels(model, model, prompt, answer, choice, max_tokens=4, checks=4)
    assert judged.divergent[1] in (-1, 0, 1)
    assert judged.divergent[[0, 2]].tolist() == [0, 0]


def router(**changes: Any) -> Router:
    fields: dict[str, Any] = {
        "shape": SHAPE,
        "weights": init_weights(SHAPE, seed=0),
        "threshold": 0.25,
        "small": "abc",
        "target": "def",
        "facts": {"auc": 0.75},
    }
    return Router(**{**fields, **changes})


def test_file_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "router.safetensors"
    made = router()
    save_router(made, path)
    read = read_router(path)
    assert (read.shape, read.threshold, read.small, read.target) == (SHAPE, 0.25, "abc", "def")
    assert read.facts == {"auc": 0.75}
    for name, value in made.weights.items():
        np.testing.assert_array_equal(read.weights[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["router.safetensors"]


def test_bad_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    with pytest.raises(MissingFile, match="steersman train r2r"):
        read_router(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(InvalidInput, match="steersman train r2r"):
        read_router(path)
    safetensors.save_file({"a": np.zeros(2, np.float32)}, path)
    with pytest.raises(InvalidInput, match="steersman train r2r"):
        read_router(path)
    weights = init_weights(SHAPE, seed=0)
    save_router(router(weights={**weights, "head.bias": np.zeros(3, np.float32)}), path)
    with pytest.raises(InvalidInput, match="do not fit"):
        read_router(path)
    save_router(router(weights={**weights, "head.bias": np.full(1, np.nan, np.float32)}), path)
    with pytest.raises(InvalidInput, match="finite"):
        read_router(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InvalidInput, match="safetensors"):
        read_router(path)


def test_training_learns_and_holds_out_whole_texts() -> None:
    pytest.importorskip("torch")
    from steersman.backends.torch.train_router import RouterTraining, train_router
    from steersman.core.validation import area_under_curve

    generator = np.random.default_rng(0)
    count, shape = 2400, RouterShape(features=8, top=6, width=32, blocks=1)
    hidden = generator.standard_normal((count, 8))
    labels = (hidden[:, 0] + 0.3 * generator.standard_normal(count) > 1).astype(np.int64)
    found = train_router(
        -np.sort(-generator.standard_normal((count, 6))), hidden,
        generator.standard_normal((count, 8)), labels, np.arange(count) // 24, shape,
        RouterTraining(learning_rate=3e-3, epochs=8, batch=256, validation=0.25),
    )  # fmt: skip
    assert found.auc > 0.9
    assert found.threshold.recall >= 0.95
    assert found.history[-1][2] < found.history[0][2]
    assert area_under_curve(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 1, 0, 1])) == 0.875
    with pytest.raises(InvalidInput, match="label 0 and with label 1"):
        train_router(
            hidden[:4, :6], hidden[:4], hidden[:4], np.zeros(4, np.int64), np.arange(4), shape,
            RouterTraining(),
        )  # fmt: skip
