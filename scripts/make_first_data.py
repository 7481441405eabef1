"""Build training windows for ``steersman train first`` from public test collections.

    python scripts/make_first_data.py --out first.jsonl

XQuAD's English questions, SciFact's training claims, half of the queries of Cranfield and CISI, and
titles of SciFact against their own abstracts, each with the hits of BM25 as the other passages of its window.
A passage's target rank: judged relevance first, then BM25's order, so that windows teach lexical
match as well. About half of the windows are shown in BM25's order, the rest shuffled; where BM25
has the relevant one first nearly always, it is moved to a random place. No query of TREC DL, of
SciFact's test claims or of the held-out halves is touched, and no passage of MS MARCO.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ir_sets import Collection, bm25, cisi, cranfield, data_folder, scifact_train, split, xquad

DEPTH = 30  # hits of BM25 that windows are drawn from


def windows(
    source: str,
    collection: Collection,
    *,
    size: int,
    each: int,
    easy: bool,
    generator: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    """Yield ``each`` windows per judged query.

    Parameters
    ----------
    source : str
        Name kept in each line.
    collection : Collection
    size : int
        Passages of a window.
    each : int
    easy : bool
        BM25 finds the relevant document too well: show it at a random place.
    generator : numpy Generator
    """
    queries = collection.judged()
    for (qid, query), hits in zip(
        queries.items(), bm25(list(queries.values()), collection.corpus, DEPTH)
    ):
        gains = collection.qrels[qid]
        ranked = [docid for docid, _ in hits]
        missing = [d for d, g in gains.items() if g > 0 and d not in ranked]
        # Relevant ones that BM25 misses come last in its order.
        ranked += [d for d in missing if d in collection.corpus][:size]
        relevant = [d for d in ranked if gains.get(d, 0) > 0]
        others = [d for d in ranked if gains.get(d, 0) <= 0]
        for _ in range(each):
            if not relevant or len(others) < size - 1:
                break
            count = int(min(len(relevant), generator.integers(1, 4), size - 1))
            near = others[: 3 * size]
            chosen = {
                *generator.choice(relevant, count, replace=False).tolist(),
                *generator.choice(near, size - count, replace=False).tolist(),
            }
            window = [d for d in ranked if d in chosen]
            best = sorted(window, key=lambda d: -gains.get(d, 0))  # stable: then BM25's order
            if generator.random() < 0.5:
                generator.shuffle(window)
            elif easy:
                moved = best[0]
                window.remove(moved)
                window.insert(int(generator.integers(size)), moved)
            yield {
                "source": source,
                "query": query,
                "passages": [collection.corpus[d] for d in window],
                "ranking": [window.index(d) for d in best],
            }


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
    parser.add_argument("--window", type=int, default=6)
    parser.add_argument("--titles", type=int, default=200, help="titles of SciFact [200]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    claims, papers = scifact_train(args.data), split(cranfield(args.data), "train")
    plan = [
        ("xquad", xquad(args.data), 1, True),
        ("scifact", claims, 1, True),
        ("cranfield", papers, 2, False),
        ("cisi", split(cisi(args.data), "train"), 4, False),
        ("scifact-titles", titles(claims, args.titles, generator), 1, True),
    ]
    lines = [
        line
        for source, collection, each, easy in plan
        for line in windows(
            source, collection, size=args.window, each=each, easy=easy, generator=generator
        )
    ]
    part = args.out.with_name(args.out.name + ".part")
    part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    part.replace(args.out)
    for source in dict.fromkeys(line["source"] for line in lines):
        print(source, sum(line["source"] == source for line in lines))


if __name__ == "__main__":
    main()
