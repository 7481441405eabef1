"""What the ``eval_*.py`` scripts share: prompts, measures, resumable runs and paired tables.

An experiment is a function ``(model, seed, prompt, arm, args) -> {figure: value}``. Every finished
measurement is a line in a JSONL file, so a stopped run goes on where it was. Every comparison is
paired by prompt; intervals are 95 % percentile bootstraps over prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steersman.core import generate
from steersman.core.model import Model
from steersman.core.reranking.evaluate import bootstrap_interval

Record = Mapping[str, Any]
Experiment = Callable[..., dict[str, float]]
ORDER_SEED = 1
ROOT = Path(__file__).resolve().parent.parent


def parser(doc: str | None, *, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every evaluation has; results go to ``out/OUT``."""
    data = Path(os.environ.get("STEERSMAN_DATA", ROOT.parent / "shared" / "data"))
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--data", type=Path, default=data)
    made.add_argument("--prompts", type=int, default=16, help="prompts per experiment")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--model", default="smollm2")
    made.add_argument("--backend", default="auto")
    made.add_argument("--threads", type=int, default=None)
    made.add_argument("--out", type=Path, default=ROOT / "out" / out)
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments; the folder of ``--out`` exists afterwards."""
    args = made.parse_args()
    if not args.data.is_dir():
        made.error(f"{args.data}: no such folder; set STEERSMAN_DATA or give --data")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


# -- prompts -----------------------------------------------------------------------------------


def stories(data: Path, shuffler: random.Random | None = None) -> list[str]:
    """Return first sentences of TinyStories, shuffled."""
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    whole = [s.strip() for s in text.split("<|endoftext|>")]
    first = [s[: s.index(".") + 1] for s in whole if "." in s[:200]]
    (shuffler or random.Random(ORDER_SEED)).shuffle(first)
    return first


def chats(data: Path, shuffler: random.Random | None = None) -> list[list[dict[str, str]]]:
    """Return first turns of MT-Bench as messages, shuffled."""
    lines = (data / "mt_bench" / "question.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines]
    (shuffler or random.Random(ORDER_SEED)).shuffle(turns)
    return [[{"role": "user", "content": turn}] for turn in turns]


def sums(data: Path) -> list[tuple[list[dict[str, str]], str]]:
    """Return GSM8K's training questions as messages, each with its final answer, shuffled."""
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(ORDER_SEED).shuffle(rows)
    return [
        ([{"role": "user", "content": r["question"]}], r["answer"].rpartition("####")[2].strip())
        for r in rows
    ]


def openings(data: Path) -> list[Any]:
    """Return first sentences of stories and first turns of MT-Bench, in turn."""
    shuffler = random.Random(ORDER_SEED)
    return [p for pair in zip(stories(data, shuffler), chats(data, shuffler)) for p in pair]


# -- measures ----------------------------------------------------------------------------------


def rep_n(tokens: Sequence[int], n: int) -> float:
    """Return the share of n-grams that occurred before in the text; 0 where there are none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measured(model: Model, prompt: Any, **options: Any) -> dict[str, float]:
    """Generate one text and return its figures."""
    found = generate(model, prompt, logprobs=0, **options)
    values = [t.raw_logprob for t in found.tokens if t.raw_logprob is not None]
    return {
        "rep4": rep_n(found.token_ids, 4),
        "distinct2": 1 - rep_n(found.token_ids, 2),
        "sum": float(np.sum(values)),
        "mean": float(np.mean(values)) if values else float("nan"),
        "tokens": len(found.token_ids),
        "ended": float(found.finish_reason == "eos"),
        "calls": sum(found.timings.calls.values()),
        "seconds": found.timings.decode_s,
    }


# -- running and printing --------------------------------------------------------------------------


def run_arms(
    name: str,
    function: Experiment,
    arms: Sequence[str],
    model: Model,
    prompts: Sequence[Any],
    args: argparse.Namespace,
    **settings: Any,
) -> list[Record]:
    """Measure what ``args.out`` does not hold yet; return this experiment's records.

    ``settings`` is all else that the figures depend on; records made with others are left alone.
    """
    made_with = {
        "experiment": name,
        "model": model.info.fingerprint,
        "backend": model.info.backend,
        "seed": args.seed,
        **settings,
    }
    out: Path = args.out
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    held = [json.loads(line) for line in lines if line.endswith("}")]
    held = [r for r in held if all(r.get(k) == v for k, v in made_with.items())]
    done = {(r["prompt"], r["arm"]) for r in held}
    with out.open("a", encoding="utf-8") as log:
        for number, prompt in enumerate(prompts[: args.prompts]):
            for arm in arms:
                if (number, arm) in done:
                    continue
                figures = function(model, args.seed + number, prompt, arm, args)
                record = made_with | {"prompt": number, "arm": arm, "figures": figures}
                held.append(record)
                log.write(json.dumps(record) + "\n")
                log.flush()
    return [r for r in held if r["prompt"] < args.prompts]


def interval(values: Sequence[float]) -> str:
    """Return "mean [low, high]"."""
    clean = [v for v in values if not np.isnan(v)]
    if not clean:
        return "-"
    bounds = bootstrap_interval(clean)
    mean = float(np.mean(clean))
    return f"{mean:.3f}" if bounds is None else f"{mean:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def column(records: Sequence[Record], arm: str, figure: str) -> dict[int, float]:
    """Return one figure of one arm by prompt."""
    return {r["prompt"]: r["figures"][figure] for r in records if r["arm"] == arm}


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def paired_table(
    name: str, records: Sequence[Record], arms: Sequence[str], figures: Sequence[str]
) -> None:
    """Print each arm's figures with intervals, and differences from the first arm by prompt."""
    rows = []
    for arm in arms:
        row = [arm]
        for figure in figures:
            values = column(records, arm, figure)
            base = column(records, arms[0], figure)
            row.append(interval(list(values.values())))
            if arm != arms[0]:
                row[-1] += f"; {interval([v - base[p] for p, v in values.items() if p in base])}"
        rows.append(row)
    count = len({r["prompt"] for r in records})
    title = f"{name}: {count} prompts; after the semicolon: difference from {arms[0]}"
    show(title, (name, *figures), rows)
