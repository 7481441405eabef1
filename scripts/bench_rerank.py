#!/usr/bin/env python3
"""Passages per second of reranking: first, generate, and a plain transformers loop beside them.

A job of queries runs through the reranker (the shared beginning of the prompts computed once,
passages tokenised once and ahead of time, ``--batch-size`` queries per call). On torch the very
prompts of each query are then given to transformers in the same process, one call per window, the
way rerankers without an engine of their own do: ``loop`` asks for logits as the model returns them,
``loop_last`` for those of the last position alone, and for ``generate`` the loop is
``model.generate``. The loops are given ready token ids, so that their time is the model's alone.
Queries alternate between the contestants, so that other work on the machine hits all of them.

Passages are made of words drawn with a fixed seed, so that no data is needed; their length is an
option because it decides how much the prompt costs.

    scripts/bench_rerank.py --backend torch --threads 1
    scripts/bench_rerank.py --backend llamacpp --words 20 60
    scripts/bench_rerank.py --backend torch --sweep
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

WORDS = """
river harbour engine signal paper winter garden market bridge letter island copper forest window
music doctor planet silver travel record valley kitchen history camera station
""".split()  # noqa: SIM905 - a list of literals would fill the screen
METHODS = ("first", "generate")


def passages(count: int, words: int, seed: int) -> list[str]:
    """Return ``count`` passages of ``words`` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)).capitalize() + "." for _ in range(count)]


def requests(queries: int, count: int, words: int, *, first: int = 0) -> Iterator[Any]:
    """Yield queries with passages of their own."""
    from steersman.core.reranking.io import Candidate, Request

    for i in range(first, first + queries):
        texts = passages(count, words, seed=i)
        query = f"Which passage tells of a {WORDS[i % len(WORDS)]} and a {WORDS[-1 - i % 7]}?"
        candidates = tuple(Candidate(docid=str(j), text=text) for j, text in enumerate(texts))
        yield Request(qid=str(i), query=query, candidates=candidates)


@dataclass
class Total:
    """Seconds of a contestant, and what it did in them."""

    seconds: float = 0.0
    cpu: float = 0.0  # processor time of all threads of the process
    windows: int = 0
    tokens: int = 0
    cached: int = 0
    letters: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of a block."""
        begun, used = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - begun
        self.cpu += time.process_time() - used

    def over(self, other: Total) -> dict[str, float]:
        """Return how many times as long this took as ``other``."""
        return {
            "wall": round(self.seconds / other.seconds, 2),
            "cpu": round(self.cpu / other.cpu, 2),
        }


class Loop:
    """The plain transformers loop."""

    def __init__(self, model: Any) -> None:
        import torch
        import transformers

        from steersman.backends.files.convert import as_hf_folder
        from steersman.core.locate import locate

        self.torch = torch
        source = locate(model.options.get("model", "smollm2"))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            as_hf_folder(source), dtype=getattr(torch, model.info.dtype), local_files_only=True
        )
        self.model.to(model.info.device).eval()

    def first(self, ids: list[int], letters: list[int], *, last: bool) -> int:
        """Return the place of the best letter after a prompt."""
        torch = self.torch
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self.model.device)
            logits = self.model(tokens, **({"logits_to_keep": 1} if last else {})).logits[0, -1]
            return int(logits[torch.tensor(letters, device=logits.device)].argmax())

    def generate(self, ids: list[int], count: int) -> int:
        """Generate ``count`` tokens after a prompt."""
        torch = self.torch
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self.model.device)
            out = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return int(out[0, -count])


def contest(model: Any, method: str, loop: Loop | None, args: Any, **size: Any) -> dict[str, Any]:
    """Run one job and return its row of figures."""
    from steersman.core.reranking import Reranker
    from steersman.core.reranking.batch import ahead, rank_each, rows_for

    ours, plain, short = Total(), Total(), Total()
    prompts: list[tuple[list[int], int, int]] = []  # ids, generated tokens, best place

    window = size["window"]
    with Reranker(model, method=method, window=window, stride=max(1, window // 2)) as reranker:
        letters = list(reranker._reader.identifiers.letters)
        encoder = reranker._reader._encoder

        def note(request: Any, call: Any) -> None:
            texts = [request.candidates[i].text for i in call.indices]
            ids = encoder.encode(request.query, texts, max_words=reranker.max_words)
            best = call.indices.index(call.order[0])
            prompts.append((ids, call.generated_tokens, best))

        rows = rows_for(reranker, args.batch_size)
        source = requests(size["queries"], size["candidates"], size["words"])
        for _ in rank_each(reranker, requests(1, 2, 4, first=999), rows=rows):
            pass  # warms up
        ranked = rank_each(reranker, ahead(reranker, source, depth=rows), rows=rows, on_call=note)
        while True:
            with ours.timed():
                found = next(ranked, None)
            if found is None:
                break
            usage = found[1].usage
            ours.windows += usage.windows
            ours.tokens += usage.prompt_tokens
            ours.cached += usage.cached_tokens
            for ids, generated, best in prompts:
                if loop is None:
                    continue
                if method == "generate":
                    with plain.timed():
                        loop.generate(ids, max(1, generated))
                    continue
                with plain.timed():
                    told = loop.first(ids, letters[:window], last=False)
                plain.letters.append(told == best)
                with short.timed():
                    loop.first(ids, letters[:window], last=True)
            prompts.clear()
    ranked_passages = size["queries"] * size["candidates"]
    row: dict[str, Any] = {
        "method": method,
        "backend": model.info.backend,
        "dtype": model.info.dtype,
        "device": model.info.device,
        "threads": model.info.threads,
        "setting": args.setting,
        "rows": rows,
        **size,
        "windows": ours.windows,
        "prompt_tokens": ours.tokens,
        "from_cache": ours.cached,
        "seconds": round(ours.seconds, 2),
        "cpu_seconds": round(ours.cpu, 2),
        "passages_per_s": round(ranked_passages / ours.seconds, 2),
    }
    if loop is not None:
        row["loop_passages_per_s"] = round(ranked_passages / plain.seconds, 2)
        row["times_loop"] = plain.over(ours)
    if short.seconds:
        row["loop_last_passages_per_s"] = round(ranked_passages / short.seconds, 2)
        row["times_loop_last"] = short.over(ours)
        row["same_best"] = f"{sum(plain.letters)}/{len(plain.letters)}"
    return row


def sizes(args: Any) -> Iterator[dict[str, int]]:
    """Yield the sizes to run: one per passage length, or with --sweep one thing at a time."""
    base = {
        "queries": args.queries,
        "candidates": args.passages,
        "window": args.window,
        "words": args.words[0],
    }
    if not args.sweep:
        for words in args.words:
            yield {**base, "words": words}
        return
    for candidates in (10, 20, 40, 80):
        yield {**base, "candidates": candidates}
    for window in (5, 10, 20):
        yield {**base, "window": window}
    for queries in (1, 2, 4, 8):
        yield {**base, "queries": queries}


def main() -> int:
    """Parse arguments and print one line per job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--setting", choices=("reproducible", "fast"), default="reproducible")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--passages", type=int, default=20, help="per query")
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--words", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sweep", action="store_true", help="how time grows; no loop beside it")
    parser.add_argument("--no-loop", action="store_true", help="steersman alone")
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
        setting=args.setting,
        context=4096,
    ) as model:
        alone = args.sweep or args.no_loop or model.info.backend != "torch"
        loop = None if alone else Loop(model)
        for method in args.method:
            for size in sizes(args):
                row = contest(model, method, loop, args, **size)
                rows.append(row)
                if not args.json:
                    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
