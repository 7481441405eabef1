"""Reading documents and queries to be searched: JSON lines or tab-separated, as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidInput
from ..reranking.io import document_text
from ..strict_json import check_text, parse_json
from ..text_lines import Report, read_records

_ID_KEYS = ("_id", "id", "docid", "qid")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text with an id; ``source`` is the ``file:line`` it came from."""

    docid: str
    text: str
    source: str = ""


def read_documents(
    lines: Iterable[bytes], name: str, *, report: Report | None = None
) -> Iterator[Document]:
    """Read documents or queries, one per line, as they come.

    The first line decides: a ``{`` makes the file JSON lines (``_id``, ``id``, ``docid`` or
    ``qid``; ``text``, ``contents``, ``content``, ``segment``, ``body`` or ``passage``; perhaps
    ``title``), anything else ``id<TAB>text`` or ``id<TAB>title<TAB>text``. A title stands before
    its text, with a blank between them.

    Lines, name and report are those of :func:`.read_records`.
    """
    as_json: bool | None = None

    def parse(line: str, where: str) -> Document:
        nonlocal as_json
        if as_json is None:
            as_json = line.lstrip().startswith("{")
        docid, title, text = _json(line, where) if as_json else _tsv(line, where)
        whole = f"{title} {text}".strip()
        if not whole:
            raise InvalidInput(f"{where}: text: empty")
        return Document(docid=docid, text=whole, source=where)

    return read_records(lines, name, parse, report=report)


def _json(line: str, where: str) -> tuple[str, str, str]:
    value = parse_json(line, where)
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: must be an object")
    key = next((k for k in _ID_KEYS if k in value), None)
    if key is None:
        raise InvalidInput(f"{where}: has none of {', '.join(_ID_KEYS)}")
    docid = value[key]
    if isinstance(docid, bool) or not isinstance(docid, str | int) or not str(docid).strip():
        raise InvalidInput(f"{where}: {key}: must be text or a whole number")
    title = value.get("title")
    if title is not None and not isinstance(title, str):
        raise InvalidInput(f"{where}: title: must be text")
    body: dict[str, Any] = {k: v for k, v in value.items() if k != "title"}
    text = document_text(body, f"{where}: document")
    for name, field in ((key, str(docid)), ("title", title or "")):
        check_text(field, f"{where}: {name}")
    return str(docid), title or "", text


def _tsv(line: str, where: str) -> tuple[str, str, str]:
    fields = line.split("\t")
    if len(fields) not in (2, 3) or not fields[0].strip():
        raise InvalidInput(f"{where}: {len(fields)} columns, expected id<TAB>text")
    return fields[0].strip(), fields[1] if len(fields) == 3 else "", fields[-1]


def as_documents(
    given: Mapping[str, str] | Iterable[Document | tuple[str, str]],
) -> list[Document]:
    """Return documents of a mapping, of ``(id, text)`` pairs, or of documents."""
    items = given.items() if isinstance(given, Mapping) else given
    found = []
    for place, item in enumerate(items):
        if not isinstance(item, Document):
            item = Document(docid=str(item[0]), text=item[1], source=f"documents[{place}]")
        found.append(item)
    return found


def digest_documents(documents: Iterable[Document]) -> str:
    """Return a short SHA-256 over ids and texts (16 hex digits)."""
    total = hashlib.sha256()
    for document in documents:
        for part in (document.docid, document.text):
            data = part.encode()
            total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]
