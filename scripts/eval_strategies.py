#!/usr/bin/env python3
"""Measure what the decoding strategies do to real texts; every comparison is paired by prompt.

    scripts/eval_strategies.py                                   # all four, small
    scripts/eval_strategies.py --only dola --prompts 200
    scripts/eval_strategies.py --only repetition --prompts 32 --tokens 100 --out more.jsonl

repetition  repetition and likelihood of continuations: greedy, contrastive and three samplers
beam        log-probability of the text that beam search finds, against greedy
best-of-n   log-probability of the best of four samples, against one of them
dola        TruthfulQA MC1: choices scored by DoLa's contrast of layers, against the model as it is

Prompts come in one fixed random order, so ``--prompts N`` takes the first N. Every finished
measurement is a line in ``--out``; run the command again to go on after a stop, or with a larger
``--prompts`` to extend. Intervals are 95 % percentile bootstraps over prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import (
    ORDER_SEED,
    Experiment,
    Record,
    column,
    interval,
    measured,
    openings,
    paired_table,
    parsed,
    parser,
    run_arms,
    show,
)

from steersman.core import load
from steersman.core.array import array_namespace, to_numpy
from steersman.core.decode.dola import DoLa, contrast_layers
from steersman.core.model import Capability, Forward, Model
from steersman.core.ops import log_softmax

PROFILES = ("greedy", "contrastive", "balanced", "creative", "mirostat")


def multiple_choice(data: Path) -> list[Any]:
    """Return TruthfulQA's (question, choices, index of the true one)."""
    rows = json.loads((data / "truthfulqa" / "mc_task.json").read_text(encoding="utf-8"))
    found = []
    for row in rows:
        choices = list(row["mc1_targets"])
        found.append((row["question"], choices, list(row["mc1_targets"].values()).index(1)))
    random.Random(ORDER_SEED).shuffle(found)
    return found


def choice_scores(model: Model, question: str, choices: Sequence[str]) -> dict[str, list[float]]:
    """Return each choice's total log-probability, as it is and under DoLa's contrast.

    ``relative_top`` is 0 here: with a threshold, one implausible token would rule out a choice.
    The contrasted scores are normalised, as they are when a token is drawn from them.
    """
    depth = model.info.layers
    arms = {name: DoLa(layers=name).candidates(depth) for name in ("low", "high")}
    layers = tuple(sorted({layer for chosen in arms.values() for layer in chosen}))
    needs = Capability.ALL_LOGITS | Capability.HIDDEN | Capability.HEAD
    prompt = model.tokenizer.encode(f"Q: {question}\nA:")
    if model.tokenizer.add_bos and model.tokenizer.bos_id is not None:
        prompt.insert(0, model.tokenizer.bos_id)
    totals: dict[str, list[float]] = {"plain": [], **{name: [] for name in arms}}
    with model.session(needs=needs, context=len(prompt) + 128) as session:
        if len(prompt) > 1:
            session.forward(Forward(keep=0, tokens=np.array([prompt[:-1]]), logits="none"))
        for choice in choices:
            ids = model.tokenizer.encode(" " + choice)
            fed = np.array([[prompt[-1], *ids[:-1]]])
            ask = Forward(keep=len(prompt) - 1, tokens=fed, logits="all", hidden=layers)
            out = session.forward(ask)
            assert out.logits is not None
            early = {layer: model.head(out.hidden[layer][0, ...]) for layer in layers}
            xp = array_namespace(out.logits)
            sums = dict.fromkeys(totals, 0.0)
            for at, token in enumerate(ids):
                last = out.logits[0, at, :]
                scores = {"plain": last}
                for name, chosen in arms.items():
                    lenses = xp.stack([early[layer][at, :] for layer in chosen])
                    scores[name] = contrast_layers(last, lenses, 0.0)
                for name, score in scores.items():
                    sums[name] += float(to_numpy(log_softmax(score)[token]))
            for name, total in sums.items():
                totals[name].append(total)
    return totals


# -- experiments: (prompt number, prompt) to figures per arm ---------------------------------------


def repetition(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    return measured(model, prompt, profile=arm, seed=seed, max_tokens=args.tokens)


def beam(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    return measured(model, prompt, profile=arm, seed=seed, max_tokens=args.short)


def best_of_n(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    n = 4 if arm == "best of 4" else 1
    options = {"overrides": {"best_of_n.n": n}, "seed": seed, "max_tokens": args.short}
    return measured(model, prompt, profile="best-of-n", **options)


def dola(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    question, choices, true = prompt
    totals = choice_scores(model, question, choices)
    return {name: float(np.argmax(t) == true) for name, t in totals.items()} | {
        "chance": 1 / len(choices)
    }


EXPERIMENTS: dict[str, tuple[Experiment, tuple[str, ...]]] = {
    "repetition": (repetition, PROFILES),
    "beam": (beam, ("greedy", "beam")),
    "best-of-n": (best_of_n, ("one", "best of 4")),
    "dola": (dola, ("all",)),
}


# -- printing --------------------------------------------------------------------------------------


def report(name: str, records: Sequence[Record]) -> None:
    """Print means and paired differences with intervals."""
    if name != "dola":
        figures = {"repetition": ("rep4", "distinct2", "mean"), "beam": ("sum", "mean", "rep4")}
        paired_table(
            name, records, EXPERIMENTS[name][1], (*figures.get(name, ("mean", "rep4")), "tokens")
        )
        return
    arms = {arm: column(records, "all", arm) for arm in ("plain", "low", "high", "chance")}
    rows = []
    for arm, values in arms.items():
        against = [v - arms["plain"][p] for p, v in values.items()]
        rows.append([arm, interval(list(values.values())), interval(against)])
    count = len({r["prompt"] for r in records})
    show(f"dola: TruthfulQA MC1, {count} questions", ("scores", "accuracy", "- plain"), rows)


def main() -> None:
    made = parser(__doc__, out="eval_strategies.jsonl")
    made.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    made.add_argument("--tokens", type=int, default=100, help="tokens, experiment repetition")
    made.add_argument("--short", type=int, default=24, help="tokens, beam and best-of-n")
    args = parsed(made)
    lengths = {"repetition": args.tokens, "dola": 0}
    with load(args.model, backend=args.backend, threads=args.threads, context=1024) as model:
        print(f"{model.info.name} on {model.info.backend}, seed {args.seed}")
        for name in args.only:
            prompts = multiple_choice(args.data) if name == "dola" else openings(args.data)
            function, arms = EXPERIMENTS[name]
            tokens = lengths.get(name, args.short)
            report(name, run_arms(name, function, arms, model, prompts, args, tokens=tokens))


if __name__ == "__main__":
    main()
