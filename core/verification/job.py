"""Fitting, scoring and reranking over files: one pass per trace, stopped and resumed at will."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Cancelled, InvalidInput, SteersmanError
from ..model import Model
from ..tensor_file import read_tensors, save_tensors
from .centroids import Centroids, Experience, Judgement
from .delta import DeltaReader
from .problems import Problem, Trace
from .ranking import majority, nearest_first
from .span import TraceRule, encode_trace

PART, MADE_BY = "clue-part 1", "steersman verify fit"
EVERY_S = 20.0  # seconds of work that a kill can cost


@dataclass(kw_only=True)
class Tally:
    """What happened to the traces of a job."""

    problems: int = 0
    traces: int = 0
    unlabelled: int = 0
    without_span: int = 0


def trace_delta(
    reader: DeltaReader, problem: Problem, trace: Trace
) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Return a trace's delta (L, D); None where it has no span (a missing closing tag)."""
    tokenizer = reader.model.tokenizer
    ids = encode_trace(tokenizer, problem.prompt, trace.text, reader.rule)
    span = reader.rule.locate(tokenizer, *ids)
    return None if span is None else reader.read(span)


# -- fit ------------------------------------------------------------------------------------------


class FitState:
    """The sums of an unfinished fit, beside the file that it will make.

    Parameters
    ----------
    path : Path
        ``OUT.part``.
    made_of : mapping
        Everything the sums depend on; a file made of something else is refused.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any]) -> None:
        self.path = path
        self._made_of = dict(made_of)
        self.experience = Experience()
        self.done: set[str] = set()
        self._saved = time.monotonic()
        if path.exists():
            self._read()

    def _read(self) -> None:
        arrays, facts = read_tensors(self.path, kind=PART, made_by=MADE_BY)
        if facts.get("made_of") != self._made_of:
            raise InvalidInput(
                f"{self.path}: begun with other traces, model or settings; use them again or give "
                "--overwrite"
            )
        self.done = set(map(str, facts.get("done", ())))
        if "sums" in arrays:
            self.experience.sums = arrays["sums"].astype(np.float64)
            self.experience.squares = arrays["squares"].astype(np.float64)
            self.experience.counts = arrays["counts"].astype(np.int64)

    def save(self) -> None:
        """Write what there is."""
        held = self.experience
        arrays: dict[str, Any] = {"counts": held.counts}
        if held.sums is not None and held.squares is not None:
            arrays |= {"sums": held.sums, "squares": held.squares}
        facts = {"made_of": self._made_of, "done": sorted(self.done)}
        save_tensors(self.path, arrays, facts, kind=PART)
        self._saved = time.monotonic()

    def save_if_due(self) -> None:
        """Write what there is if the last time is long ago."""
        if time.monotonic() - self._saved > EVERY_S:
            self.save()


def fit(
    reader: DeltaReader,
    problems: Iterable[Problem],
    state: FitState,
    *,
    report: Callable[[Problem, SteersmanError], None],
    progress: Callable[[], Any] = lambda: None,
) -> Tally:
    """Take the labelled traces of ``problems`` into ``state``.

    Problems that ``state`` has seen are skipped. A problem of which a trace cannot be read is
    reported and leaves nothing behind. Traces without a label or without a span are counted.

    Raises
    ------
    Cancelled
        After ``state`` was saved.
    """
    tally = Tally()
    try:
        for problem in problems:
            if problem.id in state.done:
                progress()
                continue
            try:
                found = [(t, trace_delta(reader, problem, t)) for t in _labelled(problem, tally)]
            except Cancelled:
                raise
            except SteersmanError as error:
                report(problem, error)
                continue
            for trace, delta in found:
                if delta is None:
                    tally.without_span += 1
                else:
                    tally.traces += 1
                    state.experience.add(delta, correct=bool(trace.correct))
            tally.problems += 1
            state.done.add(problem.id)
            state.save_if_due()
            progress()
    finally:
        state.save()
    return tally


def _labelled(problem: Problem, tally: Tally) -> list[Trace]:
    known = [trace for trace in problem.traces if trace.correct is not None]
    tally.unlabelled += len(problem.traces) - len(known)
    return known


# -- score and rerank -----------------------------------------------------------------------------


def judge_problem(
    reader: DeltaReader, centroids: Centroids, problem: Problem, *, standardise: bool = False
) -> list[Judgement | None]:
    """Return a judgement per trace; None for traces without a span."""
    deltas = (trace_delta(reader, problem, trace) for trace in problem.traces)
    return [None if d is None else centroids.judge(d, standardise=standardise) for d in deltas]


def score_record(problem: Problem, judgements: list[Judgement | None]) -> dict[str, Any]:
    """Return the scores of a problem's traces as a JSON value.

    ``verdict`` is "correct", "incorrect" or, for a trace without a span, "incorrect" with
    ``"span": false``.
    """
    rows = []
    for trace, found in zip(problem.traces, judgements, strict=True):
        row: dict[str, Any] = {"answer": trace.answer, "span": found is not None}
        if found is not None:
            row |= {
                "success_distance": found.success,
                "failure_distance": found.failure,
                "margin": found.margin,
            }
        row["verdict"] = "correct" if found is not None and found.correct else "incorrect"
        if trace.correct is not None:
            row["correct"] = trace.correct
        rows.append(row)
    return {"id": problem.id, **problem.passed, "scores": rows}


def rerank_record(
    problem: Problem, judgements: list[Judgement | None], *, votes: tuple[int, ...]
) -> dict[str, Any]:
    """Return a problem's traces, nearest to success first, and whom the nearest elect.

    Parameters
    ----------
    votes : tuple of int
        Numbers of nearest traces that vote on the answer.
    """
    distances = [None if j is None else j.success for j in judgements]
    answers = [trace.answer for trace in problem.traces]
    order = nearest_first(distances)
    rows = []
    for rank, place in enumerate(order, start=1):
        trace = problem.traces[place]
        row: dict[str, Any] = {
            "rank": rank,
            "index": place,
            "success_distance": distances[place],
            "answer": trace.answer,
            "response": trace.text,
        }
        if trace.correct is not None:
            row["correct"] = trace.correct
        rows.append(row)
    chosen = {k: majority(answers, order[:k]) for k in votes}
    return {
        "id": problem.id,
        **problem.passed,
        "candidates": rows,
        "top": order[0],
        "votes": {
            str(k): None if place is None else {"index": place, "answer": answers[place]}
            for k, place in chosen.items()
        },
    }


def run(
    reader: DeltaReader,
    centroids: Centroids,
    problems: Iterable[Problem],
    make: Callable[[Problem, list[Judgement | None]], dict[str, Any]],
    *,
    done: Iterable[str] = (),
    standardise: bool = False,
    report: Callable[[Problem, SteersmanError], None],
) -> Iterator[dict[str, Any] | None]:
    """Yield a record per problem; None for one that is done or was reported.

    Raises
    ------
    Cancelled
        Between problems or between calls to the model.
    """
    skip = set(done)
    for problem in problems:
        if problem.id in skip:
            yield None
            continue
        try:
            found = judge_problem(reader, centroids, problem, standardise=standardise)
        except Cancelled:
            raise
        except SteersmanError as error:
            report(problem, error)
            yield None
            continue
        yield make(problem, found)


def open_reader(
    model: Model, centroids: Centroids, *, where: str, cancelled: Callable[[], bool]
) -> DeltaReader:
    """Return a reader that makes deltas as those of ``centroids`` were made.

    Raises
    ------
    UsageError
        The centroids are another model's.
    """
    centroids.check(centroids.rule.model_facts(model), where=where)
    return DeltaReader(model, centroids.rule, cancelled=cancelled)


def describe(rule: TraceRule) -> str:
    """Return a rule in a few words."""
    span = f"{rule.opening} to {rule.closing}" if rule.span == "tags" else "the response"
    layers = "all layers" if rule.layers == "all" else "the last layer only (reduced variant)"
    return f"{span}, {layers}"
