#!/usr/bin/env python3
"""Measure what the number of banned phrases costs per token, in one run, in turn.

    scripts/bench_antislop.py                         # a toy without a model, then SmolLM2
    scripts/bench_antislop.py --only toy --rounds 9
    scripts/bench_antislop.py --list phrases.json     # real phrases instead of made-up ones

Made-up phrases share words with the text, so that the automaton is kept busy, yet never occur in
it: what is measured is watching, not going back. "toy" is the decode loop with a table of logits
in place of a model, "matching" the time of the search alone, at two lengths of the text.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from steersman.core import load, stream
from steersman.core.decode import Antislop
from steersman.core.decode.antislop.matching import Matcher
from steersman.core.decode.antislop.rules import Rule, read_phrases
from steersman.core.decode.antislop.transcript import Transcript
from steersman.core.decode.rng import Rng
from steersman.core.decode.types import Request, Token
from steersman.core.logits import Chain, MinP, Temperature
from steersman.core.model import Output
from steersman.core.profile import load_profile

COUNTS = (0, 100, 1000, 8000)
VOCAB = 1000
CHAIN = Chain((MinP(p=0.05), Temperature(t=0.8)))


class Words:
    """A tokenizer of a thousand made-up words."""

    special_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()

    def __init__(self) -> None:
        rng = random.Random(1)
        syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
        self.words = ["".join(rng.choices(syllables, k=3)) for _ in range(VOCAB)]

    def token_bytes(self, token: int) -> bytes:
        return b" " + self.words[token].encode()


def made_up(words: Sequence[str], count: int) -> list[str]:
    """Return phrases whose first two words may stand in the text and whose last may not."""
    rng = random.Random(2)
    return [" ".join([*rng.choices(words, k=2), "qu" + rng.choice(words)]) for _ in range(count)]


def toy(phrases: Sequence[str], tokens: int) -> float:
    """Return seconds per token of the loop's work without a model."""
    tokenizer: Any = Words()
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    table = np.random.default_rng(0).normal(size=(64, 1, VOCAB)).astype(np.float32) * 2
    request = Request(
        prompt=np.array([0]),
        models={"target": model},
        eos_ids=frozenset(),
        max_tokens=tokens,
        context=tokens + 1,
    )
    strategy, rng = Antislop(phrases=tuple(phrases), chain=CHAIN), Rng(0)
    state, step = strategy.init(request, rng)
    begun, made = time.perf_counter(), 0
    while step.finish is None:
        state, step = strategy.step(state, {"target": Output(logits=table[made % 64])}, rng)
        made += 1
    return (time.perf_counter() - begun) / tokens


def matching(phrases: Sequence[str], length: int) -> float:
    """Return seconds per token of the search alone, in a text of ``length`` tokens."""
    tokenizer: Any = Words()
    matcher = Matcher([Rule(0, p, 0.0) for p in phrases], stopwords=False, span=400, timeout=1.0)
    rng = random.Random(3)
    text = Transcript().extend((Token(id=rng.randrange(VOCAB)) for _ in range(length)), tokenizer)
    since, rounds = text.marks[-2][0], 2000
    begun = time.perf_counter()
    for _ in range(rounds):
        matcher.find(text, since)
    return (time.perf_counter() - begun) / rounds


def in_turn(measure: Callable[[int], float], rounds: int) -> dict[int, float]:
    """Return the median of each count's measurements, taken in turn."""
    found: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(rounds):
        for count in COUNTS:
            found[count].append(measure(count))
    return {count: statistics.median(values) for count, values in found.items()}


def show(title: str, rows: dict[int, float]) -> None:
    print(f"\n{title}\n\n| phrases | µs per token | against none |\n|---|---|---|")
    for count, seconds in rows.items():
        print(f"| {count} | {1e6 * seconds:.1f} | {seconds / rows[0]:.2f} |")


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--only", nargs="+", choices=("toy", "matching", "model"))
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--tokens", type=int, default=64, help="per text of the model")
    made.add_argument("--list", type=Path, help="a file of at least 8000 phrases")
    made.add_argument("--backend", default="llamacpp")
    made.add_argument("--threads", type=int, default=None)
    args = made.parse_args()
    parts = args.only or ["toy", "matching", "model"]
    if args.list is None:
        phrases = made_up(Words().words, max(COUNTS))
    else:
        phrases = [phrase for phrase, _ in read_phrases(args.list)][: max(COUNTS)]
    if "toy" in parts:
        for tokens in (200, 2000):
            rows = in_turn(lambda n, t=tokens: toy(phrases[:n], t), args.rounds)
            show(f"toy, texts of {tokens} tokens", rows)
    if "matching" in parts:
        for length in (100, 10_000):
            rows = in_turn(lambda n, t=length: matching(phrases[:n], t), args.rounds)
            show(f"matching alone, text of {length} tokens", rows)
    if "model" in parts:
        profile = load_profile("balanced")
        with load("smollm2", backend=args.backend, threads=args.threads, context=512) as model:

            def story(count: int) -> float:
                strategy = Antislop(phrases=tuple(phrases[:count]), chain=profile.strategy.chain)
                watched = replace(profile, strategy_name="antislop", strategy=strategy)
                options = {"profile": watched, "seed": 1, "max_tokens": args.tokens}
                *_, done = stream(model, "Once upon a time", **options)  # type: ignore[arg-type]
                return done.timings.decode_s / args.tokens  # type: ignore[union-attr]

            story(0)
            show(f"{model.info.name} on {model.info.backend}", in_turn(story, args.rounds))


if __name__ == "__main__":
    main()
