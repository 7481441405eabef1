#!/usr/bin/env python3
"""Seconds per query of one-token reranking (first) against the generated permutation (generate).

Both methods see the same windows of the same passages, in turn, on one loaded model; the figure is
the median of the paired ratios. Passages are made of words drawn with a fixed seed, so that no
data is needed; their length is an option because it decides how much the prompt costs.

    scripts/bench_rerank.py --backend llamacpp
    scripts/bench_rerank.py --backend torch --dtype bfloat16 --words 20 60
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from typing import Any

WORDS = """
river harbour engine signal paper winter garden market bridge letter island copper forest window
music doctor planet silver travel record valley kitchen history camera station
""".split()  # noqa: SIM905 - a list of literals would fill the screen


def passages(count: int, words: int, seed: int) -> list[str]:
    """Return ``count`` passages of ``words`` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)).capitalize() + "." for _ in range(count)]


def seconds(model: Any, method: str, query: str, texts: list[str]) -> tuple[float, Any]:
    """Rank once with an empty cache and return the time it took."""
    from steersman.core import rerank

    begun = time.perf_counter()
    ranking = rerank(model, query, texts, method=method)
    return time.perf_counter() - begun, ranking


def main() -> int:
    """Parse arguments and print one line per passage length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--words", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from steersman.core import load

    rows = []
    with load(
        args.model,
        backend=args.backend,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        context=4096,
    ) as model:
        for words in args.words:
            times: dict[str, list[float]] = {"first": [], "generate": []}
            for pair in range(args.pairs + 1):
                texts = passages(args.passages, words, seed=pair)
                for method in ("first", "generate") if pair % 2 else ("generate", "first"):
                    took, _ = seconds(model, method, "Which passage is about a river?", texts)
                    if pair:  # the first pair warms up
                        times[method].append(took)
            ratios = [g / f for f, g in zip(times["first"], times["generate"], strict=True)]
            row = {
                "backend": model.info.backend,
                "dtype": model.info.dtype,
                "device": model.info.device,
                "threads": model.info.threads,
                "passages": args.passages,
                "words": words,
                "first_s": round(statistics.median(times["first"]), 3),
                "generate_s": round(statistics.median(times["generate"]), 3),
                "generate_over_first": round(statistics.median(ratios), 3),
                "passages_per_s_first": round(args.passages / statistics.median(times["first"]), 2),
            }
            rows.append(row)
            if not args.json:
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
