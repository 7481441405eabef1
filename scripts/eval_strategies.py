#!/usr/bin/env python3
"""Measure what the decoding strategies do to real texts; every comparison is paired by prompt.

    scripts/eval_strategies.py                                   # all four, small
    scripts/eval_strategies.py --only dola --prompts 200
    scripts/eval_strategies.py --only repetition --prompts 32 --tokens 100 --out more.jsonl

repetition  repetition and likelihood of continuations: greedy, contrastive and three samplers
beam        log-probability of the text that beam search finds, against greedy
best-of-n   log-probability of the best of four samples, against one of them
dola        TruthfulQA MC1: choices scored by DoLa's contrast of layers, against the model as it is

Prompts come in one fixed random order, so ``--prompts N`` takes the first N. Every finished
measurement is a line in ``--out``; run the command again to go on after a stop, or with a larger
``--prompts`` to extend. Intervals are 95 % percentile bootstraps over prompts.
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

from steersman.core import generate, load
from steersman.core.array import array_namespace, to_numpy
from steersman.core.decode.dola import DoLa, contrast_layers
from steersman.core.model import Capability, Forward, Model
from steersman.core.ops import log_softmax
from steersman.core.reranking.evaluate import bootstrap_interval

Record = Mapping[str, Any]
PROFILES = ("greedy", "contrastive", "balanced", "creative", "mirostat")
ORDER_SEED = 1


# -- prompts -----------------------------------------------------------------------------------


def openings(data: Path) -> list[Any]:
    """Return first sentences of stories and first turns of MT-Bench, in turn."""
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [s.strip() for s in text.split("<|endoftext|>")]
    first = [s[: s.index(".") + 1] for s in stories if "." in s[:200]]
    lines = (data / "mt_bench" / "question.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines]
    shuffler = random.Random(ORDER_SEED)
    shuffler.shuffle(first)
    shuffler.shuffle(turns)
    chats = [[{"role": "user", "content": turn}] for turn in turns]
    return [prompt for pair in zip(first, chats) for prompt in pair]


def multiple_choice(data: Path) -> list[Any]:
    """Return TruthfulQA's (question, choices, index of the true one)."""
    rows = json.loads((data / "truthfulqa" / "mc_task.json").read_text(encoding="utf-8"))
    found = []
    for row in rows:
        choices = list(row["mc1_targets"])
        found.append((row["question"], choices, list(row["mc1_targets"].values()).index(1)))
    random.Random(ORDER_SEED).shuffle(found)
    return found


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
    }


def choice_scores(model: Model, question: str, choices: Sequence[str]) -> dict[str, list[float]]:
    """Return each choice's total log-probability, as it is and under DoLa's contrast.

    ``relative_top`` is 0 here: with a threshold, one implausible token would rule out a choice.
    The contrasted scores are normalised, as they are when a token is drawn from them.
    """
    depth = model.info.layers
    arms = {name: DoLa(layers=name).candidates(depth) for name in ("low", "high")}
    layers = tuple(sorted({layer for chosen in arms.values() for layer in chosen}))
    needs = Capability.ALL_LOGITS | Capability.HIDDEN | Capability.HEAD
    prompt = model.tokenizer.encode(f"Q: {question}\nA:")
    if model.tokenizer.add_bos and model.tokenizer.bos_id is not None:
        prompt.insert(0, model.tokenizer.bos_id)
    totals: dict[str, list[float]] = {"plain": [], **{name: [] for name in arms}}
    with model.session(needs=needs, context=len(prompt) + 128) as session:
        if len(prompt) > 1:
            session.forward(Forward(keep=0, tokens=np.array([prompt[:-1]]), logits="none"))
        for choice in choices:
            ids = model.tokenizer.encode(" " + choice)
            fed = np.array([[prompt[-1], *ids[:-1]]])
            ask = Forward(keep=len(prompt) - 1, tokens=fed, logits="all", hidden=layers)
            out = session.forward(ask)
            assert out.logits is not None
            early = {layer: model.head(out.hidden[layer][0, ...]) for layer in layers}
            xp = array_namespace(out.logits)
            sums = dict.fromkeys(totals, 0.0)
            for at, token in enumerate(ids):
                last = out.logits[0, at, :]
                scores = {"plain": last}
                for name, chosen in arms.items():
                    lenses = xp.stack([early[layer][at, :] for layer in chosen])
                    scores[name] = contrast_layers(last, lenses, 0.0)
                for name, score in scores.items():
                    sums[name] += float(to_numpy(log_softmax(score)[token]))
            for name, total in sums.items():
                totals[name].append(total)
    return totals


# -- experiments: (prompt number, prompt) to figures per arm ---------------------------------------


def repetition(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    return measured(model, prompt, profile=arm, seed=seed, max_tokens=args.tokens)


def beam(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    return measured(model, prompt, profile=arm, seed=seed, max_tokens=args.short)


def best_of_n(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    n = 4 if arm == "best of 4" else 1
    options = {"overrides": {"best_of_n.n": n}, "seed": seed, "max_tokens": args.short}
    return measured(model, prompt, profile="best-of-n", **options)


def dola(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    question, choices, true = prompt
    totals = choice_scores(model, question, choices)
    return {name: float(np.argmax(t) == true) for name, t in totals.items()} | {
        "chance": 1 / len(choices)
    }


EXPERIMENTS: dict[str, tuple[Callable[..., dict[str, float]], tuple[str, ...]]] = {
    "repetition": (repetition, PROFILES),
    "beam": (beam, ("greedy", "beam")),
    "best-of-n": (best_of_n, ("one", "best of 4")),
    "dola": (dola, ("all",)),
}


# -- running and printing --------------------------------------------------------------------------


def run(name: str, model: Model, prompts: Sequence[Any], args: Any, out: Path) -> list[Record]:
    """Measure what ``out`` does not hold yet; return this experiment's records."""
    function, arms = EXPERIMENTS[name]
    made_with = {
        "experiment": name,
        "model": model.info.fingerprint,
        "backend": model.info.backend,
        "seed": args.seed,
        "tokens": {"repetition": args.tokens, "dola": 0}.get(name, args.short),
    }
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


def report(name: str, records: Sequence[Record]) -> None:
    """Print means and paired differences with intervals."""
    count = len({r["prompt"] for r in records})
    if name == "dola":
        arms = {arm: column(records, "all", arm) for arm in ("plain", "low", "high", "chance")}
        rows = []
        for arm, values in arms.items():
            against = [v - arms["plain"][p] for p, v in values.items()]
            rows.append([arm, interval(list(values.values())), interval(against)])
        show(f"dola: TruthfulQA MC1, {count} questions", ("scores", "accuracy", "- plain"), rows)
        return
    arms_of = EXPERIMENTS[name][1]
    figures = {"repetition": ("rep4", "distinct2", "mean"), "beam": ("sum", "mean", "rep4")}.get(
        name, ("mean", "rep4")
    )
    rows = []
    for arm in arms_of:
        row = [arm]
        for figure in figures:
            values = column(records, arm, figure)
            base = column(records, arms_of[0], figure)
            row.append(interval(list(values.values())))
            if arm != arms_of[0]:
                row[-1] += f"; {interval([v - base[p] for p, v in values.items() if p in base])}"
        row.append(f"{np.mean(list(column(records, arm, 'tokens').values())):.0f}")
        rows.append(row)
    title = f"{name}: {count} prompts; after the semicolon: difference from {arms_of[0]}"
    show(title, (name, *figures, "tokens"), rows)


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("STEERSMAN_DATA", root.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--prompts", type=int, default=16, help="prompts per experiment")
    parser.add_argument("--tokens", type=int, default=100, help="tokens, experiment repetition")
    parser.add_argument("--short", type=int, default=24, help="tokens, beam and best-of-n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=root / "out" / "eval_strategies.jsonl")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"{args.data}: no such folder; set STEERSMAN_DATA or give --data")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with load(args.model, backend=args.backend, threads=args.threads, context=1024) as model:
        print(f"{model.info.name} on {model.info.backend}, seed {args.seed}")
        for name in args.only:
            prompts = multiple_choice(args.data) if name == "dola" else openings(args.data)
            report(name, run(name, model, prompts, args, args.out))


if __name__ == "__main__":
    main()
