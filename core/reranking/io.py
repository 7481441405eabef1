"""Rerank requests and results as JSON lines: strict reading, unknown fields passed through."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InvalidInput
from ..strict_json import NotANumber, check_text
from ..strict_json import parse_json as parse_json
from ..text_lines import InputProblem, Report, UniqueIds, line_id, read_records
from .ranking import Ranking

LONG_PASSAGE = 1_000_000  # characters; some 500 pages, of which a prompt shows one
_TEXT_KEYS = ("text", "contents", "content", "segment", "body", "passage")


def kind_of(error: InvalidInput) -> tuple[str, int]:
    """Return what to count an error as, and how often."""
    if isinstance(error, InputProblem):
        return error.kind, error.count
    return "not_a_number" if isinstance(error, NotANumber) else "malformed_line", 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A passage to be ranked.

    Attributes
    ----------
    docid : str
    text : str
        What the model reads; a title, if there is one, stands in front.
    score : float or None
        First-stage score.
    raw : mapping
        The candidate as it was read, for writing it back.
    """

    docid: str
    text: str
    score: float | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A query and its candidates in first-stage order.

    Attributes
    ----------
    qid : str
        Unique within a job.
    query : str
    candidates : tuple of Candidate
    source : str
        ``file:line`` it came from.
    raw : mapping
        The request as it was read, candidates left out.
    """

    qid: str
    query: str
    candidates: tuple[Candidate, ...]
    source: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)

    def scores(self) -> list[float] | None:
        """Return the first-stage scores, or None if any is missing."""
        found = [c.score for c in self.candidates if c.score is not None]
        return found if len(found) == len(self.candidates) else None

    def head(self, count: int | None) -> Request:
        """Return the request with its first ``count`` candidates; all of them if None."""
        return self if count is None else replace(self, candidates=self.candidates[:count])


def parse_request(value: Any, where: str, *, default_qid: str) -> Request:
    """Check one request.

    ``{"query": {"text", "qid"} | "text", "candidates": [{"docid", "score", "doc"} | "text", ...]}``
    where ``doc`` is text or an object with a ``text`` (or ``contents``, ``content``, ``segment``,
    ``body``, ``passage``) and perhaps a ``title``. A query without ``qid`` gets ``default_qid``;
    a candidate without ``docid`` gets its place, from 1.

    Raises
    ------
    InvalidInput
        Naming ``where`` and the key.
    """
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: must be an object, got {_kind(value)}")
    for needed in ("query", "candidates"):
        if needed not in value:
            raise InvalidInput(f"{where}: {needed}: missing")
    query, qid = value["query"], default_qid
    if isinstance(query, dict):
        if "qid" in query:
            qid = _identifier(query["qid"], f"{where}: query.qid")
        query = query.get("text")
    if not isinstance(query, str) or not query.strip():
        raise InvalidInput(f"{where}: query: must be text that is not empty")
    check_text(query, f"{where}: query")
    rows = value["candidates"]
    if not isinstance(rows, list):
        raise InvalidInput(f"{where}: candidates: must be a list, got {_kind(rows)}")
    candidates = tuple(
        _candidate(row, f"{where}: candidates[{place}]", str(place + 1))
        for place, row in enumerate(rows)
    )
    rest = {key: item for key, item in value.items() if key != "candidates"}
    return Request(qid=qid, query=query, candidates=candidates, source=where, raw=rest)


def _candidate(row: Any, where: str, default_docid: str) -> Candidate:
    if isinstance(row, str):
        check_text(row, where)
        return Candidate(docid=default_docid, text=row, raw={"docid": default_docid, "doc": row})
    if not isinstance(row, dict):
        raise InvalidInput(f"{where}: must be an object or text, got {_kind(row)}")
    docid = default_docid
    if "docid" in row:
        docid = _identifier(row["docid"], f"{where}.docid")
    score = row.get("score")
    if score is not None:
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise NotANumber(f"{where}.score: must be a number, got {_kind(score)}")
        if abs(score) > 1e38 or not math.isfinite(score):
            raise NotANumber(f"{where}.score: must be within ±1e38")
        score = float(score)
    if "doc" not in row:
        raise InvalidInput(f"{where}.doc: missing")
    text = document_text(row["doc"], f"{where}.doc")
    return Candidate(docid=docid, text=text, score=score, raw={"docid": docid, **row})


def document_text(doc: Any, where: str) -> str:
    """Return the text that the model reads of a document: text, or an object with text in it."""
    if isinstance(doc, dict):
        key = next((key for key in _TEXT_KEYS if key in doc), None)
        if key is None:
            raise InvalidInput(f"{where}: has none of {', '.join(_TEXT_KEYS)}")
        title, where = doc.get("title"), f"{where}.{key}"
        doc = doc[key]
        if isinstance(title, str) and title.strip() and isinstance(doc, str):
            doc = with_title(title, doc)
    if not isinstance(doc, str):
        raise InvalidInput(f"{where}: must be text, got {_kind(doc)}")
    check_text(doc, where)
    return doc


def with_title(title: str, text: str) -> str:
    """Join a title and a text the way listwise training data does."""
    return f"Title: {title} Content: {text}" if title.strip() else text


def _identifier(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InvalidInput(f"{where}: must be text or a whole number, got {_kind(value)}")
    text = str(value)
    check_text(text, where)
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number") if value != "" else "empty text"


def read_requests(
    lines: Iterable[bytes], name: str, *, report: Report | None = None
) -> Iterator[Request]:
    """Read requests, one JSON object per line; see :func:`.read_records`."""
    ids = UniqueIds("query.qid", "query")

    def parse(text: str, where: str) -> Request:
        request = parse_request(parse_json(text, where), where, default_qid=line_id(where))
        ids.take(request.qid, where)
        return request

    for request in read_records(lines, name, parse, report=report):
        if report is not None:
            for defect in defects(request):
                report(defect)
        yield request


def defects(request: Request) -> Iterator[InputProblem]:
    """Yield what is odd about a request's passages but can be ranked as it is."""
    first: dict[str, int] = {}
    empty, long, repeated = [], [], []
    for place, candidate in enumerate(request.candidates):
        if first.setdefault(candidate.docid, place) != place:
            repeated.append(place)
        if not candidate.text or candidate.text.isspace():
            empty.append(place)
        if len(candidate.text) > LONG_PASSAGE:
            long.append(place)
    for kind, places, told in (
        ("duplicate_document", repeated, "this document stands before; both are ranked"),
        ("empty_passage", empty, "empty passage; ranked as it is"),
        ("long_passage", long, f"more than {LONG_PASSAGE} characters; the beginning is read"),
    ):
        if places:
            more = f" (and {len(places) - 1} more of this query)" if len(places) > 1 else ""
            where = f"{request.source}: candidates[{places[0]}]"
            docid = request.candidates[places[0]].docid
            yield InputProblem(f"{where}: {docid!r}: {told}{more}", kind, len(places))


def result_record(request: Request, ranking: Ranking) -> dict[str, Any]:
    """Return a request in its new order, in the shape it came in, unknown fields included.

    Each candidate gets its slot score as ``score``, its ``rank`` from 1 and, under the name of its
    kind, the model's score; ``rerank`` says how it was made.
    """
    query = request.raw.get("query")
    shaped = {**query, "qid": query.get("qid", request.qid)} if isinstance(query, dict) else None
    rows: list[dict[str, Any]] = []
    for hit in ranking:
        row = {**request.candidates[hit.index].raw, "score": hit.score, "rank": hit.rank}
        if ranking.logit_kind != "none":
            row[ranking.logit_kind] = hit.logit
        rows.append(row)
    usage = ranking.usage
    return {
        **request.raw,
        "query": shaped or {"text": request.query, "qid": request.qid},
        "candidates": rows,
        "rerank": {
            "method": ranking.method,
            "score_kind": ranking.kind,
            "logit_kind": ranking.logit_kind,
            "windows": usage.windows,
            "prompt_tokens": usage.prompt_tokens,
            "generated_tokens": usage.generated_tokens,
            "malformed": usage.malformed,
            **({} if usage.word_limit is None else {"word_limit": usage.word_limit}),
        },
    }


def dump_line(record: Mapping[str, Any]) -> str:
    """Return one JSON line, control characters escaped and NaN refused."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
