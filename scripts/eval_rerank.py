"""Measure reranking on TREC DL19, SciFact and Cranfield: first stage against first and generate.

    python scripts/eval_rerank.py --work DIR                      # everything, resumable
    python scripts/eval_rerank.py --work DIR --sets dl19 --queries 10 --methods first

Run it again with the same ``--work`` to go on after a stop, or with a larger ``--queries`` to
extend: the queries come in one fixed random order. ``--work`` then holds, per set, the requests,
the judgements (``qrels.txt``) and one TREC run and one JSON-lines file per method. MS MARCO
passages, which DL19 is made of, may not be published: keep ``--work`` out of repositories.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import ir_sets
import numpy as np

from steersman.core import load
from steersman.core.adapters import rerank_options
from steersman.core.decode.rng import Rng
from steersman.core.fusion import reciprocal_ranks
from steersman.core.reranking import First, Generate, Reranker
from steersman.core.reranking.evaluate import Measured, bootstrap_interval, compare, evaluate
from steersman.core.reranking.io import Request, dump_line, read_requests
from steersman.core.reranking.job import (
    RecordLog,
    digest_files,
    job_settings,
    run_job,
    shuffle,
    write_run_from_log,
)
from steersman.core.reranking.trec import read_qrels, read_run, write_run

Qrels = ir_sets.Qrels
SHUFFLE_SEED = 1


# -- the sets: (requests, qrels) -----------------------------------------------------------------


def _dl19(data: Path, depth: int) -> tuple[list[dict[str, Any]], Qrels]:
    queries, hits, qrels = ir_sets.dl19(data)
    return [_request(q, text, hits[q][:depth]) for q, text in queries.items()], qrels


def _searched(
    collect: Callable[[Path], ir_sets.Collection], part: str | None = None
) -> Callable[[Path, int], tuple[list[dict[str, Any]], Qrels]]:
    """Return a set whose candidates bm25s finds; ``part`` takes one half of its queries."""

    def make(data: Path, depth: int) -> tuple[list[dict[str, Any]], Qrels]:
        found = collect(data)
        if part is not None:
            found = ir_sets.split(found, part)
        hits = ir_sets.bm25(list(found.queries.values()), found.corpus, depth)
        rows = [
            _request(qid, query, [(d, score, found.corpus[d]) for d, score in row])
            for (qid, query), row in zip(found.queries.items(), hits)
        ]
        return rows, found.qrels

    return make


SETS = {
    "dl19": _dl19,
    "scifact": _searched(ir_sets.scifact),
    "cranfield": _searched(ir_sets.cranfield),
    # The halves that scripts/make_first_data.py leaves out.
    "cranfield-held-out": _searched(ir_sets.cranfield, "held-out"),
    "cisi-held-out": _searched(ir_sets.cisi, "held-out"),
}


def _request(qid: str, query: str, hits: list[tuple[str, float, str]]) -> dict[str, Any]:
    rows = [{"docid": docid, "score": score, "doc": text} for docid, score, text in hits]
    return {"query": {"text": query, "qid": qid}, "candidates": rows}


# -- preparing and running ---------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to rerank, and whether its candidates are shuffled first."""

    method: First | Generate
    shuffled: bool = False


VARIANTS = {
    "first": Variant(First()),
    "first-shuffled": Variant(First(), shuffled=True),
    "first-calibrated": Variant(First(permutations=4, content_free=True)),
    "first-calibrated-shuffled": Variant(First(permutations=4, content_free=True), shuffled=True),
    "generate": Variant(Generate()),
    "generate-shuffled": Variant(Generate(), shuffled=True),
}


def prepare(name: str, data: Path, folder: Path, depth: int) -> Path:
    """Write requests and judgements of one set, unless they are there; return the requests."""
    path = folder / f"requests-{depth}.jsonl"
    if path.exists() and (folder / "qrels.txt").exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rows, qrels = SETS[name](data, depth)
    rows = [row for row in rows if row["query"]["qid"] in qrels]
    order = np.argsort(Rng(0).uniforms(0, 0, len(rows)), kind="stable")
    lines = [f"{q} 0 {d} {r}\n" for q, docs in qrels.items() for d, r in docs.items()]
    (folder / "qrels.txt").write_text("".join(lines))
    part = path.with_suffix(".part")
    part.write_text("".join(dump_line(rows[int(i)]) for i in order))
    part.replace(path)
    return path


def read(path: Path, count: int | None) -> list[Request]:
    """Return the first ``count`` requests."""
    with path.open("rb") as file:
        return list(islice(read_requests(file, str(path)), count))


def rerank(model: Any, name: str, path: Path, args: argparse.Namespace) -> Path:
    """Rerank the chosen queries, going on where an earlier call stopped; return the run."""
    variant = VARIANTS[name]
    options = {
        "window": args.window_size,
        "stride": args.stride,
        "max_words": args.max_words,
    }
    trained = "" if args.adapter is None else f"-{args.label or Path(args.adapter).name}"
    trained += "-plain" if args.plain else ""
    if args.adapter is not None:
        said = rerank_options(args.adapter)
        said.pop("first_stage_weight", None)  # --fuse shows the result with it and without
        if "window" in said:
            said.setdefault("stride", max(1, said["window"] // 2))
        options |= said
    stem = f"{name}{trained}-{args.backend}-w{options['max_words']}-k{args.depth}"
    with Reranker(model, method=variant.method, **options) as reranker:
        settings = job_settings(
            reranker,
            model.info,
            input=digest_files([path]),
            shuffle_seed=SHUFFLE_SEED if variant.shuffled else None,
        )
        with RecordLog(path.with_name(f"{stem}.jsonl"), settings, resume=True) as log:
            requests = read(path, args.queries)
            shown = [shuffle(r, SHUFFLE_SEED) if variant.shuffled else r for r in requests]
            for done, outcome in enumerate(run_job(reranker, shown, log=log), start=1):
                if outcome.error is not None:
                    print(f"{outcome.request.qid}: {outcome.error}", file=sys.stderr)
                elif outcome.ranking is not None:
                    usage = outcome.ranking.usage
                    print(
                        f"{path.parent.name} {name} {done}/{len(shown)}: {usage.prompt_tokens} + "
                        f"{usage.generated_tokens} tokens, {usage.seconds:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
            run = path.with_name(f"{stem}.txt")
            write_run_from_log(log, run, tag=name)
    return run


# -- reporting ---------------------------------------------------------------------------------


def as_run(path: Path) -> dict[str, dict[str, float]]:
    """Return a run as scores by query and document."""
    return {qid: {h.docid: h.score for h in hits} for qid, hits in read_run(path).items()}


def kendall_tau(first: list[str], second: list[str]) -> float:
    """Return Kendall's tau between two orders of the same documents, 1 for equal ones."""
    place = {docid: i for i, docid in enumerate(second)}
    order = np.array([place[docid] for docid in first])
    n = len(order)
    if n < 2:
        return 1.0
    right = sum(int((order[i + 1 :] > order[i]).sum()) for i in range(n))
    return 4 * right / (n * (n - 1)) - 1


def row(name: str, measured: Measured, base: Measured | None, tau: float | None, cost: str) -> str:
    """Return one line of the table."""
    assert measured.interval is not None
    low, high = measured.interval
    cells = [name, f"{measured.value:.4f}", f"{low:.4f} to {high:.4f}"]
    if base is None:
        cells += ["", ""]
    else:
        gap = compare(measured, base)
        cells += [f"{gap.value:+.4f}", f"{gap.p_value:.4f}"]
    cells += ["" if tau is None else f"{tau:+.2f}", cost]
    return "| " + " | ".join(cells) + " |"


def report(name: str, path: Path, runs: dict[str, Path], args: argparse.Namespace) -> None:
    """Print the table of one set over the queries that every run has."""
    requests = read(path, args.queries)
    found = {label: as_run(run) for label, run in runs.items()}
    shared = [r for r in requests if all(r.qid in run for run in found.values())]
    everything = read_qrels(path.with_name("qrels.txt"))
    qrels = {r.qid: everything[r.qid] for r in shared}
    if len(shared) < 2:
        print(f"\n{name}: too few queries", file=sys.stderr)
        return
    first_stage = path.with_name(f"bm25-k{args.depth}.txt")
    with first_stage.open("w") as file:
        rows = (
            (r.qid, [c.docid for c in r.candidates], [c.score or 0.0 for c in r.candidates])
            for r in requests
        )
        write_run(file, rows, tag="bm25")
    (base,) = evaluate(as_run(first_stage), qrels, (args.measure,))
    print(f"\n## {name}: {len(shared)} queries, top {args.depth}, {args.max_words} words\n")
    print(f"| order | {args.measure} | 95 % interval | to BM25 | p | tau to BM25 | tokens/query |")
    print("|---|---|---|---|---|---|---|")
    print(row("BM25", base, None, None, ""))
    print(row("random (mean of 20)", _random(shared, qrels, args.measure), base, None, ""))
    for label, run in found.items():
        (measured,) = evaluate(run, qrels, (args.measure,))
        ranked = read_run(runs[label])
        taus = [
            kendall_tau([h.docid for h in ranked[r.qid]], [c.docid for c in r.candidates])
            for r in shared
        ]
        print(row(label, measured, base, float(np.mean(taus)), _cost(runs[label], qrels)))
        if args.fuse:
            mixed = {r.qid: _fused(r, run[r.qid], args.fuse) for r in shared}
            (measured,) = evaluate(mixed, qrels, (args.measure,))
            print(row(f"{label} + BM25, weight {args.fuse:g}", measured, base, None, ""))


def _fused(request: Request, run: dict[str, float], weight: float) -> dict[str, float]:
    """Return the order that ``first_stage_weight`` gives: fusion comes after all windows."""
    docids = [c.docid for c in request.candidates]
    order = sorted(range(len(docids)), key=lambda i: -run[docids[i]])
    fused = reciprocal_ranks([range(len(docids)), order], [weight, 1.0])
    return {docids[i]: -float(place) for place, i in enumerate(fused)}


def _random(shared: list[Request], qrels: Qrels, measure: str) -> Measured:
    """Return the measure averaged, query by query, over 20 random orders."""
    total: dict[str, float] = dict.fromkeys(qrels, 0.0)
    for seed in range(20):
        run = {
            r.qid: {c.docid: -float(i) for i, c in enumerate(shuffle(r, seed).candidates)}
            for r in shared
        }
        (measured,) = evaluate(run, qrels, (measure,), samples=1)
        for qid, value in measured.per_query.items():
            total[qid] += value / 20
    values = list(total.values())
    return replace(
        measured,
        value=float(np.mean(values)),
        interval=bootstrap_interval(values),
        per_query=total,
    )


def _cost(run: Path, qrels: Qrels) -> str:
    """Return mean prompt and generated tokens, and malformed windows, from the records."""
    records = [json.loads(line) for line in run.with_suffix(".jsonl").read_text().splitlines()]
    made = [r["rerank"] for r in records if str(r["query"]["qid"]) in qrels]
    prompt = np.mean([m["prompt_tokens"] for m in made])
    generated = np.mean([m["generated_tokens"] for m in made])
    malformed = sum(m["malformed"] for m in made)
    windows = sum(m["windows"] for m in made)
    told = f"; {malformed} of {windows} answers malformed" if generated else ""
    return f"{prompt:.0f} + {generated:.0f}{told}"


def main() -> None:
    """Parse arguments, prepare, rerank, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for requests and runs")
    parser.add_argument("--data", type=Path, default=ir_sets.data_folder(), help="evaluation data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["dl19", "scifact", "cranfield"])
    parser.add_argument(
        "--methods", nargs="*", choices=VARIANTS, default=["first", "first-shuffled", "generate"],
        help="none only measures the first stage",
    )  # fmt: skip
    parser.add_argument("--queries", type=int, help="take only this many queries of each set")
    parser.add_argument("--depth", type=int, default=20, help="candidates per query [20]")
    parser.add_argument("--max-words", type=int, default=100, help="words per passage [100]")
    parser.add_argument("--window-size", type=int, default=20)
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--measure", default="nDCG@10")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--adapter", help="LoRA adapter; windows, words and wording are then those of its training"
    )
    parser.add_argument(
        "--plain", action="store_true", help="with --adapter: its settings, but the model as it is"
    )
    parser.add_argument(
        "--fuse", type=float, default=0.0, help="also show each run with this first_stage_weight"
    )
    parser.add_argument("--label", help="name of the adapter's runs [that of its folder]")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    paths = {n: prepare(n, args.data, args.work / n, args.depth) for n in args.sets}
    runs: dict[str, dict[str, Path]] = {name: {} for name in args.sets}
    if args.methods:
        options = {
            "backend": args.backend,
            "dtype": args.dtype,
            "threads": args.threads,
            "adapter": None if args.plain else args.adapter,
        }
        with load(args.model, **options) as model:
            print(f"{model.info.name} on {model.info.backend}, {model.info.dtype}")
            for name, path in paths.items():
                for method in args.methods:
                    runs[name][method] = rerank(model, method, path, args)
    for name, path in paths.items():
        report(name, path, runs[name], args)


if __name__ == "__main__":
    main()
