"""Training of the R2R router on torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from steersman.core.errors import InvalidInput
from steersman.core.objectives import binary_cross_entropy
from steersman.core.routing import RouterShape, choose_threshold, init_weights, router_logits
from steersman.core.routing.threshold import Threshold
from steersman.core.validation import area_under_curve, hold_out

from .load import set_threads


@dataclass(frozen=True, kw_only=True)
class RouterTraining:
    """Settings; the defaults are those of the paper's released code.

    Parameters
    ----------
    learning_rate, weight_decay : float
        Of AdamW.
    batch : int
        Tokens per step.
    epochs, patience : int
        Most epochs; stop after this many validations (two per epoch) without a better loss.
    recall_factor : float
        Times the ratio of negatives to positives: weight of the positives.
    dropout : float
    recall : float
        That the threshold has to reach on the validation tokens.
    validation : float
        Share of the texts that is held out.
    seed : int
    """

    learning_rate: float = 5e-5
    weight_decay: float = 5e-4
    batch: int = 1024
    epochs: int = 50
    patience: int = 10
    recall_factor: float = 1.0
    dropout: float = 0.1
    recall: float = 0.95
    validation: float = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainedRouter:
    """What training gives.

    Attributes
    ----------
    weights : dict of name to float32 array
    threshold : Threshold
        Chosen on the held-out texts.
    auc : float
        Area under the ROC curve on them.
    history : list of (step, training loss, validation loss)
    """

    weights: dict[str, np.ndarray]
    threshold: Threshold
    auc: float
    history: list[tuple[int, float, float]] = field(repr=False)


def train_router(
    top_logits: np.ndarray,
    hidden: np.ndarray,
    embedding: np.ndarray,
    labels: np.ndarray,
    texts: np.ndarray,
    shape: RouterShape,
    settings: RouterTraining,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, float, float], None] | None = None,
) -> TrainedRouter:
    """Train a router.

    Parameters
    ----------
    top_logits : float (N, K)
    hidden, embedding : float (N, D)
    labels : int (N,)
        1: divergent, 0: not.
    texts : int (N,)
        Which text a token belongs to; whole texts are held out, never single tokens.
    shape : RouterShape
    settings : RouterTraining
    device : str
    threads : int, optional
        CPU threads; ``$STEERSMAN_THREADS`` or torch's choice if None.
    progress : callable, optional
        Called with (epoch, training loss, validation loss) at every validation.

    Raises
    ------
    InvalidInput
        Too few texts, or no token of one of the two labels.
    """
    if set(np.unique(labels)) != {0, 1}:
        raise InvalidInput("router: needs tokens with label 0 and with label 1; add texts")
    set_threads(threads)
    held = hold_out(
        texts,
        settings.validation,
        seed=settings.seed,
        too_few="router: needs at least two texts, to hold one out for validation",
    )
    place = torch.device(device)
    generator = torch.Generator().manual_seed(settings.seed)
    arrays = [torch.as_tensor(np.asarray(a, np.float32)) for a in (top_logits, hidden, embedding)]
    truth = torch.as_tensor(labels.astype(np.float32))
    training, validation = np.flatnonzero(~held), np.flatnonzero(held)
    positives = float(truth[training].sum())
    weight = settings.recall_factor * (len(training) - positives) / max(positives, 1.0)
    weights = {
        name: torch.tensor(value, device=place, requires_grad=True)
        for name, value in init_weights(shape, seed=settings.seed).items()
    }
    optimizer = torch.optim.AdamW(
        weights.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )

    def loss_of(rows: Any, drop: Any = None) -> torch.Tensor:
        x = [a[rows].to(place) for a in arrays]
        logits = router_logits(weights, *x, drop=drop)
        return binary_cross_entropy(logits, truth[rows].to(place), positive_weight=weight)

    def probabilities(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [
                torch.sigmoid(router_logits(weights, *(a[r].to(place) for a in arrays))).cpu()
                for r in torch.as_tensor(rows).split(4096)
            ]
        found: np.ndarray = torch.cat(parts).numpy()
        return found

    def validate() -> float:
        with torch.no_grad():
            parts = torch.as_tensor(validation).split(4096)
            total = sum(float(loss_of(rows)) * len(rows) for rows in parts)
        return total / len(validation)

    torch.manual_seed(settings.seed)  # dropout draws from the global generator
    history: list[tuple[int, float, float]] = []
    best, best_weights, worse, step = float("inf"), _copies(weights), 0, 0
    for epoch in range(settings.epochs):
        order = torch.as_tensor(training)[torch.randperm(len(training), generator=generator)]
        batches = order.split(settings.batch)
        marks = {(len(batches) + 1) // 2 - 1, len(batches) - 1}
        losses: list[float] = []
        for i, rows in enumerate(batches):
            optimizer.zero_grad()
            loss = loss_of(rows, lambda x: torch.nn.functional.dropout(x, settings.dropout))
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(float(loss.detach()))
            if i in marks:
                measured = validate()
                history.append((step, float(np.mean(losses)), measured))
                if progress is not None:
                    progress(epoch, history[-1][1], measured)
                if measured < best:
                    best, best_weights, worse = measured, _copies(weights), 0
                else:
                    worse += 1
        if worse >= settings.patience:
            break
    with torch.no_grad():
        for name, value in best_weights.items():
            weights[name].copy_(torch.as_tensor(value))
    probs = probabilities(validation)
    return TrainedRouter(
        weights=best_weights,
        threshold=choose_threshold(probs, labels[validation], recall=settings.recall),
        auc=area_under_curve(probs, labels[validation]),
        history=history,
    )


def _copies(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy().copy() for name, value in weights.items()}
