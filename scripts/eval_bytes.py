#!/usr/bin/env python3
"""Measure byte-level decoding on prompts that end anywhere; every comparison is paired by prompt.

    scripts/eval_bytes.py                              # all, small
    scripts/eval_bytes.py --only cuts --prompts 150
    scripts/eval_bytes.py --only ensemble --prompts 40

cuts      sentences and lines of code, cut at a random byte: bits of the true next 8 bytes, and how
          often greedy decoding completes the next word, under the prompt's own tokens (naive),
          token healing, and exactly
infill    HumanEval infilling without fill-in-the-middle tokens: the text before the gap is the
          prompt, cut in mid-token; bits of the true middle's first 16 bytes, and how often greedy
          decoding writes the rest of its first line
ensemble  bits per byte of held-out text under SmolLM2, Gemma 3 270M, and the mean of both

Bits are clipped at 40 per byte. Prompts come in one fixed random order, so ``--prompts N`` takes
the first N. Every finished measurement is a line in ``--out``; run the command again to go on after
a stop. Intervals are 95 % percentile bootstraps over prompts.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import (
    ORDER_SEED,
    Experiment,
    Record,
    column,
    interval,
    paired_table,
    parsed,
    parser,
    run_arms,
    show,
)

from steersman.core import generate, load
from steersman.core.api import encode_prompt
from steersman.core.decode import Cover, Sample, TokenHealing
from steersman.core.decode.byte_level import Settings, byte_logprobs
from steersman.core.logits import Chain, Temperature
from steersman.core.model import Model
from steersman.core.profile import Profile

MOST_BITS = 40.0
GREEDY = Chain((Temperature(t=0),))
ARMS = ("naive", "healing", "exact")
STRATEGIES = {
    "naive": Sample(chain=GREEDY),
    "healing": TokenHealing(chain=GREEDY, inner=Sample(chain=GREEDY)),
    "exact": Cover(chain=GREEDY, inner=Sample(chain=GREEDY)),
}


# -- texts -------------------------------------------------------------------------------------


def sources(data: Path) -> dict[str, list[str]]:
    """Return sentences of articles and stories, and functions in Python."""
    articles = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    # WikiText writes " @-@ " and spaces around marks; undone, as nobody types so.
    articles = re.sub(r" @(.)@ ", r"\1", articles)
    articles = re.sub(r" ([,.;:!?)\]])", r"\1", articles).replace("( ", "(")
    stories = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {
        "articles": [p.strip() for p in articles.split("\n") if len(p) > 200 and "<unk>" not in p],
        "stories": [s.strip() for s in stories.split("<|endoftext|>") if len(s) > 200],
        "code": [r["prompt"] + r["canonical_solution"] for r in rows],
    }


def cut_texts(data: Path) -> list[tuple[str, str, str]]:
    """Return (kind, text before, text after) with 40 to 160 characters before a random cut."""
    rng = random.Random(ORDER_SEED)
    found = []
    kinds = sources(data)
    for texts in kinds.values():
        rng.shuffle(texts)
    for number in range(min(map(len, kinds.values()))):
        for kind, texts in kinds.items():
            text = texts[number]
            at = rng.randrange(40, min(160, len(text) - 40))
            inside = text[at - 1].isalnum() and text[at].isalnum()
            found.append((f"{kind}, {'inside' if inside else 'edge'}", text[:at], text[at:]))
    return found


def gaps(data: Path) -> list[tuple[str, str, str]]:
    """Return (kind, prefix, middle) of HumanEval's random spans and of lines cut in the middle.

    Prefixes are the last 600 characters at most, from a line's start on.
    """
    rng = random.Random(ORDER_SEED)
    files = {
        "random span": "HumanEval-RandomSpanInfillingLight.jsonl.gz",
        "single line": "HumanEval-SingleLineInfilling.jsonl.gz",
    }
    kinds: dict[str, list[tuple[str, str, str]]] = {}
    for kind, name in files.items():
        with gzip.open(data / "humaneval_infilling" / name, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rng.shuffle(rows)
        kinds[kind] = []
        for row in rows:
            prefix, middle = row["prompt"], row["canonical_solution"]
            if kind == "single line":  # these begin at a line's start: go on to some place in it
                body = len(middle) - len(middle.lstrip())
                if len(middle.rstrip()) - body < 6:
                    continue
                at = rng.randrange(body + 1, len(middle.rstrip()) - 2)
                prefix, middle = prefix + middle[:at], middle[at:]
            if middle.strip():
                begin = prefix.find("\n", len(prefix) - 600) + 1 if len(prefix) > 600 else 0
                kinds[kind].append((kind, prefix[begin:], middle))
    return [pair for both in zip(*kinds.values(), strict=False) for pair in both]


def passages(data: Path) -> list[tuple[str, str, str]]:
    """Return (kind, context, text to be scored) from the beginnings of texts."""
    rng = random.Random(ORDER_SEED + 1)
    kinds = sources(data)
    for texts in kinds.values():
        rng.shuffle(texts)
    found = []
    for number in range(min(map(len, kinds.values()))):
        for kind, texts in kinds.items():
            raw = texts[number]
            at = min(160, len(raw) // 2)
            found.append((kind, raw[:at], raw[at : at + 48]))
    return found


# -- experiments ---------------------------------------------------------------------------------


def bits(values: Any) -> np.ndarray:
    """Return bits per byte, clipped."""
    return np.minimum(-np.asarray(values) / np.log(2), MOST_BITS)


def settings_of(arm: str) -> Settings:
    """Return how an arm reads the prompt: the baselines know nothing of other spellings."""
    if arm == "exact":
        return Settings()
    return Settings(search=arm, exact=False)  # type: ignore[arg-type]


def continuation(model: Model, before: str, arm: str, tokens: int) -> tuple[str, int]:
    """Return what greedy decoding writes, and how many calls it took after the prompt."""
    profile = Profile(name=arm, strategy_name=arm, strategy=STRATEGIES[arm])
    found = generate(model, before, profile=profile, seed=0, max_tokens=tokens)
    return found.text, sum(found.timings.calls.values())


def cuts(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    _, before, after = prompt
    ids, data = encode_prompt(model.tokenizer, before), after.encode()[:8]
    counts: dict[str, float] = {}
    values = bits(byte_logprobs(model, ids, data, settings=settings_of(arm), counts=counts))
    match = re.match(r"\s*(\w+|[^\w\s]+)", after)
    word = match[0] if match else after[:4]
    text, _ = continuation(model, before, arm, 6)
    rest = text[len(word) :]
    ended = not rest or not (word[-1].isalnum() and rest[0].isalnum())
    return {
        "bits of 1": float(values[0]),
        "bits of 8": float(values.sum()),
        "word": float(text.startswith(word) and ended),
        "calls": counts["calls"] / len(data),
        "left out": counts["left_out"],
        "unchecked": counts["unchecked"],
    }


def infill(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    _, before, middle = prompt
    ids, data = encode_prompt(model.tokenizer, before), middle.encode()[:16]
    values = bits(byte_logprobs(model, ids, data, settings=settings_of(arm)))
    line = next((part for part in middle.split("\n") if part.strip()), "")
    text, _ = continuation(model, before, arm, min(24, 6 + len(line) // 3))
    written = next((part for part in text.split("\n") if part.strip()), "")
    # A span may end within a line: then its beginning has to be right.
    whole = "\n" in middle
    right = written.rstrip() == line.rstrip() if whole else written.startswith(line.rstrip())
    return {
        "bits of 1": float(values[0]),
        "bits of 16": float(values.sum()),
        "first line": float(right),
    }


def ensemble(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    _, before, after = prompt
    data = after.encode()
    taking = {"smollm2": [model], "gemma3-270m": [args.second], "both": [model, args.second]}[arm]
    prompts = [encode_prompt(m.tokenizer, before) for m in taking]
    counts: dict[str, float] = {}
    values = bits(byte_logprobs(taking, prompts, data, counts=counts))
    return {
        "bits per byte": float(values.mean()),
        "calls": counts["calls"] / len(data) / len(taking),
        "rows": counts["rows"] / max(counts["calls"], 1),
        "left out": counts["left_out"],
    }


EXPERIMENTS: dict[str, tuple[Experiment, tuple[str, ...], tuple[str, ...]]] = {
    "cuts": (cuts, ARMS, ("bits of 1", "bits of 8", "word")),
    "infill": (infill, ARMS, ("bits of 1", "bits of 16", "first line")),
    "ensemble": (ensemble, ("smollm2", "gemma3-270m", "both"), ("bits per byte",)),
}


def report(name: str, records: Sequence[Record], prompts: Sequence[Any]) -> None:
    """Print all prompts together, then by kind."""
    _, arms, figures = EXPERIMENTS[name]
    paired_table(name, records, arms, figures)
    kinds = sorted({kind for kind, _, _ in prompts})
    rows = []
    for kind in kinds:
        mine = [r for r in records if prompts[r["prompt"]][0] == kind]
        if not mine:
            continue
        row = [kind, str(len({r["prompt"] for r in mine}))]
        for figure in figures[1:] or figures:
            row += [interval(list(column(mine, arm, figure).values())) for arm in arms]
        rows.append(row)
    header = [f"{figure}, {arm}" for figure in figures[1:] or figures for arm in arms]
    show(f"{name} by kind", ("kind", "prompts", *header), rows)
    print()
    for figure in figures:
        last, middle = (column(records, arm, figure) for arm in (arms[2], arms[1]))
        away = interval([v - middle[p] for p, v in last.items() if p in middle])
        print(f"{arms[2]} - {arms[1]}, {figure}: {away}")
    if name == "ensemble":
        one, two, both = (column(records, arm, "bits per byte") for arm in arms)
        better = [v - min(one[p], two[p]) for p, v in both.items() if p in one and p in two]
        print(f"both - the better of the two, prompt by prompt: {interval(better)}")
    for figure in ("calls", "rows", "left out", "unchecked"):
        if any(figure in r["figures"] for r in records):
            means = [
                f"{arm} {np.mean(list(column(records, arm, figure).values())):.4f}" for arm in arms
            ]
            print(f"{figure}: {', '.join(means)}")


def main() -> None:
    made = parser(__doc__, out="eval_bytes.jsonl")
    made.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    made.add_argument("--second", default="gemma3-270m", help="model that joins for ensemble")
    args = parsed(made)
    opening = {"backend": args.backend, "threads": args.threads, "context": 1024}
    name_of_second = args.second
    with load(args.model, **opening) as model:
        print(f"{model.info.name} on {model.info.backend}, seed {args.seed}")
        for name in args.only:
            prompts = {"cuts": cut_texts, "infill": gaps, "ensemble": passages}[name](args.data)
            function, arms, _ = EXPERIMENTS[name]
            args.second = load(name_of_second, **opening) if name == "ensemble" else None
            try:
                report(name, run_arms(name, function, arms, model, prompts, args), prompts)
            finally:
                if args.second is not None:
                    args.second.close()


if __name__ == "__main__":
    main()
