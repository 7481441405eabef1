"""Training of CoIn's matching heads and of its verdict on torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from steersman.core.audit import Embedder, Heads, ask
from steersman.core.audit.heads import init_head, init_set, match_logit, set_logit
from steersman.core.audit.protocol import Receipt
from steersman.core.audit.traces import (
    INFLATIONS,
    Prepared,
    head_pairs,
    inflate,
    noise_blocks,
    seen_blocks,
)
from steersman.core.errors import InvalidInput
from steersman.core.objectives import binary_cross_entropy
from steersman.core.objectives.focal import focal_loss
from steersman.core.validation import area_under_curve

from .load import set_threads


@dataclass(frozen=True, kw_only=True)
class CoinTraining:
    """Settings of a training.

    Parameters
    ----------
    learning_rate : float
        Of Adam. The paper's 2e-5 is for tuning an encoder; here a projection is trained alone.
    batch, epochs : int
    gamma : float
        Of the focal loss.
    verdict_steps : int
        Full-batch steps of the set network; 0 trains none.
    rates : tuple of float
        Of the inflated traces that the set network learns from.
    false_alarms : float
        Share of honest held-out traces that the thresholds reject; as many as three times more
        are undecided at first.
    share, tokens : float, int
        What is asked for; see :func:`steersman.core.audit.ask`.
    centred : bool
        See :func:`steersman.core.audit.heads.init_head`.
    seed : int
    """

    learning_rate: float = 1e-3
    batch: int = 128
    epochs: int = 3
    gamma: float = 2.0
    verdict_steps: int = 300
    rates: tuple[float, ...] = (0.5, 1.0, 3.0)
    false_alarms: float = 0.05
    share: float = 0.1
    tokens: int = 16
    centred: bool = False
    seed: int = 42


Progress = Callable[[str, float], None]


def train_coin(
    traces: Sequence[Prepared],
    embedder: Embedder,
    settings: CoinTraining,
    *,
    threads: int | None = None,
    progress: Progress = lambda stage, loss: None,
) -> tuple[Heads, list[tuple[int, float, float]]]:
    """Train both heads and the verdict.

    Questions are split in three: 60 % for the heads, 20 % for the set network, 20 % for measures
    and thresholds.

    Parameters
    ----------
    traces : sequence of Prepared
        Of ten questions at least; those without reasoning are left out.
    embedder : Embedder
    settings : CoinTraining
    threads : int, optional
    progress : callable, optional
        Called after every epoch.

    Returns
    -------
    heads : Heads
    history : list of (step, training loss, validation loss) of the head for block and answer
    """
    set_threads(threads)
    traces = [t for t in traces if t.ids]
    first, second, third = split(traces, settings.seed)
    measures: dict[str, Any] = {"traces": len(traces), "seed": settings.seed}
    trained: dict[str, dict[str, np.ndarray]] = {}
    history: list[tuple[int, float, float]] = []
    names: tuple[Literal["tokens", "answer"], ...] = ("tokens", "answer")
    rng = np.random.default_rng(settings.seed)
    noise = noise_blocks(embedder, 256, block=traces[0].prints.block, rng=rng)
    for name in names:
        pairs = head_pairs(first, name, seed=settings.seed, sample=settings.tokens, noise=noise)
        held = head_pairs(third, name, seed=settings.seed + 1, sample=settings.tokens)
        trained[name], history = train_head(pairs, held, settings, progress=partial(progress, name))
        measures[f"auc_{name}"] = _auc(trained[name], held)
        untrained = init_head(pairs[1], centred=settings.centred)
        measures[f"auc_{name}_untrained"] = _auc(untrained, held)
    heads = Heads(**trained, embedder=embedder.facts)  # type: ignore[arg-type]
    if settings.verdict_steps:
        sets, labels = score_sets(heads, second, embedder, settings, rng)
        verdict = train_set(sets, labels, settings)
        heads = Heads(**trained, verdict=verdict, embedder=embedder.facts)  # type: ignore[arg-type]
        progress("verdict", float("nan"))
    return _with_thresholds(heads, third, settings, measures), history


def split(traces: Sequence[Prepared], seed: int) -> tuple[list[Prepared], ...]:
    """Return 60, 20 and 20 % of the questions' traces."""
    questions = sorted({t.question for t in traces})
    if len(questions) < 10:
        raise InvalidInput(f"coin: needs traces of ten questions at least, got {len(questions)}")
    order = np.random.default_rng(seed).permutation(len(questions))
    part = {questions[q]: (i >= 0.6 * len(order)) + (i >= 0.8 * len(order))
            for i, q in enumerate(order)}  # fmt: skip
    return tuple([t for t in traces if part[t.question] == k] for k in range(3))


def train_head(
    pairs: Any, held: Any, settings: CoinTraining, *, progress: Callable[[float], None]
) -> tuple[dict[str, np.ndarray], list[tuple[int, float, float]]]:
    """Train one matching head on (left, right, labels)."""
    left, right, labels = (torch.as_tensor(a) for a in pairs)
    weights = {
        name: torch.tensor(value, requires_grad=name != "centre")
        for name, value in init_head(pairs[1], centred=settings.centred).items()
    }
    trainable = [w for w in weights.values() if w.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    history: list[tuple[int, float, float]] = []
    step = 0
    for _ in range(settings.epochs):
        losses = []
        for rows in torch.randperm(len(labels), generator=generator).split(settings.batch):
            optimizer.zero_grad()
            logits = match_logit(weights, left[rows], right[rows])
            loss = focal_loss(logits, labels[rows], gamma=settings.gamma)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        with torch.no_grad():
            a, b, truth = (torch.as_tensor(x) for x in held)
            measured = focal_loss(match_logit(weights, a, b), truth, gamma=settings.gamma)
        history.append((step, float(np.mean(losses)), float(measured)))
        progress(history[-1][1])
    return {name: w.detach().numpy().copy() for name, w in weights.items()}, history


def train_set(
    sets: Sequence[np.ndarray], labels: np.ndarray, settings: CoinTraining
) -> dict[str, np.ndarray]:
    """Train the set network: label 1 is an honest trace.

    Parameters
    ----------
    sets : sequence of float (n_i, 2)
    labels : (N,)
    """
    sizes = np.array([len(s) for s in sets])
    groups = [np.flatnonzero(sizes == n) for n in np.unique(sizes)]
    batches = [
        (torch.as_tensor(np.stack([sets[int(i)] for i in g]).astype(np.float32)),
         torch.as_tensor(labels[g].astype(np.float32)))
        for g in groups
    ]  # fmt: skip
    weights = {
        name: torch.tensor(value, requires_grad=True)
        for name, value in init_set(seed=settings.seed).items()
    }
    # Inflated traces outnumber honest ones; both shall weigh the same.
    ratio = float((1 - labels).sum() / max(labels.sum(), 1))
    optimizer = torch.optim.Adam(weights.values(), lr=1e-2)
    truth = torch.cat([y for _, y in batches])
    for _ in range(settings.verdict_steps):
        optimizer.zero_grad()
        logits = torch.cat([set_logit(weights, x) for x, _ in batches])
        loss = binary_cross_entropy(logits, truth, positive_weight=ratio)
        loss.backward()
        optimizer.step()
    return {name: w.detach().numpy().copy() for name, w in weights.items()}


def score_sets(
    heads: Heads,
    traces: Sequence[Prepared],
    embedder: Embedder,
    settings: CoinTraining,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return score pairs of honest and of inflated traces, as an auditor would see them."""
    sets, labels = [], []
    for place, trace in enumerate(traces):
        cases = [(trace.prints, 1)] + [
            (inflate(kind, rate, traces, place, embedder=embedder, rng=rng), 0)
            for kind in INFLATIONS
            for rate in settings.rates
        ]
        for prints, label in cases:
            seen = seen_blocks(prints, _ask(prints, settings, rng))
            sets.append(heads.pairs(seen, trace.answer)[0])
            labels.append(label)
    return sets, np.array(labels)


def _ask(prints: Any, settings: CoinTraining, rng: np.random.Generator) -> Any:
    receipt = Receipt(
        root=bytes(32), count=prints.count, block=prints.block, width=0, nonce=bytes(32),
        answer_hash=bytes(32), answer_tokens=0,
    )  # fmt: skip
    return ask(
        receipt, share=settings.share, tokens=settings.tokens, seed=int(rng.integers(1 << 62))
    )


def _with_thresholds(
    heads: Heads, traces: Sequence[Prepared], settings: CoinTraining, measures: dict[str, Any]
) -> Heads:
    rng = np.random.default_rng(settings.seed + 2)
    shown = [(seen_blocks(t.prints, _ask(t.prints, settings, rng)), t.answer) for t in traces]
    found = [heads.judge(*case) for case in shown]
    plain = [Heads().judge(*case) for case in shown]
    if heads.verdict is not None:
        values = {"honest": [v.honest for v in found if v.honest is not None]}
    else:
        values = {"tokens": [v.tokens for v in found], "answer": [v.answer for v in found]}
    rules = {
        **{name: (seen, 0.5 / len(values)) for name, seen in values.items()},
        "plain_tokens": ([v.tokens for v in plain], 0.25),
        "plain_answer": ([v.answer for v in plain], 0.25),
    }
    thresholds = {}
    for name, (scores, part) in rules.items():  # each may raise the alarm: they share it out
        low = settings.false_alarms * part
        thresholds[name] = float(np.quantile(scores, low))
        thresholds[f"{name}_clear"] = float(np.quantile(scores, min(1.0, 4 * low)))
    measures["settings"] = asdict(settings)
    return Heads(
        tokens=heads.tokens, answer=heads.answer, verdict=heads.verdict, thresholds=thresholds,
        embedder=heads.embedder, facts=measures,
    )  # fmt: skip


def _auc(weights: dict[str, np.ndarray], held: Any) -> float:
    left, right, labels = held
    return area_under_curve(np.asarray(match_logit(weights, left, right)), labels)
