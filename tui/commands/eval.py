"""``steersman eval``: measures of a run, with the doubt and the ties that belong to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import common, output
from ..options import FILE, whole
from ..rerank_job import Problems


@click.command("eval")
@click.argument("run", type=FILE)
@click.argument("qrels", type=FILE)
@common.option(
    "-m",
    "--measure",
    "measures",
    multiple=True,
    type=common.Lines(),
    metavar="NAME",
    help="Measure, by its ir-measures name: nDCG@10, RR, P(rel=2)@10; may be repeated [nDCG@10].",
)
@common.option(
    "--compare",
    type=FILE,
    metavar="RUN",
    help="Another run: the paired difference to it, with interval and p-value.",
)
@common.option(
    "--collection",
    type=FILE,
    metavar="FILE",
    help="Tell which judged documents are not in it: id<TAB>text, or JSON lines with _id.",
)
@common.option("--per-query", is_flag=True, help="One line per query as well.")
@common.option(
    "--level", type=common.Finite(0.5, 0.999), default=0.95, help="Of the intervals [0.95]."
)
@common.option(
    "--samples",
    type=whole(100, 1_000_000),
    default=10_000,
    help="Resamples for intervals and p-value [10000].",
)
@common.option("--seed", type=whole(0, 2**64 - 1), default=0, help="Of the resampling [0].")
@common.output_options
def command(
    run: Path,
    qrels: Path,
    measures: tuple[str, ...],
    compare: Path | None,
    collection: Path | None,
    per_query: bool,
    level: float,
    samples: int,
    seed: int,
) -> None:
    """Measure RUN (a TREC run) against QRELS.

    The values are those of ir-measures on the same files. Every judged query counts; one that the
    run lacks counts 0. A line that cannot be used is reported and left out; the command then ends
    with exit code 7. Tied scores are counted and each measure's rule for them is named.
    """  # fmt: skip
    from steersman.core.reranking import evaluate as ev
    from steersman.core.reranking.trec import read_qrels, read_texts, unknown_judged

    with common.Envelope("eval") as envelope:
        envelope.inputs.update(run=run, qrels=qrels, compare=compare)
        names = measures or ("nDCG@10",)
        ev.parse_measures(names)  # before any file is read
        problems = Problems(envelope)
        judged = read_qrels(qrels, report=problems.line)
        if collection is not None:
            wanted = {docid for found in judged.values() for docid in found}
            known = read_texts(collection, only=wanted, report=problems.line)
            for problem in unknown_judged(qrels, known, str(collection)):
                problems.line(problem)
        doubt: dict[str, Any] = {"level": level, "samples": samples, "seed": seed}
        envelope.resolved.update(measures=names, **doubt)
        scored = _measure(run, judged, names, doubt, problems)
        envelope.metrics = {m.name: m.value for m in scored}
        envelope.result = {
            "measures": [_row(m, per_query) for m in scored],
        }
        differences = []
        if compare is not None:
            other = _measure(compare, judged, names, doubt, problems)
            differences = [
                ev.compare(a, b, **doubt)
                for a, b in zip(scored, other)
                if a.interval is not None or len(judged) < 2
            ]
            envelope.result["compare"] = {
                "measures": [_row(m, per_query) for m in other],
                "differences": differences,
            }
        usable = judged and all(v["queries"] for v in envelope.validation.values())
        problems.settle(succeeded=int(bool(usable)))
        envelope.validation["problems"] = problems.counted()
        if problems.kinds:
            output.note(problems.sentence())
        if envelope.json:
            return
        _print(scored, per_query, level)
        if differences:
            output.print_text()
            _print_differences(differences, level)


def _measure(
    path: Path,
    judged: dict[str, dict[str, int]],
    names: tuple[str, ...],
    doubt: dict[str, Any],
    problems: Problems,
) -> list[Any]:
    from steersman.core.reranking import evaluate as ev
    from steersman.core.reranking.trec import read_run

    envelope = problems.envelope
    hits = read_run(path, report=problems.line)
    run = {qid: {hit.docid: hit.score for hit in found} for qid, found in hits.items()}
    missing = [qid for qid in judged if qid not in run]
    extra = [qid for qid in run if qid not in judged]
    ties = ev.count_ties(run)
    envelope.validation[str(path)] = {
        "queries": len(run),
        "judged_queries_missing": len(missing),
        "queries_without_judgement": len(extra),
        "ties": ties,
    }
    if missing:
        envelope.warn(f"{path}: {len(missing)} judged queries are not in the run and count 0")
    if extra:
        envelope.warn(f"{path}: {len(extra)} queries have no judgement and are left out")
    measured = ev.evaluate(run, judged, names, **doubt)
    if ties.queries:
        rules = "; ".join(f"{m.name}: {m.tie_rule}" for m in measured)
        envelope.warn(
            f"{path}: {ties.documents} documents of {ties.queries} queries have tied scores "
            f"({ties.single_only} in single precision only), ordered by {rules}"
        )
    return measured


def _row(measured: Any, per_query: bool) -> dict[str, Any]:
    row = {
        "name": measured.name,
        "value": measured.value,
        "interval": measured.interval,
        "provider": measured.provider,
        "tie_rule": measured.tie_rule,
    }
    if per_query:
        row["per_query"] = measured.per_query
    return row


def _print(scored: list[Any], per_query: bool, level: float) -> None:
    if per_query:
        rows = [(m.name, qid, f"{value:.4f}") for m in scored for qid, value in m.per_query.items()]
        output.print_styled(output.table(rows, header=("measure", "query", "value"), right=(2,)))
        output.print_text()
    rows = [(m.name, f"{m.value:.4f}", _interval(m.interval)) for m in scored]
    header = ("measure", "value", f"{level:.0%} interval")
    output.print_styled(output.table(rows, header=header, right=(1,)))


def _print_differences(differences: list[Any], level: float) -> None:
    rows = [
        (
            d.name,
            f"{d.value:+.4f}",
            _interval(d.interval),
            f"{d.p_value:.4f}",
            f"{d.better}/{d.equal}/{d.worse}",
        )
        for d in differences
    ]
    header = ("difference", "value", f"{level:.0%} interval", "p", "better/equal/worse")
    output.print_styled(output.table(rows, header=header, right=(1, 3)))


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
