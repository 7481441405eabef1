#!/usr/bin/env python3
"""Measure token values: additions that a small model gets right now and then.

    scripts/eval_value.py                     # all: texts, heads, search; goes on where it stopped
    scripts/eval_value.py --train 20 --samples 8 --prompts 5          # a quick look

1. Additions "22 + 14" after six examples, made by a seeded generator; those for training and those
   for the test share no question.
2. Texts of the training questions; heads with token, outcome and step labels on the same texts.
3. On the test questions: texts again, for the values' error and for what takes no search (one
   sample, majority, mean log-probability, best of n by a head, vote by a head), and every search.

All that takes n texts has the same model, the same number n of rows and about the same number of
calls; the first n of the sampled texts are used. Errors of values are mean squared differences from
the share of right texts among all that begin the same, over prefixes that at least --least texts
share and that have not ended.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import ROOT, interval, paired_table, parser, run_arms, show

from steersman.core import load, open_session
from steersman.core.api import generate
from steersman.core.backend import trainer
from steersman.core.model import Model
from steersman.core.profile import Profile, load_profile
from steersman.core.values import (
    ValueHead,
    ValueShape,
    prefix_tree,
    read_value_head,
    save_value_head,
)
from steersman.core.values.features import extract, features_path, read_dataset
from steersman.core.values.rollouts import (
    Question,
    Rollout,
    RolloutSettings,
    comparable,
    read_rollouts,
    roll_out,
)

LABELS = ("token", "outcome", "step")
SHOTS = 6


def additions(seed: int, train: int, test: int, low: int, high: int) -> list[Question]:
    """Return ``train`` and then ``test`` questions, all different, after the same examples."""
    shuffler = random.Random(seed)
    pairs = [(a, b) for a in range(low, high + 1) for b in range(low, high + 1)]
    shuffler.shuffle(pairs)
    if SHOTS + train + test > len(pairs):
        raise SystemExit(f"--high {high}: only {len(pairs)} different additions; raise it")
    shots = []
    for a, b in pairs[:SHOTS]:
        shots.append({"role": "user", "content": f"{a} + {b}"})
        shots.append({"role": "assistant", "content": f"{a} + {b} = {a + b}"})
    return [
        Question(prompt=[*shots, {"role": "user", "content": f"{a} + {b}"}], answer=str(a + b))
        for a, b in pairs[SHOTS : SHOTS + train + test]
    ]


def sampled(
    folder: Path, questions: Sequence[Question], model: Model, settings: RolloutSettings, name: str
) -> list[Rollout]:
    """Return the texts of the questions, their hidden states written beside them."""
    from tqdm import tqdm

    with tqdm(total=len(questions), desc=f"{name}: texts") as bar:
        roll_out(folder, questions, model, settings, progress=bar.update)
    rollouts = list(read_rollouts(folder))[: len(questions)]
    with tqdm(total=len(rollouts), desc=f"{name}: hidden states") as bar:
        extract(folder, rollouts, model, layer=model.info.layers, progress=bar.update)
    return rollouts


def heads(
    folder: Path, rollouts: Sequence[Rollout], model: Model, args: argparse.Namespace
) -> dict[str, Path]:
    """Return a trained head's file per kind of labels."""
    module = trainer("value")
    pieces = {i: model.tokenizer.token_bytes(i).strip() for i in range(model.info.vocab_size)}
    steps = frozenset(i for i, piece in pieces.items() if piece in (b"+", b"="))
    made = {}
    for labels in LABELS:
        name = f"{labels}-{args.width}-{args.batch}-{args.epochs}-{len(rollouts)}"
        path = folder / f"{name}.safetensors"
        made[labels] = path
        if path.exists():
            continue
        data = read_dataset(
            folder, rollouts, layer=model.info.layers, labels=labels, step_tokens=steps
        )
        settings = module.ValueTraining(batch=args.batch, epochs=args.epochs, seed=args.seed)
        shape = ValueShape(features=model.info.width, width=args.width)
        found = module.train_value(data, shape, settings, threads=args.threads)
        facts = {"labels": labels, "error": found.error, "constant": found.constant}
        print(f"head of {labels} labels, held-out questions: {facts}, auc {found.auc:.3f}")
        head = ValueHead(
            shape=shape, weights=found.weights, layer=model.info.layers,
            model=model.info.fingerprint, facts=facts,
        )  # fmt: skip
        save_value_head(head, path)
    return made


# -- without a search --------------------------------------------------------------------------


def node_values(folder: Path, number: int, head: ValueHead, model: Model) -> np.ndarray:
    """Return a head's values of all prefixes of one test question."""
    from steersman.core.values import head_values

    hidden = np.load(features_path(folder, model.info.layers, number), allow_pickle=False)
    return np.asarray(head_values(head.weights, hidden))


def value_errors(
    folder: Path, rollouts: Sequence[Rollout], made: Mapping[str, Path], model: Model, least: int
) -> None:
    """Print the error of every head on prefixes of the test questions that many texts share."""
    errors: dict[str, list[float]] = defaultdict(list)
    depths, count = [], 0
    base = float(np.mean([np.mean(r.right) for r in rollouts]))
    held = {labels: read_value_head(path) for labels, path in made.items()}
    for number, rollout in enumerate(rollouts):
        tree = prefix_tree(rollout.texts, rollout.right)
        depths.append(tree.sharing_depth)
        open_ = np.ones(len(tree.tokens), bool)
        open_[[path[-1] for path in tree.paths if len(path)]] = False
        chosen = np.flatnonzero(open_ & (tree.counts >= least))
        if not len(chosen):
            continue
        count += len(chosen)
        weights = tree.counts[chosen]
        for labels, head in held.items():
            found = node_values(folder, number, head, model)[chosen]
            gap = (np.clip(found, 0, 1) - tree.values[chosen]) ** 2
            errors[labels].append(float(np.average(gap, weights=weights)))
        gap = (base - tree.values[chosen]) ** 2
        errors["share of right texts"].append(float(np.average(gap, weights=weights)))
    rows = []
    for name, values in errors.items():
        row = [name, interval(values)]
        if name != "token":
            row[1] += f"; {interval([a - b for a, b in zip(values, errors['token'])])}"
        rows.append(row)
    show(
        f"squared error of values: {len(errors['token'])} questions, {count} prefixes; texts share "
        f"{np.mean(depths):.1f} tokens with another; after the semicolon: difference from token",
        ("labels", "error"),
        rows,
    )


def picks(
    rollout: Rollout, answer: str, values: Mapping[str, np.ndarray], count: int
) -> dict[str, float]:
    """Return for every choice among the first ``count`` texts whether it is right."""
    tree = prefix_tree(rollout.texts, rollout.right)
    answers, right = rollout.answers[:count], rollout.right[:count]
    votes = Counter(a for a in answers if a)
    found = {
        "sample": float(np.mean(right)),
        "majority": float(bool(votes) and votes.most_common(1)[0][0] == answer),
        "mean logprob": float(right[int(np.argmax(rollout.logprobs[:count]))]),
        "some text": float(any(right)),
    }
    for labels, nodes in values.items():
        last = [float(nodes[path[-1]]) for path in tree.paths[:count]]
        found[f"best by {labels}"] = float(right[int(np.argmax(last))])
        weights: dict[str, float] = defaultdict(float)
        for said, value in zip(answers, last):
            weights[said] += max(value, 0.0)
        best = max(weights, key=lambda said: weights[said])
        found[f"vote by {labels}"] = float(best == answer)
    return found


# -- all of it -----------------------------------------------------------------------------------


def searches(made: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Profile]:
    """Return the profiles of the searches; all hold ``candidates`` rows."""
    base = load_profile("value-beam").override(
        {"value_beam.candidates": args.candidates, "value_beam.beams": args.beams}
    )
    arms = {
        "plain beam": load_profile("beam").override({"beam.beams": args.candidates}),
        "search by logprob": base,
    }
    for labels, path in made.items():
        arms[f"search by {labels}"] = base.override({"value_beam.value_file": str(path)})
    arms["search by token, copies kept"] = arms["search by token"].override(
        {"value_beam.dedup": False}
    )
    return arms


def main() -> None:
    made = parser(__doc__, out="eval_value.jsonl")
    made.set_defaults(prompts=60, backend="llamacpp")
    made.add_argument("--work", type=Path, default=ROOT / "out" / "eval_value")
    made.add_argument("--train", type=int, default=120, help="training questions")
    made.add_argument("--samples", type=int, default=16, help="texts per question")
    made.add_argument("--low", type=int, default=10)
    made.add_argument("--high", type=int, default=39)
    made.add_argument("--tokens", type=int, default=16, help="of a text")
    made.add_argument("--candidates", type=int, default=8)
    made.add_argument("--beams", type=int, default=2)
    made.add_argument("--width", type=int, default=0, help="hidden units of the head")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--epochs", type=int, default=40)
    made.add_argument("--least", type=int, default=4, help="texts that share a measured prefix")
    args = made.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    questions = additions(args.seed, args.train, args.prompts, args.low, args.high)
    training, test = questions[: args.train], questions[args.train :]
    settings = RolloutSettings(
        samples=max(args.samples, args.candidates), rows=args.samples, max_tokens=args.tokens,
        seed=args.seed,
    )  # fmt: skip
    options = {"backend": args.backend, "threads": args.threads, "context": 512}
    with load(args.model, **options) as model, open_session(model) as session:
        name = f"{args.low}-{args.high}-{args.train}-{args.seed}-{settings.samples}"
        folder = args.work / f"train-{name}"
        rollouts = sampled(folder, training, model, settings, "training")
        files = heads(folder, rollouts, model, args)
        held = {labels: read_value_head(path) for labels, path in files.items()}
        test_folder = args.work / f"test-{name}"
        later = RolloutSettings(**{**vars(settings), "seed": args.seed + 1_000_000})
        tested = sampled(test_folder, test, model, later, "test")
        value_errors(test_folder, tested, files, model, args.least)
        arms = searches(files, args)
        free = ["sample", "majority", "mean logprob", "some text"]
        free += [f"{choice} by {labels}" for choice in ("best", "vote") for labels in LABELS]

        def measure(
            model: Model, seed: int, question: Question, arm: str, _: Any
        ) -> dict[str, float]:
            wanted = comparable(question.answer, "number")
            number = test.index(question)
            if arm in free:
                values = {k: node_values(test_folder, number, h, model) for k, h in held.items()}
                rollout = tested[number]
                calls = max(map(len, rollout.texts[: args.candidates]))
                right = picks(rollout, wanted, values, args.candidates)[arm]
                return {"right": right, "calls": calls}
            found = generate(
                model,
                question.prompt,
                profile=arms[arm],
                seed=seed,
                max_tokens=args.tokens,
                session=session,  # the examples before the question are computed once
            )
            calls = sum(found.timings.calls.values())
            return {"right": float(comparable(found.text, "number") == wanted), "calls": calls}

        records = run_arms(
            "additions", measure, [*free, *arms], model, test, args,
            low=args.low, high=args.high, train=args.train, samples=settings.samples,
            candidates=args.candidates, beams=args.beams, width=args.width, batch=args.batch,
            epochs=args.epochs, tokens=args.tokens,
        )  # fmt: skip
        order = ["majority", *(a for a in [*free, *arms] if a != "majority")]
        paired_table("additions", records, order, ("right", "calls"))


if __name__ == "__main__":
    main()
