"""Measure zero-shot search with PromptReps beside BM25: nDCG@10 and recall@100, with intervals.

    python scripts/eval_search.py --work DIR --sets cranfield scifact
    python scripts/eval_search.py --work DIR --sets cranfield --words 50 --documents 400

Run it again with the same ``--work`` to go on after a stop: the index is built by a job that can be
killed, and every finished run is a file. Settings that change a figure have folders of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ir_sets import Collection, bm25, cisi, cranfield, data_folder, scifact, xquad

from steersman.core import build_index, load
from steersman.core.array import to_numpy
from steersman.core.decode.rng import Rng
from steersman.core.model import PAD, Capability, Forward, Model
from steersman.core.reranking.evaluate import Measured, compare, evaluate
from steersman.core.reranking.trec import read_run, write_run
from steersman.core.retrieval import PromptReps, Representer, Searcher, fuse, fuse_hybrid
from steersman.core.retrieval.represent import unit

SETS: dict[str, Callable[[Path], Collection]] = {
    "cranfield": cranfield,
    "scifact": scifact,
    "cisi": cisi,
    "xquad": xquad,
}
MEASURES = ("nDCG@10", "R@100")
DEPTH = 1000
Runs = dict[str, dict[str, float]]


def cut(text: str, words: int | None) -> str:
    """Return the first ``words`` words."""
    return text if words is None else " ".join(text.split()[:words])


def sample(collection: Collection, args: argparse.Namespace) -> Collection:
    """Return the collection as asked: some queries, some documents, cut documents.

    A sample of documents holds every relevant one of the chosen queries, and others drawn at
    random; that makes the task easier, for all systems alike.
    """
    judged = sorted(collection.judged())
    order = np.argsort(Rng(1).uniforms(0, 0, len(judged)), kind="stable")
    queries = {judged[i]: collection.queries[judged[i]] for i in order[: args.queries].tolist()}
    qrels = {
        qid: {d: r for d, r in collection.qrels[qid].items() if d in collection.corpus}
        for qid in queries
    }
    names = [docid for docid, text in collection.corpus.items() if text.strip()]
    if args.documents is not None:
        needed = {docid for found in qrels.values() for docid, r in found.items() if r > 0}
        rest = [docid for docid in names if docid not in needed]
        drawn = np.argsort(Rng(2).uniforms(0, 0, len(rest)), kind="stable")
        more = max(0, args.documents - len(needed))
        chosen = needed | {rest[i] for i in drawn[:more].tolist()}
        names = [docid for docid in names if docid in chosen]
    corpus = {docid: cut(collection.corpus[docid], args.words) for docid in names}
    return Collection(queries, corpus, {q: f for q, f in qrels.items() if any(f.values())})


def kept_run(path: Path, make: Callable[[], Runs]) -> Runs:
    """Return the run that ``path`` holds; make and write it if there is none."""
    if not path.exists():
        rows = [(qid, list(found), list(found.values())) for qid, found in make().items() if found]
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            write_run(file, rows, tag=path.stem)
        part.replace(path)
    return {qid: {h.docid: h.score for h in hits} for qid, hits in read_run(path).items()}


def promptreps(model: Model, held: Collection, folder: Path, args: argparse.Namespace) -> Any:
    """Return the dense and the sparse runs of all queries, and seconds spent on documents."""
    settings = PromptReps(
        max_tokens=args.max_tokens, expansion=args.expansion, centred=args.centred
    )
    began = time.process_time()
    index = build_index(
        model, held.corpus, folder / "index", settings=settings, rows=args.batch_size
    )
    spent = time.process_time() - began
    with Searcher(model, index, rows=args.batch_size) as searcher:
        found = searcher.representer.represent(list(held.queries.values()), "query")
    dense, sparse = {}, {}
    for qid, query in zip(held.queries, found):
        dense[qid], sparse[qid] = index.runs(query, depth=DEPTH)
    return dense, sparse, spent


def mean_pooled(model: Model, texts: list[str], args: argparse.Namespace) -> np.ndarray:
    """Return vectors (n, D) of texts without the prompt: the mean over the last hidden states."""
    layer, rows = model.info.layers, []
    needs = Capability.HIDDEN | Capability.ROWS | Capability.FORK
    with model.session(max_rows=1, needs=needs & model.capabilities) as session:
        for text in texts:
            ids = model.tokenizer.encode(text)[: args.max_tokens]
            tokens = np.array([ids or [0]], np.int64)
            assert (tokens != PAD).all()
            out = session.forward(Forward(keep=0, tokens=tokens, logits="none", hidden=(layer,)))
            states = to_numpy(model.norm(out.hidden[layer][0, :, :]))
            rows.append(unit(states.mean(0, keepdims=True))[0])
    return np.stack(rows)


def run_set(name: str, model: Model, args: argparse.Namespace) -> None:
    """Measure one set and print its table."""
    held = sample(SETS[name](args.data), args)
    made = f"d{args.documents or 'all'}-w{args.words or 'all'}-q{len(held.queries)}"
    setting = f"{model.info.backend}-t{args.max_tokens}-e{args.expansion}-c{int(args.centred)}"
    folder = args.work / name / made / setting
    folder.mkdir(parents=True, exist_ok=True)
    if args.estimate:
        with Representer(model, PromptReps(max_tokens=args.max_tokens)) as representer:
            rest = representer.encoder.rest
            tokens = sum(len(rest(text, "passage")) for text in held.corpus.values())
        print(f"{name}: {len(held.corpus)} documents, {tokens} tokens to read")
        return
    spent: dict[str, float] = {}
    runs: dict[str, Runs] = {}

    def random_run() -> Runs:
        names = list(held.corpus)
        draws = {q: Rng(3).uniforms(i, 0, len(names)) for i, q in enumerate(held.queries)}
        return {
            q: {names[int(i)]: float(u[i]) for i in np.argsort(-u)[:DEPTH]}
            for q, u in draws.items()
        }

    def lexical() -> Runs:
        hits = bm25(list(held.queries.values()), held.corpus, DEPTH)
        return {
            q: {docid: s for docid, s in found if s > 0} for q, found in zip(held.queries, hits)
        }

    def pooled() -> Runs:
        names = list(held.corpus)
        documents = mean_pooled(model, list(held.corpus.values()), args)
        queries = mean_pooled(model, list(held.queries.values()), args)
        scores = queries @ documents.T
        return {
            q: {names[int(i)]: float(row[i]) for i in np.argsort(-row)[:DEPTH]}
            for q, row in zip(held.queries, scores)
        }

    runs["random"] = kept_run(folder / "random.run", random_run)
    runs["BM25"] = kept_run(folder / "bm25.run", lexical)
    if args.mean_pooled:
        runs["mean-pooled, no prompt"] = kept_run(folder / "pooled.run", pooled)
    files = {side: folder / f"{side}.run" for side in ("dense", "sparse")}
    if not all(path.exists() for path in files.values()):
        dense, sparse, spent["documents"] = promptreps(model, held, folder, args)
        kept_run(files["dense"], lambda: dense)
        kept_run(files["sparse"], lambda: sparse)
    runs |= {side: kept_run(path, dict) for side, path in files.items()}
    hybrid: Runs = {}
    three: Runs = {}
    for qid in held.queries:
        dense, sparse = runs["dense"].get(qid, {}), runs["sparse"].get(qid, {})
        hybrid[qid] = dict(fuse_hybrid(dense, sparse)[:DEPTH])
        three[qid] = dict(fuse([hybrid[qid], runs["BM25"].get(qid, {})], [0.5, 0.5])[:DEPTH])
    runs |= {"hybrid": hybrid, "hybrid + BM25": three}
    _print(name, held, runs, folder, spent)


def _print(
    name: str, held: Collection, runs: dict[str, Runs], folder: Path, spent: dict[str, float]
) -> None:
    measured: dict[str, list[Measured]] = {
        system: evaluate(run, held.qrels, MEASURES) for system, run in runs.items()
    }
    print(f"\n{name}: {len(held.corpus)} documents, {len(held.qrels)} queries", end="")
    print(f"; {spent['documents']:.0f} CPU seconds for the documents" if spent else "")
    print(f"\n| | {' | '.join(MEASURES)} | {MEASURES[0]} against BM25 |\n|---|---|---|---|")
    figures: dict[str, Any] = {}
    for system, found in measured.items():
        cells = [
            f"{m.value:.3f} [{m.interval[0]:.3f}, {m.interval[1]:.3f}]" for m in found if m.interval
        ]
        against = ""
        if system != "BM25":
            gap = compare(found[0], measured["BM25"][0])
            low, high = gap.interval or (float("nan"),) * 2
            against = f"{gap.value:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(f"| {system} | {' | '.join(cells)} | {against} |")
        figures[system] = {m.name: [m.value, m.interval] for m in found}
    (folder / "figures.json").write_text(json.dumps(figures | {"spent": spent}, indent=1))


def main() -> int:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of indexes and runs")
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["cranfield", "scifact"])
    parser.add_argument("--words", type=int, help="words kept of each document [all]")
    parser.add_argument("--documents", type=int, help="size of a sample of documents [all]")
    parser.add_argument("--queries", type=int, help="queries of the fixed random order [all]")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens read of each text")
    parser.add_argument("--expansion", type=int, default=0)
    parser.add_argument("--centred", action="store_true")
    parser.add_argument("--mean-pooled", action="store_true", help="also without the prompt")
    parser.add_argument("--estimate", action="store_true", help="count the tokens and stop")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--setting", choices=["reproducible", "fast"], default="fast")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"{args.data}: no such folder; set STEERSMAN_DATA or give --data")
    options: dict[str, Any] = {"setting": args.setting} if args.backend != "mlx" else {}
    with load(args.model, backend=args.backend, threads=args.threads, **options) as model:
        for name in args.sets:
            run_set(name, model, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
