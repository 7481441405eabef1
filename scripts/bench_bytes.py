#!/usr/bin/env python3
"""What a byte costs, against a plain token: calls, rows and time, in one process per engine.

    scripts/bench_bytes.py                             # every installed engine
    scripts/bench_bytes.py --backend llamacpp --negligible 0.01 0.001 0.0001

Each round times plain sampling, the byte-level strategy and the cover strategy on the same prompts,
one after the other, so that a busy machine slows all alike; ratios are medians over rounds. A token
step is one call of plain sampling; "per byte of plain" is that over the bytes of a token. The first
round is not counted: it fills what is remembered of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from steersman.core import generate, load
from steersman.core.backend import installed_backends
from steersman.core.decode import ByteLevel, Cover, Sample
from steersman.core.model import Model
from steersman.core.profile import Profile

PROMPTS = (
    "The history of the Roman Empire begins with the foun",
    "Once upon a time there was a little girl who liv",
    "def fibonacci(n):\n    if n <= 1:\n        ret",
)
BYTES = 120
TOKENS = 30


def measured(model: Model, strategy: Any, size: int, seed: int) -> dict[str, float]:
    """Return time, calls and sizes of one text per prompt, summed."""
    total = dict.fromkeys(("seconds", "bytes", "tokens", "calls", "prefill"), 0.0)
    profile = Profile(name="bench", strategy_name="bench", strategy=strategy)
    for prompt in PROMPTS:
        found = generate(model, prompt, profile=profile, seed=seed, max_tokens=size)
        total["seconds"] += found.timings.decode_s
        total["prefill"] += found.timings.prefill_s
        total["bytes"] += sum(len(t.bytes) for t in found.tokens)
        total["tokens"] += len(found.tokens)
        total["calls"] += sum(found.timings.calls.values())
    return total


def rounds(model: Model, negligible: float, count: int) -> dict[str, float]:
    """Return medians over rounds."""
    found: list[dict[str, float]] = []
    for seed in range(count + 1):
        plain = measured(model, Sample(), TOKENS, seed)
        byte = measured(model, ByteLevel(negligible=negligible, temperature=0.8), BYTES, seed)
        cover = measured(model, Cover(negligible=negligible), TOKENS, seed)
        step = plain["seconds"] / max(plain["calls"], 1)
        each = byte["seconds"] / max(byte["bytes"], 1)
        if seed == 0:
            continue
        found.append(
            {
                "token step, ms": step * 1e3,
                "bytes per token": plain["bytes"] / plain["tokens"],
                "byte, ms": each * 1e3,
                "calls per byte": byte["calls"] / max(byte["bytes"], 1),
                "byte / token step": each / step,
                "byte / byte of plain": each / (plain["seconds"] / plain["bytes"]),
                "cover, more calls": (cover["calls"] - cover["tokens"]) / len(PROMPTS) + 1,
            }
        )
    return {key: float(np.median([f[key] for f in found])) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", nargs="+", default=installed_backends())
    parser.add_argument("--negligible", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="also append the figures to this file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for backend in args.backend:
        with load(args.model, backend=backend, threads=args.threads, context=512) as model:
            for negligible in args.negligible:
                figures = rounds(model, negligible, args.rounds)
                rows.append({"engine": backend, "negligible": negligible, **figures})
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = [v if isinstance(v, str) else f"{v:.3g}" for v in row.values()]
        print(f"| {' | '.join(cells)} |")
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
