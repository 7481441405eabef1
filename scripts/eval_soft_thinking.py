#!/usr/bin/env python3
"""Measure what soft thoughts do on a model that was not trained for them.

    scripts/eval_soft_thinking.py                        # all three, small
    scripts/eval_soft_thinking.py --only accuracy --prompts 200

diversity   distinct traces of the heaviest tokens over 8 seeds, against tau_g (0: discrete)
cost        seconds per token of soft thoughts against plain sampling, same truncation
accuracy    GSM8K training questions: soft thoughts, discrete thoughts (tau_g 0) and plain sampling,
            with the same limits, so at most the same number of forward passes

Every finished measurement is a line in ``--out``; run the command again to go on after a stop.
Intervals are 95 % percentile bootstraps over prompts.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from evaluation import chats, paired_table, parsed, parser, run_arms, sums

from steersman.core import generate, load, stream
from steersman.core.decode.events import Finished, Note
from steersman.core.model import Model

SEEDS = 8
TAUS = ("0", "0.1", "0.25", "0.5", "1", "2", "4")
BARE = {"soft_thinking.begin": "", "soft_thinking.max_thoughts": None}


def diversity(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    """Count distinct traces; ``weight`` is the mean weight of the heaviest candidate."""
    overrides = BARE | {"soft_thinking.tau_g": float(arm)}
    traces, weights = [], []
    for i in range(SEEDS):
        events = stream(
            model, prompt, profile="soft-thinking", overrides=overrides,
            seed=args.seed + i, max_tokens=args.thoughts,
        )  # fmt: skip
        for event in events:
            if isinstance(event, Note) and "thought" in event.values:
                weights.append(event.values["thought"]["weights"][0])
            elif isinstance(event, Finished):
                traces.append(event.token_ids)
    return {
        "distinct": len(set(traces)),
        "distinct8": len({t[:8] for t in traces}),
        "distinct2": len({t[:2] for t in traces}),
        "weight": float(np.mean(weights)),
    }


def cost(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    """Time both arms in turn, three times each, and keep the fastest of each."""
    best: dict[str, float] = {}
    for _ in range(3):
        for name in ("sample", "soft"):
            overrides: dict[str, Any] = BARE if name == "soft" else {"strategy": "sample"}
            found = generate(
                model, prompt, profile="soft-thinking", overrides=overrides, seed=seed,
                max_tokens=args.thoughts,
            )  # fmt: skip
            each = found.timings.decode_s / max(len(found.token_ids), 1)
            best[name] = min(best.get(name, np.inf), each)
    return {
        "sample_ms": 1e3 * best["sample"],
        "soft_ms": 1e3 * best["soft"],
        "ratio": best["soft"] / best["sample"],
    }


def accuracy(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    messages, true = prompt
    tau = {"soft": 0.5, "discrete": 0.0}
    overrides: dict[str, Any] = {"strategy": "sample"}
    if arm in tau:
        overrides = {
            "soft_thinking.tau_g": tau[arm],
            "soft_thinking.max_thoughts": args.tokens // 2,
        }
    found = generate(
        model, messages, profile="soft-thinking", overrides=overrides, seed=seed,
        max_tokens=args.tokens,
    )  # fmt: skip
    answer = found.text.rpartition("</think>")[2]
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", answer)
    said = numbers[-1].replace(",", "").rstrip(".") if numbers else ""
    return {
        "right": float(said != "" and float(said) == float(true.replace(",", ""))),
        "tokens": len(found.token_ids),
        "calls": sum(found.timings.calls.values()),
    }


def main() -> None:
    made = parser(__doc__, out="eval_soft_thinking.jsonl")
    names = ("diversity", "cost", "accuracy")
    made.add_argument("--only", nargs="+", choices=names, default=list(names))
    made.add_argument("--thoughts", type=int, default=32, help="tokens, diversity and cost")
    made.add_argument("--tokens", type=int, default=256, help="tokens, experiment accuracy")
    args = parsed(made)
    with load(args.model, backend=args.backend, threads=args.threads, context=1024) as model:
        print(f"{model.info.name} on {model.info.backend}, seed {args.seed}")
        if "diversity" in args.only:
            records = run_arms(
                "diversity", diversity, TAUS, model, chats(args.data), args, tokens=args.thoughts
            )
            paired_table(
                "diversity", records, TAUS, ("distinct", "distinct8", "distinct2", "weight")
            )
        if "cost" in args.only:
            arms = ("both",)
            records = run_arms(
                "cost", cost, arms, model, chats(args.data), args, tokens=args.thoughts
            )
            paired_table("cost", records, arms, ("sample_ms", "soft_ms", "ratio"))
        if "accuracy" in args.only:
            arms = ("discrete", "soft", "sample")
            records = run_arms(
                "accuracy", accuracy, arms, model, sums(args.data), args, tokens=args.tokens
            )
            paired_table("accuracy", records, arms, ("right", "tokens", "calls"))


if __name__ == "__main__":
    main()
