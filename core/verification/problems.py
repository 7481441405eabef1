"""Problems with their traces as JSON lines: strict reading, errors that name file, line and key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..chat import check_messages
from ..errors import InvalidInput
from ..strict_json import check_text, parse_json
from ..text_lines import Report, UniqueIds, line_id, read_records
from .ranking import final_answer

_FIELDS = ("prompt", "messages", "response", "responses", "answer", "correct")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A response to a problem.

    Attributes
    ----------
    text : str
    answer : str or None
        Given, or found in the text.
    correct : bool or None
    """

    text: str
    answer: str | None = None
    correct: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt and the responses to it.

    Attributes
    ----------
    id : str
        Unique within a file.
    prompt : str or list of messages
    traces : tuple of Trace
    passed : mapping
        Other fields, repeated in results.
    where : str
        ``file:line``.
    """

    id: str
    prompt: str | list[dict[str, str]]
    traces: tuple[Trace, ...]
    passed: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


def parse_problem(value: Any, where: str, *, default_id: str) -> Problem:
    """Check one problem.

    ``{"id", "prompt": "text" | "messages": [...], "responses": [...]}``, where a response is text
    or ``{"response", "answer", "correct"}``; with one response its fields may stand in the problem
    itself. An answer that is not given is looked for in the text.

    Raises
    ------
    InvalidInput
        Naming ``where`` and the key.
    """
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: must be an object")
    if ("prompt" in value) == ("messages" in value):
        raise InvalidInput(f"{where}: needs prompt or messages, one of the two")
    if ("response" in value) == ("responses" in value):
        raise InvalidInput(f"{where}: needs response or responses, one of the two")
    prompt: str | list[dict[str, str]]
    if "prompt" in value:
        prompt = _text(value["prompt"], f"{where}: prompt")
    else:
        try:
            prompt = check_messages(value["messages"])
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error}") from None
    rows = value.get("responses", [value])
    if not isinstance(rows, list) or not rows:
        raise InvalidInput(f"{where}: responses: must be a list that is not empty")
    many = "responses" in value
    traces = tuple(
        _trace(row, f"{where}: responses[{i}]" if many else where) for i, row in enumerate(rows)
    )
    name = value.get("id", default_id)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise InvalidInput(f"{where}: id: must be text or a whole number")
    passed = {k: v for k, v in value.items() if k not in (*_FIELDS, "id", "made_with")}
    return Problem(id=str(name), prompt=prompt, traces=traces, passed=passed, where=where)


def _trace(row: Any, where: str) -> Trace:
    if isinstance(row, str):
        row = {"response": row}
    if not isinstance(row, dict):
        raise InvalidInput(f"{where}: must be text or an object")
    text = _text(row.get("response"), f"{where}: response", empty=True)
    answer, correct = row.get("answer"), row.get("correct")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and not isinstance(answer, str):
        raise InvalidInput(f"{where}: answer: must be text, a number or null")
    if correct is not None and not isinstance(correct, bool):
        raise InvalidInput(f"{where}: correct: must be true, false or null")
    given = "answer" in row
    return Trace(text=text, answer=answer if given else final_answer(text), correct=correct)


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise InvalidInput(f"{where}: must be text{'' if empty else ' that is not empty'}")
    check_text(value, where)
    return value


def read_problems(
    lines: Iterable[bytes], name: str, *, report: Report | None = None
) -> Iterator[Problem]:
    """Read problems, one JSON object per line; see :func:`.read_records`."""
    ids = UniqueIds("id", "problem")

    def parse(text: str, where: str) -> Problem:
        problem = parse_problem(parse_json(text, where), where, default_id=line_id(where))
        ids.take(problem.id, where)
        return problem

    return read_records(lines, name, parse, report=report)
