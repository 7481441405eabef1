#!/usr/bin/env python3
"""Speculative decoding against plain decoding: tokens per call, and time.

Both run in this process, in turn, on the same prompt with the same seed and chain, on caches of
their own; the figure is the median of the paired ratios (above 1: the speculative one is faster).
Where the engine's logits do not depend on how many positions a call holds, both make the same text,
and ``same`` counts how often. The prompt's own time is not counted. On a machine that others use
as well, ``--threads 1`` and the ratio of processor times (``cpu_ratio``) say more than the clock's.

    scripts/bench_speculative.py --backend torch --setting fast --threads 2
    scripts/bench_speculative.py --backend llamacpp --only stand --tokens 100 --pairs 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COPY = (
    "The lighthouse stands on the northern cliff, forty metres above the sea. Its lamp was lit for "
    "the first time in the autumn of 1871, when the harbour town still lived from herring. Three "
    "keepers shared the watch and wrote down every passing ship in a book with a leather cover."
)
CODE = """def total_price(items, rate):
    total = 0
    for item in items:
        total += item.price * item.count
    total += total * rate
    return round(total, 2)


def total_weight(items):
    total = 0
    for item in items:
        total += item.weight * item.count
    return total
"""
# Raw texts whose natural continuation repeats them: what an editor, a quoting assistant or a form
# does. A model this small copies unreliably when it is merely asked to.
REPETITIVE = {
    "copy": f"Original:\n{COPY}\n\nCopy:\n{COPY}\n\nOriginal:\n{COPY}\n\nCopy:\n",
    "code": f"# before\n{CODE}\n# after: the same with `amount` for `total`\n"
    f"{CODE.replace('total', 'amount')}\n# before\n{CODE}\n# after: the same with docstrings\n",
    "list": "".join(
        f"- name: item{i}, price: {i * 10}, count: 1, weight: 100, colour: blue, in stock: yes\n"
        for i in range(1, 9)
    ),
}
FREE = {
    "story": "Once upon a time, in a town by the sea, there lived a girl who",
    "chat": [{"role": "user", "content": "What makes a good teacher? Answer in a few sentences."}],
}
TRACES = {
    "animals": [{"role": "user", "content": "List ten animals that live in the sea."}],
    "sum": [
        {
            "role": "user",
            "content": "Tom has 3 boxes of 12 eggs and uses 5 eggs. How many are left? Explain.",
        }
    ],
    "factorial": [{"role": "user", "content": "Write a Python function that returns n factorial."}],
}


@dataclass(frozen=True)
class Text:
    """One generated text and what its tokens after the first one took."""

    ids: tuple[int, ...]
    calls: int
    seconds: float
    cpu: float


def text_of(model: Any, prompt: Any, profile: str, seed: int, **options: Any) -> Text:
    """Generate one text on a cache of its own."""
    from steersman.core import stream
    from steersman.core.decode.events import Finished, TokenEvent

    began: tuple[float, float] | None = None
    for event in stream(model, prompt, profile=profile, seed=seed, **options):
        if began is None and isinstance(event, TokenEvent | Finished):
            began = time.perf_counter(), time.process_time()
        if isinstance(event, Finished) and began is not None:
            return Text(
                event.token_ids,
                event.timings.calls.get("target", 0),
                time.perf_counter() - began[0],
                time.process_time() - began[1],
            )
    raise RuntimeError("the stream ended without saying so")


def pair(
    model: Any, prompt: Any, profile: str, seed: int, turn: int, args: argparse.Namespace, t: float
) -> dict[str, float]:
    """Make one text both ways, in alternating order."""
    found: dict[str, Text] = {}
    for name in ("balanced", profile)[:: 1 if turn % 2 else -1]:
        overrides = {"temperature.t": t}
        if name == profile and args.fixed:
            overrides[f"{profile.replace('-', '_')}.adaptive"] = False
        found[name] = text_of(
            model, prompt, name, seed, max_tokens=args.tokens, overrides=overrides
        )
    plain, ours = found["balanced"], found[profile]
    later, per = max(len(ours.ids) - 1, 1), max(len(plain.ids) - 1, 1)
    return {
        "ratio": (plain.seconds / per) / (ours.seconds / later),
        "cpu": (plain.cpu / per) / (ours.cpu / later),
        # The prompt's call gives the first token.
        "tokens_per_call": later / max(ours.calls, 1),
        "same": float(plain.ids == ours.ids),
    }


def row(name: str, pairs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return one line of the report."""
    ratios = [p["ratio"] for p in pairs]
    return {
        "task": name,
        "pairs": len(pairs),
        "tokens_per_call": round(statistics.median(p["tokens_per_call"] for p in pairs), 2),
        "speed_ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_ratio": round(statistics.median(p["cpu"] for p in pairs), 3),
        "cpu_range": [
            round(min(p["cpu"] for p in pairs), 3),
            round(max(p["cpu"] for p in pairs), 3),
        ],
        "same": f"{int(sum(p['same'] for p in pairs))}/{len(pairs)}",
    }


def main() -> int:
    """Parse arguments, run the tasks, print one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--setting", choices=["reproducible", "fast"], default="reproducible")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--traces", type=int, default=8)
    parser.add_argument("--only", choices=["prompt-lookup", "stand"])
    parser.add_argument("--tasks", nargs="*", help="some of the tasks, by name")
    parser.add_argument("--fixed", action="store_true", help="always draft as much as allowed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from steersman.core import load

    options: dict[str, Any] = {} if args.backend == "mlx" else {"setting": args.setting}
    rows: list[dict[str, Any]] = []

    def report(line: dict[str, Any]) -> None:
        rows.append(line)
        if not args.json:
            print(json.dumps(line), flush=True)

    with load(
        args.model,
        backend=args.backend,
        context=2048,
        threads=args.threads,
        dtype=args.dtype,
        **options,
    ) as model:
        if not args.json:
            info = model.info
            print(f"{info.backend} {info.dtype} {args.setting}, {info.threads} threads", flush=True)
        text_of(model, "Warm up.", "balanced", 0, max_tokens=8)
        for profile in ("prompt-lookup", "stand"):
            if args.only in (None, profile):
                single(model, profile, args, report)
        if args.only in (None, "stand"):
            several(model, args, report)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


def single(model: Any, profile: str, args: argparse.Namespace, report: Any) -> None:
    """Single texts: repetitive ones (greedy), and free ones (temperature 0.7)."""
    from steersman.core.decode.speculative.memory import forget

    for tasks, t in ((REPETITIVE, 0.0), (FREE, 0.7)):
        for name, prompt in tasks.items():
            if args.tasks and name not in args.tasks:
                continue
            made = []
            for turn in range(args.pairs):
                forget(model)  # every text is the first one
                made.append(pair(model, prompt, profile, turn, turn, args, t))
            report(row(f"{profile}: {name}", made))


def several(model: Any, args: argparse.Namespace, report: Any) -> None:
    """Several samples of one prompt: the first, and the later ones."""
    from steersman.core.decode.speculative.memory import forget

    firsts, later = [], []
    for name, prompt in TRACES.items():
        if args.tasks and name not in args.tasks:
            continue
        forget(model)
        made = [pair(model, prompt, "stand", i, i, args, 0.7) for i in range(args.traces)]
        firsts += made[:1]
        later += made[1:]
        report(row(f"stand: samples 2 to {args.traces}, {name}", made[1:]))
    if firsts:
        report(row("stand: first samples", firsts))
        report(row(f"stand: samples 2 to {args.traces}", later))


if __name__ == "__main__":
    sys.exit(main())
