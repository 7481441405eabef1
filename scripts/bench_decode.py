#!/usr/bin/env python3
"""Decoding speed through steersman's loop, as a ratio to each engine's own loop.

Both loops run in this process, in turn, on the same prompt and for the same number of tokens; the
figure is the median of the paired ratios. Greedy on both sides, end tokens ignored.

    scripts/bench_decode.py                     # every installed engine
    scripts/bench_decode.py --only llamacpp --pairs 9 --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PROMPT = "The history of navigation begins with sailors who stayed within sight of the coast. " * 8
FIVE_STAGES = [
    {"penalties": {"repetition": 1.1}},
    {"top_k": {"k": 40}},
    {"top_p": {"p": 0.95}},
    {"min_p": {"p": 0.05}},
    {"temperature": {"t": 0.8}},
]


ONLY = ["llamacpp", "chain", "torch", "reproducible", "bfloat16", "q4", "mlx"]


@dataclass(frozen=True)
class Timing:
    """Seconds to the first token (prefill included) and seconds per later token."""

    first: float
    per_token: float


def timed(tokens: Iterator[Any], count: int) -> Timing:
    """Take ``count`` tokens and time them."""
    begun = time.perf_counter()
    next(tokens)
    first = time.perf_counter()
    for _ in range(count - 1):
        next(tokens)
    ended = time.perf_counter()
    return Timing(first - begun, (ended - first) / (count - 1))


def steersman_tokens(model: Any, prompt: Sequence[int], count: int, profile: Any) -> Iterator[Any]:
    """Tokens through the core's loop, end tokens ignored."""
    import numpy as np

    from steersman.core.decode.events import TokenEvent
    from steersman.core.decode.loop import decode
    from steersman.core.decode.rng import Rng
    from steersman.core.decode.sessions import Sessions
    from steersman.core.decode.types import Request

    with Sessions(model) as sessions:
        ready = sessions.prepare(profile.strategy, name="bench")
        request = Request(
            prompt=np.asarray(prompt, np.int64),
            models=sessions.models,
            eos_ids=frozenset(),
            max_tokens=count,
            context=sessions.context,
        )
        for event in decode(profile.strategy, ready, request, Rng(0)):
            if isinstance(event, TokenEvent):
                yield event.id


def llamacpp_tokens(threads: int | None) -> Callable[[Sequence[int], int], Iterator[int]]:
    """llama-cpp-python's own generator, greedy."""
    import llama_cpp

    from steersman.core.locate import locate

    engine = llama_cpp.Llama(
        str(locate("smollm2").path),
        n_ctx=2048,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def run(prompt: Sequence[int], count: int) -> Iterator[int]:
        engine.reset()
        yield from engine.generate(list(prompt), temp=0.0, top_k=1)

    return run


def torch_tokens(dtype: str) -> Callable[[Sequence[int], int], Iterator[int]]:
    """transformers' generate, greedy, streamed token by token."""
    import torch
    import transformers

    from steersman.backends.files.convert import as_hf_folder
    from steersman.core.locate import locate

    folder = as_hf_folder(locate("smollm2"))
    engine = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=getattr(torch, dtype)
    ).eval()

    class Clock(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def run(prompt: Sequence[int], count: int) -> Iterator[int]:
        # generate() cannot be iterated: it runs at the first next(), and its own clock is replayed.
        clock = Clock()
        begun = time.perf_counter()
        engine.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        # The first put() is the prompt itself.
        for at in clock.times[1:]:
            yield at - begun

    return run


def replayed(run: Iterator[float], count: int) -> Timing:
    """Timing of a loop that reports its own clock."""
    times = [next(run) for _ in range(count)]
    return Timing(times[0], (times[-1] - times[0]) / (count - 1))


def mlx_tokens() -> Callable[[Sequence[int], int], Iterator[int]]:
    """mlx-lm's stream_generate, greedy, on the same weights in float32."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    from steersman.backends.files.convert import as_hf_folder
    from steersman.core.locate import locate

    folder = as_hf_folder(locate("smollm2"))
    config = json.loads((folder / "config.json").read_text())
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    engine, _ = load_model(folder, model_config={"rope_theta": theta})

    def run(prompt: Sequence[int], count: int) -> Iterator[int]:
        # generate_step is the loop inside stream_generate, without its detokenizer.
        for token, _ in generate_step(mx.array(list(prompt)), engine, max_tokens=count):
            yield token

    return run


def compare(
    name: str,
    ours: Callable[[], Timing],
    theirs: Callable[[], Timing],
    pairs: int,
    goal: float | None,
) -> dict[str, Any]:
    """Time the two in turn, ``pairs`` times after one warm-up each; report medians."""
    ours(), theirs()
    mine, other = [], []
    for i in range(pairs):
        # Alternate who goes first, so that a drift of the machine's load hits both.
        for which in (0, 1) if i % 2 else (1, 0):
            (mine, other)[which].append((ours, theirs)[which]())
    ratios = [b.per_token / a.per_token for a, b in zip(mine, other, strict=True)]
    firsts = [b.first / a.first for a, b in zip(mine, other, strict=True)]
    return {
        "comparison": name,
        "ours_tok_s": round(statistics.median(1 / t.per_token for t in mine), 2),
        "theirs_tok_s": round(statistics.median(1 / t.per_token for t in other), 2),
        "speed_ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "goal": goal,
        "first_token_ratio": round(statistics.median(firsts), 3),
    }


def build(stages: list[Any]) -> Any:
    """Return a sampling profile with these stages."""
    from steersman.core.decode import STRATEGIES
    from steersman.core.logits import Chain, build_stage

    built = [build_stage(name, params) for stage in stages for name, params in stage.items()]
    return argparse.Namespace(strategy=STRATEGIES["sample"](chain=Chain(tuple(built))))


def main() -> int:
    """Parse arguments, run what is installed, print one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ONLY)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu", help="device of the torch comparisons")
    parser.add_argument(
        "--setting",
        choices=["reproducible", "fast"],
        default="reproducible",
        help="of llama.cpp; torch is timed in both",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)
    from steersman.core import load

    greedy, five = build([{"temperature": {"t": 0}}]), build(FIVE_STAGES)
    count, rows = args.tokens, []

    def loop(model: Any, profile: Any = greedy) -> Callable[[], Timing]:
        prompt = model.tokenizer.encode(PROMPT)
        return lambda: timed(steersman_tokens(model, prompt, count, profile), count)

    def engine(model: Any, run: Any, clock: Any = timed) -> Callable[[], Timing]:
        prompt = model.tokenizer.encode(PROMPT)
        return lambda: clock(run(prompt, count), count)

    def wanted(name: str) -> bool:
        return args.only in (None, name)

    def report(row: dict[str, Any], model: Any) -> None:
        row["threads"] = model.info.threads
        rows.append(row)
        if not args.json:
            print(
                f"{row['comparison']}: {row['ours_tok_s']} against {row['theirs_tok_s']} tok/s, "
                f"ratio {row['speed_ratio']} (range {row['ratio_range']}, goal {row['goal']}), "
                f"first token {row['first_token_ratio']}, threads {row['threads']}",
                flush=True,
            )

    options = {"context": 2048, "threads": args.threads}
    if wanted("mlx"):  # first: a fast BLAS must be there before anything else loads mlx
        with load("smollm2", backend="mlx", dtype="float32", **options) as model:
            theirs = engine(model, mlx_tokens())
            report(compare("mlx float32 / mlx-lm", loop(model), theirs, args.pairs, 0.97), model)
    if wanted("llamacpp") or wanted("chain"):
        with load("smollm2", backend="llamacpp", setting=args.setting, **options) as model:
            if wanted("llamacpp"):
                theirs = engine(model, llamacpp_tokens(model.info.threads))
                name = "llama.cpp / llama-cpp-python generate"
                report(compare(name, loop(model), theirs, args.pairs, 0.97), model)
            if wanted("chain"):
                name = "llama.cpp five stages / greedy"
                row = compare(name, loop(model, five), loop(model), args.pairs, 0.95)
                report(row, model)
    for only, dtype, base, setting, goal in (
        ("torch", "float32", "float32", "fast", 1.1),
        ("reproducible", "float32", "float32", "reproducible", None),
        ("bfloat16", "bfloat16", "bfloat16", "fast", 1.1),
        ("q4", "q4", "float32", "fast", 1.8),
    ):
        if wanted(only):
            with load(
                "smollm2",
                backend="torch",
                dtype=dtype,
                device=args.device,
                setting=setting,
                **options,
            ) as model:
                theirs = engine(model, torch_tokens(base), replayed)
                name = f"torch {dtype} {setting} / transformers {base}"
                report(compare(name, loop(model), theirs, args.pairs, goal), model)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
