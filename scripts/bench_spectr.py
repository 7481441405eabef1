#!/usr/bin/env python3
"""Drafts of a second model: tokens per call of the target, and time, against plain sampling.

    scripts/bench_spectr.py --backend llamacpp --draft layers=0-2,4-13,15-16,18-24,27-29
    scripts/bench_spectr.py --backend torch --dtype float32 --draft backend=llamacpp --prompts 4
    scripts/bench_spectr.py --backend torch --dtype float32 --draft dtype=q4 --draft setting=fast

``--draft`` takes arguments of ``steersman.core.load``; what it does not name is as for the target.
Arms are ``plain`` and ``K x L`` (K drafts of L tokens; 1 x L is plain speculative sampling), each
at every temperature of ``--temperatures``; ``1 x 16`` has as many drafted tokens as ``4 x 4``.
``adaptive`` chooses K and L itself. All arms of a prompt run one after the other in this process,
on caches of their own, so times are paired. End tokens are ignored: all texts have equal length.

tokens/call  tokens per call of the target ("block efficiency"), the prompt's call not counted
ms/token     time per token after the prompt
ratio        plain sampling's time per token over the arm's; above 1 the arm is faster
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from evaluation import Record, column, interval, openings, parsed, parser, run_arms, show

from steersman.core import load
from steersman.core.api import encode_prompt
from steersman.core.decode import Sample, SpecTr
from steersman.core.decode.events import Finished
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request
from steersman.core.logits import Chain, Temperature, TopP
from steersman.core.model import Model


def strategy_of(arm: str, args: Any) -> Any:
    """Return the strategy of an arm such as ``4 x 4 T=0.7``."""
    shape, _, heat = arm.partition(" T=")
    stages: tuple[Any, ...] = (Temperature(t=float(heat)),)
    if args.top_p < 1:
        stages += (TopP(p=args.top_p),)
    chain = Chain(stages)
    if shape == "plain":
        return Sample(chain=chain)
    if shape == "adaptive":
        return SpecTr(drafts=2, length=args.longest, adaptive=True, chain=chain)
    drafts, _, length = shape.partition(" x ")
    return SpecTr(drafts=int(drafts), length=int(length), chain=chain)


def experiment(draft: Model) -> Any:
    """Return the experiment: one text with one arm."""

    def run(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
        strategy = strategy_of(arm, args)
        with Sessions({"target": model, "draft": draft}) as sessions:
            ready = sessions.prepare(strategy, name=arm)
            request = Request(
                prompt=encode_prompt(model.tokenizer, prompt),
                models=sessions.models,
                eos_ids=frozenset(),
                max_tokens=args.tokens,
                context=sessions.context,
            )
            *_, last = decode(strategy, ready, request, Rng(seed))
        assert isinstance(last, Finished)
        calls = last.timings.calls
        return {
            # The prompt's call gives the first token.
            "tokens/call": (len(last.token_ids) - 1) / calls["target"],
            "draft calls": calls.get("draft", 0) / (len(last.token_ids) - 1),
            "ms/token": 1000 * last.timings.decode_s / (len(last.token_ids) - 1),
        }

    return run


def report(records: Sequence[Record], arms: Sequence[str]) -> None:
    """Print one line per arm."""
    rows = []
    for arm in arms:
        plain = column(records, f"plain T={arm.partition(' T=')[2]}", "ms/token")
        took = column(records, arm, "ms/token")
        ratios = [plain[p] / took[p] for p in took if p in plain]
        rows.append(
            [
                arm,
                interval(list(column(records, arm, "tokens/call").values())),
                f"{np.mean(list(column(records, arm, 'draft calls').values())):.2f}",
                f"{statistics.median(took.values()):.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        )
    header = ("arm", "tokens/call", "draft calls/token", "ms/token", "ratio, median (range)")
    show(f"{len({r['prompt'] for r in records})} prompts", header, rows)


def main() -> None:
    """Parse arguments, run what is missing, print the table."""
    made = parser(__doc__, out="spectr.jsonl")
    made.add_argument("--dtype", default="auto")
    made.add_argument("--setting", default="reproducible")
    made.add_argument("--draft", action="append", default=[], metavar="KEY=VALUE", required=True)
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--temperatures", type=float, nargs="*", default=[1.0, 0.7])
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--longest", type=int, default=8, help="length of adaptive drafts")
    made.add_argument("--shapes", nargs="*", default=["1 x 4", "2 x 4", "4 x 4", "1 x 16"])
    made.add_argument("--budget", type=float, default=1e9, help="seconds after which to stop")
    args = parsed(made)
    options: dict[str, Any] = {"backend": args.backend, "threads": args.threads, "context": 1024}
    if args.dtype != "auto":
        options["dtype"] = args.dtype
    if args.backend != "mlx":
        options["setting"] = args.setting
    own = dict(pair.partition("=")[::2] for pair in args.draft)
    if own.get("backend", args.backend) != args.backend:
        options_of_draft = {k: v for k, v in options.items() if k not in ("dtype", "setting")}
    else:
        options_of_draft = dict(options)
    arms = [f"{s} T={t:g}" for t in args.temperatures for s in ("plain", *args.shapes)]
    with (
        load(args.model, **options) as target,
        load(args.model, **(options_of_draft | own)) as draft,
    ):
        ends = time.monotonic() + args.budget
        measured: list[Record] = []
        prompts = openings(args.data)[: args.prompts]
        args.prompts = 0
        for _ in prompts:
            args.prompts += 1
            measured = run_arms(
                "drafts",
                experiment(draft),
                arms,
                target,
                prompts,
                args,
                draft=" ".join(sorted(args.draft)),
                dtype=args.dtype,
                setting=args.setting,
                tokens=args.tokens,
                top_p=args.top_p,
                threads=target.info.threads,
                longest=args.longest,
            )
            if time.monotonic() > ends:
                break
        print(f"target {args.backend} {args.dtype} {args.setting}, draft {' '.join(args.draft)}")
        report(measured, arms)


if __name__ == "__main__":
    main()
