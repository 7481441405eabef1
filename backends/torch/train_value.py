"""Training of value heads on torch: squared error on the values of prefixes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman.core.errors import InvalidInput, UsageError
from steersman.core.objectives import token_value_loss
from steersman.core.validation import area_under_curve, hold_out
from steersman.core.values import ValueShape, head_values, init_weights
from steersman.core.values.features import ValueDataset

from .load import set_threads


@dataclass(frozen=True, kw_only=True)
class ValueTraining:
    """Settings of the training of a head on fixed hidden states.

    Parameters
    ----------
    learning_rate, weight_decay : float
        Of AdamW, with a linear decay to 0 over all epochs.
    batch : int
        Rows (prefixes with a label) per step.
    epochs : int
    dropout : float
        Before the last layer; the predecessor's released head has 0.2.
    validation : float
        Share of the questions that is held out; the epoch that does best there is kept.
    seed : int
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 256
    epochs: int = 40
    dropout: float = 0.2
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}: must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainedValue:
    """What training gives.

    Attributes
    ----------
    weights : dict of name to float32 array
        Of the epoch with the lowest error on held-out questions.
    error : float
        Mean squared error there, against the share of right texts among those of the same prefix.
    constant : float
        That error of the best constant: what a head that knows nothing gets.
    auc : float
        Chance that a token of a right text scores above one of a wrong text there.
    history : list of (epoch, training loss, held-out error)
    """

    weights: dict[str, np.ndarray]
    error: float
    constant: float
    auc: float
    history: list[tuple[int, float, float]] = field(repr=False)


def train_value(
    data: ValueDataset,
    shape: ValueShape,
    settings: ValueTraining,
    folder: Path | None = None,
    *,
    job: Any = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, float, float], None] = lambda *_: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> TrainedValue | None:
    """Train a head; what ``folder`` holds of the same training goes on with the same losses.

    Parameters
    ----------
    data : ValueDataset
    shape : ValueShape
    settings : ValueTraining
    folder : Path, optional
        For ``checkpoint.safetensors``, written after every epoch; none is kept if None.
    job : JSON value
        What the data hangs on; a checkpoint of another job is refused.
    device : str
    threads : int, optional
        CPU threads; ``$STEERSMAN_THREADS`` or torch's choice if None.
    progress : callable
        Called with (epoch, training loss, held-out error).
    cancelled : callable
        Polled between epochs.

    Returns
    -------
    TrainedValue or None
        None when cancelled.

    Raises
    ------
    InvalidInput
        Too few questions, or all texts right, or all wrong.
    UsageError
        The folder holds another training.
    """
    mean_value = float(np.average(data.values, weights=data.counts))
    if not 0 < mean_value < 1:
        raise InvalidInput(
            f"value head: all texts are {'right' if mean_value else 'wrong'}; nothing can be "
            "learned from them; take other questions"
        )
    set_threads(threads)
    held = _held_out(data, settings)
    place = torch.device(device)
    hidden = torch.as_tensor(data.hidden).to(place)
    nodes = torch.as_tensor(data.nodes)
    labels, weights = (torch.as_tensor(a).to(place) for a in (data.labels, data.weights))
    training = torch.as_tensor(np.flatnonzero(~held[data.nodes]))
    inside = data.hidden[~held]
    head = {
        name: torch.tensor(value, device=place, requires_grad=True)
        for name, value in init_weights(
            shape,
            seed=settings.seed,
            mean=inside.mean(axis=0, dtype=np.float64),
            deviation=inside.std(axis=0, dtype=np.float64),
            offset=mean_value,
        ).items()
    }
    # The scale of the hidden states is a property of the model, not something to shrink.
    decayed = [v for n, v in head.items() if n in ("weight", "hidden.weight")]
    rest = [v for n, v in head.items() if n not in ("weight", "hidden.weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    facts = {"settings": asdict(settings), "shape": asdict(shape), "job": job}
    best = {name: value.detach().clone() for name, value in head.items()}
    history = [] if folder is None else _resume(folder, facts, head, best, optimizer)

    def drop(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, settings.dropout)

    def outputs(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = head_values(head, hidden[torch.as_tensor(rows)]).cpu().numpy()
        return found

    watched = np.flatnonzero(held if held.any() else ~held)
    steps = -(-len(training) // settings.batch)
    for epoch in range(len(history), settings.epochs):
        if cancelled():
            return None
        torch.manual_seed(settings.seed * 1_000_003 + epoch)  # order and dropout
        order = training[torch.randperm(len(training))]
        losses = []
        for step, rows in enumerate(order.split(settings.batch)):
            done = (epoch * steps + step) / (settings.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - done)
            optimizer.zero_grad()
            values = head_values(head, hidden[nodes[rows].to(place)], drop=drop)
            at = rows.to(place)
            loss = token_value_loss(values, labels[at], weights[at])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        error = _error(outputs(watched), data, watched)
        if not history or error < min(entry[2] for entry in history):
            best = {name: value.detach().clone() for name, value in head.items()}
        history.append((epoch + 1, float(np.mean(losses)), error))
        progress(*history[-1])
        if folder is not None:
            _save(folder, facts, head, best, optimizer, history)
    with torch.no_grad():
        for name, value in best.items():
            head[name].copy_(value)
    found = outputs(watched)
    constant = float(np.average(data.values[watched], weights=data.counts[watched]))
    return TrainedValue(
        weights={name: value.cpu().numpy().copy() for name, value in best.items()},
        error=_error(found, data, watched),
        constant=_error(np.full(len(watched), constant, np.float32), data, watched),
        auc=_auc(found, data, watched),
        history=history,
    )


def _held_out(data: ValueDataset, settings: ValueTraining) -> np.ndarray:
    """Return for every prefix whether its question is held out."""
    held = hold_out(
        data.questions,
        settings.validation,
        seed=settings.seed,
        too_few="value head: needs at least two questions; add some",
    )
    return held if settings.validation else np.zeros_like(held)


def _error(values: np.ndarray, data: ValueDataset, nodes: np.ndarray) -> float:
    errors = (values.astype(np.float64) - data.values[nodes]) ** 2
    return float(np.average(errors, weights=data.counts[nodes]))


def _auc(values: np.ndarray, data: ValueDataset, nodes: np.ndarray) -> float:
    """Return the area under the ROC curve over tokens: a prefix counts as often as it was drawn."""
    right = np.rint(data.values[nodes] * data.counts[nodes]).astype(np.int64)
    wrong = np.rint(data.counts[nodes]).astype(np.int64) - right
    scores = np.concatenate([np.repeat(values, right), np.repeat(values, wrong)])
    return area_under_curve(scores, np.repeat([1, 0], [int(right.sum()), int(wrong.sum())]))


def _save(
    folder: Path,
    facts: Any,
    head: dict[str, Tensor],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    history: list[tuple[int, float, float]],
) -> None:
    arrays = {f"head.{n}": v.detach() for n, v in head.items()}
    arrays |= {f"best.{n}": v for n, v in best.items()}
    for name, value in head.items():
        arrays |= {f"{key}.{name}": v for key, v in optimizer.state[value].items()}
    part = folder / "checkpoint.part"
    save_file(
        {n: a.cpu().contiguous() for n, a in arrays.items()},
        part,
        metadata={"training": json.dumps({"facts": facts, "history": history})},
    )
    os.replace(part, folder / "checkpoint.safetensors")


def _resume(
    folder: Path,
    facts: Any,
    head: dict[str, Tensor],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[tuple[int, float, float]]:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return []
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            held = json.loads((file.metadata() or {})["training"])
        arrays = load_file(path)
        if held["facts"] != json.loads(json.dumps(facts)):
            raise UsageError(
                f"{path}: belongs to a training with other settings or data; delete it, or use "
                "another folder"
            )
        with torch.no_grad():
            for name, value in head.items():
                value.copy_(arrays[f"head.{name}"])
                best[name].copy_(arrays[f"best.{name}"])
                optimizer.state[value] = {
                    key: arrays[f"{key}.{name}"].to(value.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return [(int(e), float(loss), float(error)) for e, loss, error in held["history"]]
    except UsageError:
        raise
    except Exception as error:
        raise InvalidInput(f"{path}: damaged ({error}); delete it to begin anew") from None
