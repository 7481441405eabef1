#!/usr/bin/env python3
"""Measure whether OPERA keeps long answers closer to a passage than beam search does.

    scripts/eval_opera.py --prompts 30
    scripts/eval_opera.py --prompts 30 --tokens 128 --beams 3

Paragraphs of XQuAD (English), each with one of its questions, "answer in detail", or with the task
to summarise, in turn. Figures per text: the share of its numbers and names (capitalised words
within sentences) that the passage does not hold, repeated 4-grams, mean attention on the passage
(last layer, strongest heads), how often the search went back, and seconds.

Every finished measurement is a line in ``--out``; run the command again to go on after a stop.
Intervals are 95 % percentile bootstraps over passages.
"""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import ORDER_SEED, paired_table, parsed, parser, rep_n, run_arms

from steersman.core import load, stream
from steersman.core.array import to_numpy
from steersman.core.decode.events import Finished, Note, Started
from steersman.core.decode.overtrust import strongest_heads
from steersman.core.evidence import evidence_spans, with_evidence
from steersman.core.model import Capability, Forward, Model

SUMMARY = "Summarise this passage in detail."
ARMS = ("beam", "greedy", "beam, no repeats", "opera", "opera, sigma 100", "opera, cheap")
LONGEST = 1500  # characters of a passage


def passages(data: Path) -> list[tuple[str, str]]:
    """Return (passage, task), shuffled."""
    text = (data / "xquad" / "xquad.en.json").read_text(encoding="utf-8")
    paragraphs = [p for article in json.loads(text)["data"] for p in article["paragraphs"]]
    paragraphs = [p for p in paragraphs if len(p["context"]) <= LONGEST]
    random.Random(ORDER_SEED).shuffle(paragraphs)
    questions = [f"{p['qas'][0]['question']} Answer in detail." for p in paragraphs]
    tasks = [SUMMARY if i % 2 else q for i, q in enumerate(questions)]
    return [(p["context"].strip(), task) for p, task in zip(paragraphs, tasks, strict=True)]


def settings(arm: str, args: Any) -> dict[str, Any]:
    """Return profile and overrides of one arm."""
    if arm == "greedy":
        return {"profile": "greedy"}
    if arm.startswith("beam"):
        overrides: dict[str, Any] = {"beam.beams": args.beams}
        if arm != "beam":  # a token that would make a run of four repeat loses 100 nats
            dry = {"multiplier": 100, "allowed_length": 3, "base": 1, "sequence_breakers": []}
            overrides |= {f"dry.{key}": value for key, value in dry.items()}
        return {"profile": "beam", "overrides": overrides}
    overrides = {"opera.beams": args.beams, "opera.candidates": args.candidates}
    if arm == "opera, sigma 100":
        overrides["opera.sigma"] = 100
    if arm == "opera, cheap":
        overrides |= {"opera.candidates": 1, "opera.threshold": 25}
    return {"profile": "opera", "overrides": overrides}


def unsupported(text: str, passage: str) -> float:
    """Return the share of numbers and names that ``passage`` does not hold; nan without any."""
    held = set(re.findall(r"[\w]+", passage.lower()))
    numbers = re.findall(r"\d+", text)
    names = [
        m.group().lower()
        for m in re.finditer(r"[A-Z][a-z]+", text)
        if not re.search(r"(^|[.!?:\"*\n])\W*$", text[: m.start()])
    ]
    said = [*numbers, *names]
    return sum(s not in held for s in said) / len(said) if said else float("nan")


def attention_on(model: Model, ids: list[int], begin: int, spans: Any) -> float:
    """Return the mean share of attention that tokens from ``begin`` on pay to ``spans``."""
    last = model.info.layers - 1
    needs = Capability.ATTENTIONS | Capability.ALL_LOGITS
    with model.session(needs=needs, context=len(ids) + 8) as session:
        ask = Forward(keep=0, tokens=np.array([ids]), logits="none", attentions=(last,))
        attention = to_numpy(session.forward(ask).attentions[last])  # (1, H, n, S)
    shares = []
    for row in range(begin, len(ids)):
        weights = to_numpy(strongest_heads(attention[:, :, row : row + 1, :]))[0]
        shares.append(sum(weights[a:b].sum() for a, b in spans))
    return float(np.mean(shares)) if shares else float("nan")


def grounded(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    passage, task = prompt
    chat = with_evidence([{"role": "user", "content": task}], [passage])
    begun = time.perf_counter()
    ids: list[int] = []
    rewinds = calls = 0
    events = stream(
        model, chat, seed=seed, max_tokens=args.tokens, evidence=[passage], **settings(arm, args)
    )
    for event in events:
        if isinstance(event, Started):
            ids += event.prompt_token_ids
        elif isinstance(event, Note):
            rewinds += "rewind" in event.values
        elif isinstance(event, Finished):
            text, tokens = event.text, event.token_ids
            calls = sum(event.timings.calls.values())
    seconds = time.perf_counter() - begun
    spans = evidence_spans(model.tokenizer, ids, [passage])
    return {
        "unsupported": unsupported(text, passage),
        "rep4": rep_n(tokens, 4),
        "attention": attention_on(model, [*ids, *tokens], len(ids), spans),
        "rewinds": rewinds,
        "tokens": len(tokens),
        "calls": calls,
        "seconds": seconds,
    }


def main() -> None:
    made = parser(__doc__, out="eval_opera.jsonl")
    made.add_argument("--tokens", type=int, default=96)
    made.add_argument("--beams", type=int, default=2)
    made.add_argument("--candidates", type=int, default=3)
    made.add_argument("--dtype", default="auto")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parsed(made)
    options = {"backend": args.backend, "threads": args.threads, "dtype": args.dtype}
    with load(args.model, context=1024, **options) as model:
        print(f"{model.info.name} on {model.info.backend}, {model.info.dtype}, seed {args.seed}")
        records = run_arms(
            "grounded", grounded, args.arms, model, passages(args.data), args,
            tokens=args.tokens, beams=args.beams, candidates=args.candidates,
            dtype=model.info.dtype,
        )  # fmt: skip
        figures = ("unsupported", "rep4", "attention", "rewinds", "tokens", "calls", "seconds")
        paired_table("grounded", records, args.arms, figures)


if __name__ == "__main__":
    main()
