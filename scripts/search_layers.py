#!/usr/bin/env python3
"""Find which layers of a model can be left out at the least cost, by a greedy search.

    scripts/search_layers.py                             # SmolLM2: 30 layers down to 15
    scripts/search_layers.py --keep 10 --tokens 1024
    scripts/search_layers.py --try 0-9,20-29 --try 20    # only measure these choices

One layer at a time is left out: the one whose loss moves the next-token distributions of a text
least, in mean KL from those of the whole model. What is found is measured on another text, next to
simple choices of the same size. The layers computed are the whole model's own, so nothing is loaded
twice (torch, native path). Every step is a line in ``--out``; the same command goes on after a
stop.

Figures: kl is mean KL(whole || kept) in nats, top1 the share of positions with the same likeliest
token, overlap the mean of sum(min(p, q)): the share of tokens drafted by sampling that speculative
sampling accepts (arXiv:2211.17192).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import parsed, parser

from steersman.core import load
from steersman.core.array import array_namespace, to_numpy
from steersman.core.errors import UsageError
from steersman.core.layers import choose_layers, layers_text
from steersman.core.model import Capability, Forward, Model
from steersman.core.ops import kl_divergence, softmax

CHUNK = 128


def all_logits(model: Model, tokens: Sequence[int]) -> list[Any]:
    """Return the logits of every position, in pieces of (CHUNK, V) on the model's device."""
    ids = np.asarray(tokens, np.int64)[None]
    with model.session(needs=Capability.ALL_LOGITS, context=len(tokens)) as session:
        return [
            session.forward(Forward(keep=at, tokens=ids[:, at : at + CHUNK], logits="all")).logits[
                0
            ]
            for at in range(0, ids.shape[1], CHUNK)
        ]


def figures(whole: Sequence[Any], kept: Sequence[Any]) -> dict[str, float]:
    """Compare two lists of logits; see the module."""
    xp = array_namespace(*whole)
    kl, top1, overlap = [], [], []
    for p, q in zip(whole, kept, strict=True):
        kl.append(to_numpy(kl_divergence(p, q)))
        top1.append(to_numpy(xp.argmax(p, axis=-1) == xp.argmax(q, axis=-1)))
        overlap.append(to_numpy(xp.sum(xp.minimum(softmax(p), softmax(q)), axis=-1)))
    return {
        name: round(float(np.concatenate(values).mean()), 4)
        for name, values in (("kl", kl), ("top1", top1), ("overlap", overlap))
    }


class Search:
    """The whole model's answers to one text, and the log of what was measured against them."""

    def __init__(self, model: Model, tokens: Sequence[int], text: str, log: Path) -> None:
        self.model, self.tokens, self.log = model, tokens, log
        self.about = {"model": model.info.fingerprint, "dtype": model.info.dtype, "text": text,
                      "tokens": len(tokens)}  # fmt: skip
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        mine = [r for r in records if all(r.get(k) == v for k, v in self.about.items())]
        self.known: dict[str, dict[str, float]] = {r["layers"]: r["figures"] for r in mine}
        self._whole: list[Any] | None = None

    def measure(self, layers: Sequence[int]) -> dict[str, float]:
        """Return the figures of a choice, measured now or read from the log."""
        text = layers_text(layers)
        if text not in self.known:
            if self._whole is None:
                self._whole = all_logits(self.model, self.tokens)
            small = self.model.with_layers(tuple(layers))
            if small is None:
                raise UsageError(f"{self.model.info.backend}: cannot share weights; use torch")
            found = figures(self._whole, all_logits(small, self.tokens))
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.about | {"layers": text, "figures": found}) + "\n")
            self.known[text] = found
        return self.known[text]

    def greedy(self, keep: int, candidates: int) -> dict[int, tuple[int, ...]]:
        """Leave out one layer at a time until ``keep`` are left; return the choice of each size.

        From the second step on only the ``candidates`` layers are tried that cost least when last
        tried: a layer seldom costs less when others are gone.
        """
        layers = tuple(range(self.model.info.layers))
        cost = dict.fromkeys(layers, 0.0)
        found = {}
        while len(layers) > keep:
            tried = sorted(layers, key=lambda i: cost[i])[: candidates if found else None]
            for i in tried:
                cost[i] = self.measure([x for x in layers if x != i])["kl"]
            out = min(tried, key=lambda i: cost[i])
            layers = tuple(x for x in layers if x != out)
            found[len(layers)] = layers
            print(f"{len(layers)}: {layers_text(layers)}  {self.measure(layers)}", flush=True)
        return found


def simple_choices(total: int, size: int) -> dict[str, tuple[int, ...]]:
    """Return what one would take without a search: the beginning, both ends, every so manieth."""
    half = (size + 1) // 2
    return {
        "the first": tuple(range(size)),
        "both ends": (*range(half), *range(total - (size - half), total)),
        "spread": tuple(sorted({round(i * (total - 1) / (size - 1)) for i in range(size)})),
    }


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__, out="layers.jsonl")
    made.add_argument("--keep", type=int, default=15, help="layers to go down to")
    made.add_argument("--tokens", type=int, default=512, help="tokens of the final figures")
    made.add_argument("--search-tokens", type=int, default=256)
    made.add_argument("--candidates", type=int, default=8, help="layers tried per step")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--show", type=int, nargs="*", default=[25, 20, 15], metavar="SIZE")
    made.add_argument("--try", dest="tried", action="append", default=[], metavar="LAYERS")
    args = parsed(made)
    backend = "torch" if args.backend == "auto" else args.backend
    model = load(args.model, backend=backend, dtype=args.dtype, threads=args.threads,
                 setting="fast", context=max(args.tokens, args.search_tokens))  # fmt: skip
    searches = {}
    words = (args.data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    half = words.index("\n", len(words) // 2) + 1
    for name, begin, count in (("begin", 0, args.search_tokens), ("middle", half, args.tokens)):
        ids = model.tokenizer.encode(words[begin : begin + 20 * count])
        searches[name] = Search(model, ids[:count], f"wikitext2 valid {name}", args.out)
    total = model.info.layers
    rows: list[tuple[str, Sequence[int]]] = [
        ("tried", choose_layers(said, total, model=args.model) or range(total))
        for said in args.tried
    ]
    if not args.tried:
        found = searches["begin"].greedy(args.keep, args.candidates)
        for size in args.show:
            rows += [("searched", found[size])] if size in found else []
            rows += simple_choices(total, size).items() if 1 < size < total else []
    print(f"\nOn {args.tokens} other tokens:")
    for name, layers in rows:
        values = searches["middle"].measure(layers)
        figure = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
        print(f"{len(layers):3}  {name:10} {figure}  {layers_text(layers)}")


if __name__ == "__main__":
    main()
