"""Training of value heads: what they learn, and that a stopped training goes on alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from steersman.backends.torch.train_value import ValueTraining, train_value
from steersman.core.errors import InvalidInput, UsageError
from steersman.core.values import ValueShape, head_values
from steersman.core.values.features import ValueDataset

SHAPE = ValueShape(features=8)
QUICK = ValueTraining(epochs=12, batch=64, learning_rate=1e-2, dropout=0.0)


def dataset(questions: int = 30, each: int = 20, seed: int = 0) -> ValueDataset:
    """Values that are a linear function of hidden states on very different scales."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=(questions * each, 8))
    values = 1 / (1 + np.exp(-2 * clean[:, 0] + clean[:, 1]))
    counts = rng.integers(1, 9, len(clean)).astype(np.float32)
    values = np.rint(values * counts) / counts
    hidden = clean * [1, 100, 1, 0.01, 1, 5, 1, 1] + [0, 40, 0, 0, 3, 0, 0, 0]
    return ValueDataset(
        hidden=hidden.astype(np.float32),
        values=values.astype(np.float32),
        counts=counts,
        questions=np.repeat(np.arange(questions), each),
        nodes=np.arange(len(clean)),
        labels=values.astype(np.float32),
        weights=counts,
    )


@pytest.mark.parametrize("width", [0, 16])
def test_a_head_learns_what_there_is_to_learn(width: int) -> None:
    data = dataset()
    found = train_value(data, replace(SHAPE, width=width), QUICK)
    assert found is not None
    assert found.error < 0.35 * found.constant
    assert found.auc > 0.8
    assert found.error == pytest.approx(min(error for _, _, error in found.history))
    assert {n: w.shape for n, w in found.weights.items()} == replace(SHAPE, width=width).parameters
    values = head_values(found.weights, data.hidden)
    whole = float(np.average((values - data.values) ** 2, weights=data.counts))
    assert whole < 0.35 * found.constant


def test_outcomes_as_labels_are_learned_too() -> None:
    data = dataset()
    each = np.arange(len(data.hidden))
    right = np.rint(data.values * data.counts)
    weights = np.concatenate([right, data.counts - right]).astype(np.float32)
    outcome = replace(
        data,
        nodes=np.concatenate([each, each]),
        labels=np.repeat([1.0, 0.0], len(each)).astype(np.float32),
        weights=weights,
    )
    found = train_value(outcome, SHAPE, QUICK)
    assert found is not None
    assert found.error < 0.4 * found.constant  # measured against the values all the same


def test_a_stopped_training_goes_on_alike(tmp_path: Path) -> None:
    data, settings = dataset(), replace(QUICK, dropout=0.2)
    whole = train_value(data, SHAPE, settings, tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    polls = iter([False] * 5 + [True])
    assert train_value(data, SHAPE, settings, tmp_path, cancelled=lambda: next(polls)) is None
    epochs: list[int] = []
    again = train_value(data, SHAPE, settings, tmp_path, progress=lambda e, *_: epochs.append(e))
    assert epochs == list(range(6, 13))
    assert whole is not None
    assert again is not None
    assert again.history == whole.history
    for name, value in whole.weights.items():
        np.testing.assert_array_equal(again.weights[name], value)
    # All done: nothing is computed again.
    done = train_value(data, SHAPE, settings, tmp_path, progress=lambda *_: pytest.fail("again"))
    assert done is not None
    assert done.history == whole.history
    with pytest.raises(UsageError, match="other settings or data"):
        train_value(data, SHAPE, replace(settings, seed=1), tmp_path)
    with pytest.raises(UsageError, match="other settings or data"):
        train_value(data, SHAPE, settings, tmp_path, job={"layer": 3})
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InvalidInput, match="damaged"):
        train_value(data, SHAPE, settings, tmp_path)


def test_data_without_anything_to_learn() -> None:
    data = dataset()
    for value, said in ((1.0, "all texts are right"), (0.0, "all texts are wrong")):
        with pytest.raises(InvalidInput, match=said):
            train_value(replace(data, values=np.full_like(data.values, value)), SHAPE, QUICK)
    with pytest.raises(InvalidInput, match="two questions"):
        train_value(replace(data, questions=np.zeros_like(data.questions)), SHAPE, QUICK)
    with pytest.raises(UsageError, match="epochs"):
        ValueTraining(epochs=0)
    with pytest.raises(UsageError, match="validation"):
        ValueTraining(validation=1.0)
