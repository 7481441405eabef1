#!/usr/bin/env python3
"""Measure CLUE: are right and wrong solutions told apart by how hidden states change over them?

    scripts/eval_clue.py --backend torch
    scripts/eval_clue.py --backend torch --only processbench --traces 200

best-of-n     MATH problems with 8 sampled solutions each: which one is chosen? Only problems where
              some solutions are right and some wrong can tell; the others enter the share of right
              choices unread, and some of their solutions enter the centroids.
processbench  MATH solutions of ten models, one per problem: is it right?

The solutions were written by larger models; this one reads them. Everything is split by problem:
each fifth is judged by centroids of the other four. Every read trace is kept as a file beside
--out, so a stopped run goes on where it was. Intervals are 95 % bootstraps over problems.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import ORDER_SEED, interval, parsed, parser, show

from steersman.core import load
from steersman.core.array import to_numpy
from steersman.core.journal import settings_key
from steersman.core.model import Capability, Forward, Model
from steersman.core.ops import target_logprobs
from steersman.core.reranking.evaluate import bootstrap_interval
from steersman.core.validation import area_under_curve
from steersman.core.verification import (
    DeltaReader,
    Experience,
    TraceRule,
    encode_trace,
    final_answer,
    majority,
    nearest_first,
)

FOLDS = 5
CHUNK = 64  # positions whose logits are held at once
ARMS = ("all layers", "last layer", "standardised")


@dataclass(kw_only=True)
class Item:
    """A solution: the problem it belongs to, its text, and what reading it gave."""

    problem: str
    place: int
    prompt: str
    text: str
    correct: bool
    answer: str | None
    delta: Any = None
    length: int = 0
    mean_logprob: float = float("nan")


# -- data ------------------------------------------------------------------------------------------


def best_of_n(data: Path, extra: int) -> tuple[list[Item], list[bool]]:
    """Return solutions to read, and how each problem whose solutions agree came out."""
    lines = (data / "math_best_of_n" / "math_cot_100.jsonl").read_text("utf-8").splitlines()
    mixed: list[Item] = []
    rest: list[Item] = []
    settled = []
    for row in map(json.loads, lines):
        items = [
            Item(problem=str(row["idx"]), place=i, prompt=row["question"], text=text,
                 correct=bool(good), answer=str(answer) or None)
            for i, (text, answer, good) in enumerate(zip(row["code"], row["pred"], row["score"]))
        ]  # fmt: skip
        if 0 < sum(item.correct for item in items) < len(items):
            mixed += items
            continue
        settled.append(items[0].correct)
        rest += items if not items[0].correct else items[:2]
    random.Random(ORDER_SEED).shuffle(rest)
    rest.sort(key=lambda item: item.correct)  # wrong ones are rare: all of them first
    return mixed + rest[:extra], settled


def processbench(data: Path, count: int) -> list[Item]:
    """Return shuffled solutions, as many right as wrong ones."""
    rows = json.loads((data / "processbench" / "math.json").read_text("utf-8"))
    random.Random(ORDER_SEED).shuffle(rows)
    found: list[Item] = []
    for wanted in (True, False):
        chosen = [r for r in rows if r["final_answer_correct"] is wanted][: count // 2]
        for row in chosen:
            text = "\n\n".join(row["steps"])
            found.append(Item(problem=row["problem"], place=0, prompt=row["problem"], text=text,
                              correct=wanted, answer=final_answer(text)))  # fmt: skip
    random.Random(ORDER_SEED).shuffle(found)
    return found


# -- reading ---------------------------------------------------------------------------------------


def mean_logprob(model: Model, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Return the mean log-probability of a response, in nats per token."""
    ids = [*prompt, *response]
    values = []
    with model.session(needs=Capability.ALL_LOGITS, context=len(ids) + 8) as session:
        for begin in range(0, len(prompt) - 1, CHUNK):
            piece = np.array([prompt[begin : min(begin + CHUNK, len(prompt) - 1)]])
            session.forward(Forward(keep=begin, tokens=piece, logits="none"))
        for begin in range(len(prompt) - 1, len(ids) - 1, CHUNK):
            end = min(begin + CHUNK, len(ids) - 1)
            out = session.forward(
                Forward(keep=begin, tokens=np.array([ids[begin:end]]), logits="all")
            )
            assert out.logits is not None
            values.append(
                to_numpy(target_logprobs(out.logits[0, ...], np.array(ids[begin + 1 : end + 1])))
            )
    return float(np.mean(np.concatenate(values)))


def read(
    items: list[Item], model: Model, rule: TraceRule, folder: Path, *, likelihood: bool
) -> list[Item]:
    """Fill in what the model makes of each solution; those without a span are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    known = []
    with DeltaReader(model, rule) as reader:
        for number, item in enumerate(items, start=1):
            name = settings_key({"prompt": item.prompt, "text": item.text, "l": likelihood})
            path = folder / f"{name}.npz"
            if not path.exists():
                prompt, response = encode_trace(model.tokenizer, item.prompt, item.text, rule)
                span = rule.locate(model.tokenizer, prompt, response)
                facts: dict[str, Any] = {"length": len(response)}
                if span is not None and len(span.tokens) <= model.info.context:
                    facts["delta"] = reader.read(span)
                    if likelihood:
                        kept = response[: rule.max_tokens]
                        facts["mean_logprob"] = mean_logprob(model, prompt, kept)
                part = path.with_suffix(".part")
                with part.open("wb") as file:
                    np.savez(file, **facts)
                os.replace(part, path)
                print(f"\rread {number} of {len(items)}", end="", flush=True)
            with np.load(path, allow_pickle=False) as held:
                if "delta" not in held:
                    continue
                item.delta, item.length = held["delta"], int(held["length"])
                item.mean_logprob = float(held["mean_logprob"]) if likelihood else float("nan")
            known.append(item)
    print()
    return known


# -- judging ---------------------------------------------------------------------------------------


def judged(items: list[Item], train: list[Item] | None = None) -> dict[str, np.ndarray]:
    """Return (distance to success, margin) per item and arm, by centroids of other problems.

    ``train``: centroids of all of these instead of the other folds.
    """
    names = sorted({item.problem for item in items})
    random.Random(ORDER_SEED).shuffle(names)
    fold_of = {name: i % FOLDS for i, name in enumerate(names)}
    found = {arm: np.zeros((len(items), 2)) for arm in ARMS}
    for fold in range(FOLDS):
        known = train or [item for item in items if fold_of[item.problem] != fold]
        for arm in ARMS:
            experience = Experience()
            for item in known:
                experience.add(cut(item, arm), correct=item.correct)
            held = experience.centroids()
            for i, item in enumerate(items):
                if fold_of[item.problem] == fold:
                    said = held.judge(cut(item, arm), standardise=arm == "standardised")
                    found[arm][i] = said.success, said.margin
    return found


def cut(item: Item, arm: str) -> np.ndarray:
    """Return the layers that an arm compares."""
    delta: np.ndarray = item.delta
    return delta[-1:] if arm == "last layer" else delta


def by_problem(items: list[Item]) -> list[np.ndarray]:
    """Return the places of each problem's items."""
    names = np.array([item.problem for item in items])
    return [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]


def clustered(items: list[Item], figure: Callable[[np.ndarray], float]) -> str:
    """Return a figure over all items with a bootstrap interval over problems."""
    groups = by_problem(items)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(1000):
        chosen = rng.integers(0, len(groups), len(groups))
        values.append(figure(np.concatenate([groups[i] for i in chosen])))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return f"{figure(np.arange(len(items))):.3f} [{low:.3f}, {high:.3f}]"


def told_apart(title: str, items: list[Item], found: dict[str, np.ndarray]) -> None:
    """Print how well right and wrong items are told apart."""
    labels = np.array([item.correct for item in items])
    lengths = np.array([item.length for item in items], float)
    rows = []
    scores = {f"CLUE, {arm}": found[arm][:, 1] for arm in ARMS} | {"shorter is right": -lengths}
    if not np.isnan(items[0].mean_logprob):
        scores["mean log-probability"] = np.array([item.mean_logprob for item in items])
    for name, values in scores.items():
        area = clustered(items, lambda i, v=values: area_under_curve(v[i], labels[i]))
        verdict = "-"
        if name.startswith("CLUE"):  # the others have no threshold of their own
            right = (values > 0) == labels

            def balanced(i: np.ndarray, right: np.ndarray = right) -> float:
                classes = [right[i][labels[i] == k] for k in (True, False)]
                if not all(map(len, classes)):
                    return float("nan")
                return float(np.mean([c.mean() for c in classes]))

            verdict = clustered(items, balanced)
        inside = [area_under_curve(values[g], labels[g]) for g in by_problem(items)]
        rows.append([name, verdict, area, interval(inside)])
    show(
        f"{title}: {labels.sum()} right and {(~labels).sum()} wrong ones",
        ("score", "balanced accuracy", "AUC", "AUC within problems"),
        rows,
    )


def chosen(
    title: str, items: list[Item], found: dict[str, np.ndarray], settled: list[bool]
) -> None:
    """Print how often each way to choose one of several solutions takes a right one."""
    groups = [g for g in by_problem(items) if 0 < sum(items[i].correct for i in g) < len(g)]

    def first(group: np.ndarray, keys: Sequence[float]) -> int:
        return int(group[nearest_first([float(keys[i]) for i in group])[0]])

    def vote(group: np.ndarray, order: Sequence[int]) -> int:
        place = majority([items[i].answer for i in group], order)
        return int(group[order[0] if place is None else place])

    ways: dict[str, list[float]] = {}
    for group in groups:
        right = [float(items[i].correct) for i in group]
        near = {arm: nearest_first([float(found[arm][i, 0]) for i in group]) for arm in ARMS}
        picks = {
            "majority": vote(group, range(len(group))),
            "mean log-probability": first(group, [-item.mean_logprob for item in items]),
            "shortest": first(group, [item.length for item in items]),
            **{f"CLUE top, {arm}": int(group[near[arm][0]]) for arm in ARMS},
            "CLUE margin, all layers": first(group, -found["all layers"][:, 1]),
            "CLUE votes of 4, all layers": vote(group, near["all layers"][:4]),
        }
        ways.setdefault("one at random", []).append(float(np.mean(right)))
        for name, place in picks.items():
            ways.setdefault(name, []).append(float(items[place].correct))
    base = np.array(ways["majority"])
    rows = []
    for name, hits in ways.items():
        apart = np.array(hits) - base
        bounds = bootstrap_interval(apart)
        told = "" if bounds is None else f"{apart.mean():.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
        whole = (sum(hits) + sum(settled)) / (len(hits) + len(settled))
        rows.append([name, interval(hits), told, f"{whole:.3f}"])
    show(
        f"{title}: {len(groups)} problems on which solutions differ",
        ("choice", "right", "minus majority", f"of all {len(groups) + len(settled)} problems"),
        rows,
    )


def main() -> None:
    made = parser(__doc__, out="eval_clue")
    names = ["best-of-n", "processbench"]
    made.add_argument("--only", nargs="+", choices=names, default=names)
    made.add_argument("--traces", type=int, default=400, help="of ProcessBench")
    made.add_argument("--extra", type=int, default=120, help="of problems that are settled")
    made.add_argument("--max-tokens", type=int, default=256, help="of a solution that are read")
    args = parsed(made)
    rule = TraceRule(span="response", chat=True, max_tokens=args.max_tokens)
    read_sets: dict[str, list[Item]] = {}
    settled: list[bool] = []
    options = {"backend": args.backend, "threads": args.threads, "context": 2048}
    with load(args.model, **options) as model:
        print(f"{model.info.name} on {model.info.backend}, {model.info.dtype}")
        key = settings_key(
            {"rule": rule.as_dict(), "backend": model.info.backend, **rule.model_facts(model)}
        )
        for name in args.only:
            if name == "best-of-n":
                items, settled = best_of_n(args.data, args.extra)
            else:
                items = processbench(args.data, args.traces)
            read_sets[name] = read(
                items, model, rule, args.out / key, likelihood=name == "best-of-n"
            )
    for name, items in read_sets.items():
        told_apart(name, items, judged(items))
    if "best-of-n" in read_sets:
        items = read_sets["best-of-n"]
        chosen("best of 8", items, judged(items), settled)
        if "processbench" in read_sets:
            others = {item.prompt for item in items}
            train = [item for item in read_sets["processbench"] if item.prompt not in others]
            chosen("best of 8, centroids of ProcessBench", items, judged(items, train), settled)


if __name__ == "__main__":
    main()
