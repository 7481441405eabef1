"""TREC runs, queries and collections: strict readers and the run writer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import InvalidInput, MissingFile
from ..strict_json import NotANumber
from ..text_lines import InputProblem, Report, numbered_lines, open_text, tell
from .io import LONG_PASSAGE, Candidate, Request, document_text, parse_json, with_title
from .ranking import strictly_falling


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One line of a run."""

    qid: str
    docid: str
    rank: int
    score: float
    source: str = ""


def read_run(path: Path, *, report: Report | None = None) -> dict[str, list[RunLine]]:
    """Read a TREC run: ``qid Q0 docid rank score tag`` per line.

    Returns
    -------
    dict of qid to list of RunLine
        Queries in order of first appearance; hits by falling score. Equal scores keep the order of
        their rank column, then of the file.

    Raises
    ------
    InvalidInput
        A line with other than six fields, a rank or score that is no number, or a document twice
        for one query. With ``report`` the line is reported and left out.
    """
    run: dict[str, dict[str, RunLine]] = {}
    with open_text(path) as file:
        for where, text in numbered_lines(file, str(path), report):
            try:
                line = _run_line(text, where)
                hits = run.setdefault(line.qid, {})
                if line.docid in hits:
                    first = hits[line.docid].source
                    raise InputProblem(
                        f"{where}: document {line.docid!r} stands at {first} for the same query",
                        "duplicate_document",
                    )
                hits[line.docid] = line
            except InvalidInput as error:
                tell(report, error)
    return {
        qid: sorted(hits.values(), key=lambda line: (-line.score, line.rank))
        for qid, hits in run.items()
        if hits
    }


def _run_line(text: str, where: str) -> RunLine:
    fields = text.split()
    if len(fields) != 6:
        raise InvalidInput(
            f"{where}: {len(fields)} fields, expected 6: qid Q0 docid rank score tag"
        )
    qid, _, docid, rank, score, _ = fields
    try:
        place, value = int(rank), float(score)
    except ValueError:
        raise NotANumber(
            f"{where}: rank {rank!r} must be a whole number and score {score!r} a number"
        ) from None
    if not math.isfinite(value) or abs(value) > 1e38:
        raise NotANumber(f"{where}: score {score!r} must be within ±1e38")
    return RunLine(qid=qid, docid=docid, rank=place, score=value, source=where)


def read_qrels(path: Path, *, report: Report | None = None) -> dict[str, dict[str, int]]:
    """Read judgements: ``qid iter docid relevance`` per line.

    Raises
    ------
    InvalidInput
        A line of another shape, a relevance that is no whole number, or a pair judged twice with
        different results. With ``report`` the line is reported and left out.
    """
    qrels: dict[str, dict[str, int]] = {}
    with open_text(path) as file:
        for where, text in numbered_lines(file, str(path), report):
            try:
                qid, docid, value = _judgement(text, where)
                before = qrels.get(qid, {}).get(docid, value)
                if before != value:
                    raise InputProblem(
                        f"{where}: {docid!r} is judged {value} here and {before} before for "
                        f"{qid!r}",
                        "judged_twice",
                    )
            except InvalidInput as error:
                tell(report, error)
                continue
            qrels.setdefault(qid, {})[docid] = value
    return qrels


def _judgement(text: str, where: str) -> tuple[str, str, int]:
    fields = text.split()
    if len(fields) != 4:
        raise InvalidInput(
            f"{where}: {len(fields)} fields, expected 4: qid iteration docid relevance"
        )
    qid, _, docid, relevance = fields
    try:
        return qid, docid, int(relevance)
    except ValueError:
        raise NotANumber(f"{where}: relevance {relevance!r} must be a whole number") from None


def unknown_judged(path: Path, known: Collection[str], name: str) -> Iterator[InputProblem]:
    """Yield the lines of a qrels file whose document is not among the ``known`` ones of ``name``.

    Lines that cannot be read are passed over.
    """
    with open_text(path) as file:
        for where, text in numbered_lines(file, str(path), lambda error: None):
            fields = text.split()
            if len(fields) == 4 and fields[2] not in known:
                told = f"{where}: document {fields[2]!r} is not in {name}; its judgement stays"
                yield InputProblem(told, "unknown_document")


def read_texts(
    path: Path,
    *,
    only: Collection[str] | None = None,
    report: Report | None = None,
    passages: bool = False,
) -> dict[str, str]:
    """Read queries or a collection: TSV ``id<TAB>text``, or JSON lines with ``_id`` and ``text``.

    A line that begins with ``{`` in the file's first line makes it JSON lines: ``_id``, ``id`` or
    ``docid``, the text as in :func:`~.io.document_text`, a title in front of it. In a TSV a third
    column makes the second one a title, as in MS MARCO documents.

    Parameters
    ----------
    only : collection of str, optional
        Keep these ids alone, so that a large collection is passed through and not held.
    report : callable, optional
        Told of lines that cannot be used, which are then left out.
    passages : bool
        Tell ``report`` of empty and of huge texts as well; they are kept.

    Raises
    ------
    InvalidInput
        A line without id or text, or an id that stands twice.
    """
    texts: dict[str, str] = {}
    as_json: bool | None = None
    with open_text(path) as file:
        for where, line in numbered_lines(file, str(path), report):
            if as_json is None:
                as_json = line.lstrip().startswith("{")
            try:
                key, text = _json_text(line, where) if as_json else _tsv_text(line, where)
                if only is not None and key not in only:
                    continue
                if key in texts:
                    raise InputProblem(f"{where}: id {key!r} stands twice", "duplicate_id")
            except InvalidInput as error:
                tell(report, error)
                continue
            texts[key] = text
            if passages and report is not None:
                if not text or text.isspace():
                    told = f"{where}: {key!r}: empty passage; ranked as it is"
                    report(InputProblem(told, "empty_passage"))
                elif len(text) > LONG_PASSAGE:
                    told = f"{where}: {key!r}: more than {LONG_PASSAGE} characters"
                    report(InputProblem(f"{told}; the beginning is read", "long_passage"))
    return texts


def _json_text(line: str, where: str) -> tuple[str, str]:
    value = parse_json(line, where)
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: must be an object")
    key = next((value[k] for k in ("_id", "id", "docid", "qid") if k in value), None)
    if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
        raise InvalidInput(f"{where}: _id: must be text or a whole number")
    return str(key), document_text(value, where)


def _tsv_text(line: str, where: str) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) not in (2, 3) or not fields[0].strip():
        raise InvalidInput(f"{where}: {len(fields)} columns, expected id<TAB>text")
    text = fields[1] if len(fields) == 2 else with_title(fields[1], fields[2])
    return fields[0].strip(), text


def run_requests(
    run: Mapping[str, Sequence[RunLine]],
    queries: Mapping[str, str],
    collection: Mapping[str, str],
    *,
    queries_name: str,
    collection_name: str,
    report: Report | None = None,
) -> Iterator[Request]:
    """Join a run with its texts into requests, in the run's order.

    A query without text is reported and left out, a document without text likewise.
    """
    for qid, hits in run.items():
        query = queries.get(qid)
        if query is None or not query.strip():
            told = f"{hits[0].source}: query {qid!r} is not in {queries_name}"
            tell(report, InputProblem(told, "unknown_query"))
            continue
        candidates: list[Candidate] = []
        for hit in hits:
            text = collection.get(hit.docid)
            if text is None:
                problem = f"{hit.source}: document {hit.docid!r} is not in {collection_name}"
                tell(report, InputProblem(problem, "unknown_document"))
                continue
            raw = {"docid": hit.docid, "score": hit.score, "doc": text}
            candidates.append(Candidate(docid=hit.docid, text=text, score=hit.score, raw=raw))
        yield Request(qid=qid, query=query, candidates=tuple(candidates), source=hits[0].source)


def check_trec_names(request: Request) -> None:
    """Raise InvalidInput if an id of ``request`` cannot stand in a run, whose fields end at blanks.

    Checked before the model runs, so that no work is lost.
    """
    for name in (request.qid, *(c.docid for c in request.candidates)):
        if not name or name != "".join(name.split()):
            raise InputProblem(
                f"{request.source}: id {name!r} has a blank in it, which a TREC run cannot hold; "
                "rename it or write JSON lines only",
                "bad_id",
            )


def write_run(
    file: IO[str], rows: Iterable[tuple[str, Sequence[str], Sequence[float]]], *, tag: str
) -> int:
    """Write ``(qid, docids, scores)``, best first, as a TREC run.

    Ranks count from 1 and scores fall strictly, in single precision too. A document that stands
    twice for a query keeps its better place: a run with both is refused or misread by evaluators.

    Returns
    -------
    int
        Number of repeated documents that were left out.
    """
    dropped = 0
    for qid, docids, scores in rows:
        seen: set[str] = set()
        places = [i for i, docid in enumerate(docids) if not (docid in seen or seen.add(docid))]  # type: ignore[func-returns-value]
        dropped += len(docids) - len(places)
        falling = strictly_falling([scores[i] for i in places])
        for rank, (place, score) in enumerate(zip(places, falling), start=1):
            file.write(f"{qid} Q0 {docids[place]} {rank} {score!r} {tag}\n")
    return dropped


def require_file(path: Path) -> Path:
    """Return ``path`` if it is a file, else raise MissingFile."""
    if not path.is_file():
        raise MissingFile(f"{path}: no such file")
    return path
