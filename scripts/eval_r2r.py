#!/usr/bin/env python3
"""Measure token routing (R2R): what a text gains with the share of tokens from the large model.

    scripts/eval_r2r.py --router router.safetensors          # all three routers
    scripts/eval_r2r.py --prompts 40 --only sums

texts  continuations and answers: mean log-probability under the large model (what it thinks of the
       mixed text), and how many of the large model's own first greedy tokens are met
sums   additions after three examples: share of right answers

Arms: the small model alone, the large one alone, and the routers "entropy", "neural" and "random"
at the shares that --shares names. Thresholds are set on prompts that are not used afterwards. All
arms decode greedily.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import ORDER_SEED, openings, paired_table, parsed, parser, run_arms

from steersman.core import load, stream
from steersman.core.array import to_numpy
from steersman.core.decode.events import Finished, Note, Started
from steersman.core.model import Capability, Forward, Model
from steersman.core.ops import target_logprobs
from steersman.core.profile import Profile, load_profile

CALIBRATION = 8  # prompts that thresholds are set on, the last ones of the list
NEVER = 1e6


def additions() -> list[tuple[str, str]]:
    """Return (prompt, answer) of two-digit additions after three examples."""
    shuffler = random.Random(ORDER_SEED)
    found = []
    for _ in range(400):
        pairs = [(shuffler.randint(10, 49), shuffler.randint(10, 49)) for _ in range(4)]
        lines = [f"{a} + {b} = {a + b}" for a, b in pairs[:3]]
        a, b = pairs[3]
        found.append(("\n".join([*lines, f"{a} + {b} ="]), str(a + b)))
    return found


def written(
    large: Model, small: Model, prompt: Any, profile: Profile, tokens: int
) -> tuple[list[int], list[int], list[dict[str, Any]], str]:
    """Return prompt ids, generated ids, routing notes, and the text."""
    begun: list[int] = []
    notes: list[dict[str, Any]] = []
    for event in stream(
        large, prompt, profile=profile, max_tokens=tokens, models={"small": small}, seed=0
    ):
        if isinstance(event, Started):
            begun = list(event.prompt_token_ids)
        elif isinstance(event, Note) and "routed" in event.values:
            notes.append(dict(event.values))
        elif isinstance(event, Finished):
            return begun, list(event.token_ids), notes, event.text
    raise AssertionError


def likelihood(large: Model, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Return the mean log-probability of ``ids`` after ``prompt``, in nats per token."""
    if not ids:
        return float("nan")
    with large.session(needs=Capability.ALL_LOGITS, context=len(prompt) + len(ids) + 8) as session:
        if len(prompt) > 1:
            session.forward(Forward(keep=0, tokens=np.array([prompt[:-1]]), logits="none"))
        fed = np.array([[prompt[-1], *ids[:-1]]])
        out = session.forward(Forward(keep=len(prompt) - 1, tokens=fed, logits="all"))
        assert out.logits is not None
        return float(np.mean(to_numpy(target_logprobs(out.logits[0, ...], np.array(ids)))))


def main() -> None:
    made = parser(__doc__, out="eval_r2r.jsonl")
    made.add_argument("--only", nargs="+", choices=["texts", "sums"], default=["texts", "sums"])
    made.add_argument("--layers", default="0-9,20-29", help="of the small model")
    made.add_argument("--router", type=Path, help="trained for this pair (steersman train r2r)")
    made.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.3])
    made.add_argument("--tokens", type=int, default=64)
    args = parsed(made)
    options = {"backend": args.backend, "threads": args.threads, "context": 1024}
    base = load_profile("r2r").override({"temperature.t": 0})
    routers = {"entropy": base, "random": base.override({"r2r.router": "random"})}
    if args.router is not None:
        routers["neural"] = base.override({"r2r.router_file": str(args.router)})
    with (
        load(args.model, **options) as large,
        load(args.model, **options, layers=args.layers) as small,
    ):
        print(f"large {large.info.name}, small {small.info.name}, on {large.info.backend}")
        for name in args.only:
            prompts: list[Any] = openings(args.data) if name == "texts" else additions()
            held = prompts[-CALIBRATION:]
            length = args.tokens if name == "texts" else 4
            arms = {
                "small": base.override({"r2r.threshold": NEVER}),
                "large": base.override({"r2r.threshold": 0.0}),
            }
            for kind, profile in routers.items():
                silent = profile.override({"r2r.threshold": NEVER})
                scores = [
                    note["score"]
                    for prompt in held
                    for note in written(
                        large, small, prompt if name == "texts" else prompt[0], silent, length
                    )[2]
                ]
                for share in args.shares:
                    limit = float(np.quantile(scores, 1 - share)) if kind != "random" else 1 - share
                    arms[f"{kind} {share:g}"] = profile.override({"r2r.threshold": limit})

            def measure(
                model: Model, seed: int, prompt: Any, arm: str, _: Any,
                name: str = name, arms: dict[str, Profile] = arms, length: int = length,
            ) -> dict[str, float]:  # fmt: skip
                text = prompt if name == "texts" else prompt[0]
                begun, ids, notes, said = written(large, small, text, arms[arm], length)
                share = float(np.mean([n["routed"] == "target" for n in notes])) if notes else 0.0
                if name == "sums":
                    answer = said.split("\n")[0].strip()
                    return {"right": float(answer == prompt[1]), "share": share}
                own = written(large, small, text, arms["large"], length)[1]
                same = next((i for i, (a, b) in enumerate(zip(own, ids)) if a != b), min(
                    len(own), len(ids)))  # fmt: skip
                return {
                    "mean logprob": likelihood(large, begun, ids),
                    "same begin": same / max(len(own), 1),
                    "share": share,
                }

            records = run_arms(
                name, measure, list(arms), large, prompts[:-CALIBRATION], args,
                tokens=length, layers=args.layers, router=str(args.router),
            )  # fmt: skip
            figures = ("right", "share") if name == "sums" else (
                "mean logprob", "same begin", "share")  # fmt: skip
            paired_table(name, records, list(arms), figures)


if __name__ == "__main__":
    main()
