"""Build training windows for ``steersman train first`` from public test collections.

    python scripts/make_first_data.py --out windows.jsonl

XQuAD's English questions, SciFact's training claims, half of the queries of Cranfield and CISI,
and titles of SciFact's abstracts against their own text. Each window holds one relevant passage;
half of the others are drawn at random, which is easy, half come from BM25's first hits, which is
hard. A few queries are replaced by some words of the relevant passage itself. No query of TREC DL,
of SciFact's test claims or of the held-out halves is touched, and no passage of MS MARCO.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ir_sets import Collection, bm25, cisi, cranfield, data_folder, scifact_train, split, xquad

DEPTH = 20  # hits of BM25 that hard passages are drawn from
LONGEST_QUERY = 24  # words
SOURCES = ("xquad", "scifact", "cranfield", "cisi", "titles")


def windows(
    source: str,
    collection: Collection,
    *,
    each: int,
    args: argparse.Namespace,
    generator: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    """Yield ``each`` windows per judged query.

    Parameters
    ----------
    source : str
        Name kept in each line.
    collection : Collection
    each : int
    args : Namespace
        ``window`` (passages), ``words`` (of each), ``random`` and ``spans`` (shares).
    generator : numpy Generator
    """
    queries = collection.judged()
    ids = sorted(collection.corpus)
    for (qid, text), hits in zip(
        queries.items(), bm25(list(queries.values()), collection.corpus, DEPTH)
    ):
        gains = collection.qrels[qid]
        relevant = [d for d, gain in gains.items() if gain > 0 and d in collection.corpus]
        hard = [d for d, _ in hits if d not in relevant]
        for _ in range(each):
            best = str(generator.choice(relevant))
            window = [best]
            while len(window) < args.window:
                easy = generator.random() < args.random or not hard
                other = str(generator.choice(ids if easy else hard))
                if other not in window and other not in relevant:
                    window.append(other)
            passages = {d: _plain(collection.corpus[d]).split()[: args.words] for d in window}
            query, copied = text, False
            if generator.random() < args.spans:
                words = passages[best]
                count = int(generator.integers(4, 8))
                begin = int(generator.integers(max(1, len(words) - count)))
                query, copied = " ".join(words[begin : begin + count]), True
            generator.shuffle(window)
            yield {
                "span": copied,
                "source": source,
                "query": " ".join(query.split()[:LONGEST_QUERY]) if _long(query) else query,
                "passages": [" ".join(passages[d]) for d in window],
                "relevance": [int(d == best) for d in window],
            }


def _long(query: str) -> bool:
    return len(query.split()) > LONGEST_QUERY


def _plain(text: str) -> str:
    return " ".join(text.removeprefix("Title: ").split())


def titles(collection: Collection, count: int, generator: np.random.Generator) -> Collection:
    """Return documents without their titles, and some titles as queries for them."""
    bodies, named = {}, {}
    for docid, text in collection.corpus.items():
        title, _, body = text.removeprefix("Title: ").partition(" Content: ")
        if 4 <= len(title.split()) <= 20 and len(body.split()) >= 30:
            bodies[docid], named[docid] = body, title
    chosen = generator.choice(sorted(named), min(count, len(named)), replace=False).tolist()
    return Collection({d: named[d] for d in chosen}, bodies, {d: {d: 1} for d in chosen})


def main() -> None:
    """Parse arguments, build, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument(
        "--sources",
        nargs="+",
        choices=SOURCES,
        default=SOURCES,
        help="collections to draw from; Cranfield and CISI have no licence [all]",
    )
    parser.add_argument("--window", type=int, default=4, help="passages per window [4]")
    parser.add_argument("--words", type=int, default=28, help="of each passage [28]")
    parser.add_argument("--random", type=float, default=0.5, help="share of easy passages [0.5]")
    parser.add_argument("--spans", type=float, default=0.1, help="share of copied queries [0.1]")
    parser.add_argument("--titles", type=int, default=500, help="titles of SciFact [500]")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    claims = scifact_train(args.data)
    plan = [
        ("xquad", xquad(args.data), 2),
        ("scifact", claims, 2),
        ("cranfield", split(cranfield(args.data), "train"), 2),
        ("cisi", split(cisi(args.data), "train"), 2),
        ("titles", titles(claims, args.titles, generator), 1),
    ]
    lines = [
        line
        for source, collection, each in plan
        if source in args.sources
        for line in windows(source, collection, each=each, args=args, generator=generator)
    ]
    generator.shuffle(lines)  # type: ignore[arg-type]
    part = args.out.with_name(args.out.name + ".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(args.out)
    for source in dict.fromkeys(line["source"] for line in lines):
        print(source, sum(line["source"] == source for line in lines))


if __name__ == "__main__":
    main()
