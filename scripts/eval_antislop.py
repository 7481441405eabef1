#!/usr/bin/env python3
"""Measure how often banned phrases stand in stories, and what getting rid of them costs.

    scripts/eval_antislop.py                              # 50 stories of 150 tokens
    scripts/eval_antislop.py --prompts 10 --tokens 60
    scripts/eval_antislop.py --list phrases.txt           # a list of one's own

Without ``--list`` the list is the model's own: 100 words and 50 phrases of three words that its
plain stories (on other openings) use most often beyond what TinyStories does. All arms sample
through the same chain (min-p 0.05, temperature 0.8) with the same seeds:

plain       no ban
hard        antislop, factor 0
soft        antislop, factor 0.03125, kept where still the likeliest
logit bias  the first token of every banned text is removed everywhere

Finished texts are lines in ``--out``; run the command again to go on after a stop.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation import (
    column,
    interval,
    paired_table,
    parsed,
    parser,
    rep_n,
    run_arms,
    show,
    stories,
)

from steersman.core import load, stream
from steersman.core.decode.antislop.matching import Matcher
from steersman.core.decode.antislop.rules import Rule, read_phrases
from steersman.core.decode.antislop.transcript import Transcript
from steersman.core.decode.events import Finished, Note, TokenEvent, Withdrawn
from steersman.core.model import Model, Tokenizer
from steersman.core.profile import Profile, load_profile

ARMS = ("plain", "hard", "soft", "logit bias")
FIGURES = ("banned", "distinct2", "mean", "calls", "rewinds", "seconds")
WORDS, PHRASES = 100, 50


def profile_of(arm: str, banned: Sequence[str], tokenizer: Tokenizer) -> Profile:
    """Return the profile of one arm."""
    plain = load_profile("balanced").override({"temperature.t": 0.8, "generation.max_tokens": None})
    if arm == "logit bias":
        forms = {form for text in banned for form in (" " + text, text.capitalize())}
        first = {tokenizer.encode(form)[0] for form in forms}
        return plain.override({"logit_bias.bias": {str(token): -math.inf for token in first}})
    if arm == "plain":
        return plain
    changes = {"strategy": "antislop", "antislop.phrases": list(banned)}
    return plain.override(changes | {"antislop.factor": 0.03125 if arm == "soft" else 0.0})


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower().replace("\u2019", "'"))


def phrases_of(text: str) -> Iterator[str]:
    for sentence in re.split(r"[.!?;:,\n\"()]", text):
        said = words_of(sentence)
        for i in range(len(said) - 2):
            yield " ".join(said[i : i + 3])


def overused(texts: Sequence[str], human: str) -> list[str]:
    """Return the words and phrases with the highest ratio to a human text's frequency."""
    found: list[str] = []
    for of, most in ((words_of, WORDS), (phrases_of, PHRASES)):
        theirs, ours = Counter(of(human)), Counter(item for text in texts for item in of(text))
        total, whole = sum(ours.values()), sum(theirs.values())
        often = [item for item, n in ours.items() if n >= 3 and (len(item) > 3 or of is phrases_of)]
        ratio = {
            item: (ours[item] / total) ** 1.75 / ((theirs[item] + 1) / whole) for item in often
        }
        found += sorted(ratio, key=lambda item: -ratio[item])[:most]
    return found


def count(text: str, banned: Sequence[str]) -> int:
    """Return how many banned texts stand in ``text``, those within longer ones included."""
    matcher = Matcher([Rule(0, b, 0.0) for b in banned], stopwords=False, span=1, timeout=1.0)
    found, allowed = 0, set()
    transcript = Transcript(text=text, marks=tuple((i + 1, b"") for i in range(len(text))))
    # Everything is new to this search, so its window is the whole text.
    while (hit := matcher.find(transcript, 0, final=True, allowed=allowed)[0]) is not None:
        found += 1
        allowed.add((hit.token, hit.rule))
    return found


def story(model: Model, seed: int, prompt: Any, arm: str, args: Any) -> dict[str, float]:
    """Write one story and measure it."""
    profile = profile_of(arm, args.banned, model.tokenizer)
    tokens: list[TokenEvent] = []
    rewinds = suppressed = 0
    for event in stream(
        model, prompt, profile=profile, seed=seed, max_tokens=args.tokens, logprobs=0
    ):
        if isinstance(event, TokenEvent):
            tokens.append(event)
        elif isinstance(event, Withdrawn):
            del tokens[event.keep :]
        elif isinstance(event, Note):
            rewinds += "rewind" in event.values
            suppressed += "suppressed" in event.values
        elif isinstance(event, Finished):
            done = event
    ids = [t.id for t in tokens]
    values = [t.raw_logprob for t in tokens if t.raw_logprob is not None]
    args.texts[arm, prompt] = done.text
    return {
        "banned": 1000 * count(done.text, args.banned) / max(1, len(words_of(done.text))),
        "distinct2": 1 - rep_n(ids, 2),
        "mean": sum(values) / max(1, len(values)),
        "tokens": len(ids),
        "calls": sum(done.timings.calls.values()) / max(1, len(ids)),
        "rewinds": rewinds,
        "suppressed": suppressed,
        "seconds": done.timings.decode_s / max(1, len(ids)),
    }


def own_list(model: Model, prompts: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Return the list that the model's plain stories ask for; it is kept beside the results."""
    kept: Path = args.out.with_suffix(f".{args.seed}.{args.profiled}.{args.tokens}.list.json")
    if not kept.exists():
        plain, texts = profile_of("plain", (), model.tokenizer), []
        for number, prompt in enumerate(prompts[: args.profiled]):
            events = stream(
                model, prompt, profile=plain, seed=args.seed + number, max_tokens=args.tokens
            )
            texts += [event.text for event in events if isinstance(event, Finished)]
        human = (args.data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
        kept.write_text(json.dumps(overused(texts, human), indent=0), encoding="utf-8")
    found: list[str] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def main() -> None:
    made = parser(__doc__, out="eval_antislop.jsonl")
    made.set_defaults(prompts=50)
    made.add_argument("--tokens", type=int, default=150)
    made.add_argument("--profiled", type=int, default=50, help="openings that the list is made on")
    made.add_argument("--list", type=Path, help="phrases to ban: one per line, or a JSON list")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    made.add_argument("--show", action="store_true", help="print the list and the new texts")
    args = parsed(made)
    args.texts = {}
    prompts = stories(args.data)
    with load(args.model, backend=args.backend, threads=args.threads, context=1024) as model:
        if args.list is not None:
            args.banned = [phrase for phrase, _ in read_phrases(args.list)]
        else:
            args.banned = own_list(model, prompts[1000:], args)
        print(f"{model.info.name} on {model.info.backend}, seed {args.seed}")
        name = str(args.list) if args.list else "own"
        settings = {"tokens": args.tokens, "list": name, "size": len(args.banned)}
        records = run_arms("antislop", story, args.arms, model, prompts, args, **settings)
    paired_table("antislop", records, args.arms, FIGURES)
    rows = []
    for arm in args.arms:
        n = sum(column(records, arm, "tokens").values())
        s = sum(column(records, arm, "suppressed").values())
        rows.append(
            [arm, f"{n:.0f}", f"{s:.0f}", interval(column(records, arm, "tokens").values())]
        )
    show("totals", ("arm", "tokens", "suppressed", "tokens per text"), rows)
    if args.show:
        print("\nbanned:", ", ".join(args.banned))
        for (arm, prompt), text in args.texts.items():
            print(f"\n[{arm}] {prompt} | {text}")


if __name__ == "__main__":
    main()
