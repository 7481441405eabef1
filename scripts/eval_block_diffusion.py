#!/usr/bin/env python3
"""Passes per text and exact answers of block diffusion, on the model of train_tiny_block.py.

    scripts/train_tiny_block.py && scripts/eval_block_diffusion.py --prompts 400

Each prompt is a sorting task that the model was trained on, with letters of its own. The fair
baseline of credit is not the same threshold without it, but a lower one that takes as few passes:
after the table, each credit is compared with the threshold whose mean number of passes is nearest.
All arms are greedy. Intervals are 95 % percentile bootstraps over prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from evaluation import ROOT, Record, column, interval, paired_table, parsed, parser, run_arms, show
from train_tiny_block import ANSWER, task

from steersman.core import generate, load
from steersman.core.model import Model

Arm = dict[str, Any]
THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4)
PAPER = {"alpha": 0.65, "beta": 0.7, "gamma": 0.2}
CODE = {"alpha": 0.7, "beta": 0.8, "gamma": 0.2}
ARMS: dict[str, Arm] = {
    "one per pass": {"algorithm": "origin"},
    "left to right": {"block_length": 1},
    **{f"threshold {t}": {"threshold": t} for t in THRESHOLDS},
    "credit": {"threshold": 0.9, "credit": PAPER},
    "credit, code's": {"threshold": 0.9, "credit": CODE},
    "credit, tuning-free": {"threshold": 0.9, "credit": "tuning_free"},
}
CREDITS = [name for name in ARMS if name.startswith("credit")]
PLAIN = [name for name in ARMS if name.startswith("threshold")]


def tasks(count: int) -> list[tuple[str, str]]:
    """Return prompts and answers that training did not draw from the same seed."""
    rng = random.Random("evaluation")
    return [task(rng) for _ in range(count)]


def sorting(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    question, answer = prompt
    settings = {"block_length": ANSWER, **ARMS[arm]}
    found = generate(
        model,
        question,
        profile="block-diffusion",
        overrides={f"block_diffusion.{key}": value for key, value in settings.items()},
        seed=seed,
        max_tokens=ANSWER,
    )
    right = sum(a == b for a, b in zip(found.text, answer))
    return {
        "exact": float(found.text == answer),
        "letters right": right / len(answer),
        "calls": found.timings.calls.get("target", 0),
        "seconds": found.timings.decode_s,
    }


def matched(records: Sequence[Record]) -> None:
    """Compare each credit with the threshold that takes as many passes."""

    def calls(arm: str) -> float:
        values = column(records, arm, "calls")
        return sum(values.values()) / len(values)

    rows = []
    for arm in CREDITS:
        other = min(PLAIN, key=lambda plain: abs(calls(plain) - calls(arm)))
        row = [arm, other]
        for figure in ("calls", "exact", "letters right"):
            mine, theirs = column(records, arm, figure), column(records, other, figure)
            row.append(interval([mine[p] - theirs[p] for p in mine]))
        rows.append(row)
    header = ("arm", "as many passes", "calls", "exact", "letters right")
    show("credit less the threshold that takes as many passes", header, rows)


def main() -> None:
    made = parser(__doc__, out="eval_block_diffusion.jsonl")
    made.set_defaults(model=str(ROOT / "out" / "tiny-block"), backend="torch", prompts=200)
    args = parsed(made)
    with load(args.model, backend=args.backend, threads=args.threads) as model:
        print(f"{model.info.name} on {model.info.backend}, {args.prompts} sorting tasks")
        arms = list(ARMS)
        records = run_arms("sorting", sorting, arms, model, tasks(args.prompts), args)
        paired_table("sorting", records, arms, ("calls", "exact", "letters right"))
        matched(records)


if __name__ == "__main__":
    main()
