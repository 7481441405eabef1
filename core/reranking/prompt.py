"""The listwise prompt: passages marked by letters, and text that cannot imitate the marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import strict_yaml
from ..errors import InvalidInput, did_you_mean
from .identifiers import LETTERS

# Blanks and characters without width that could hide an identifier from a plain pattern.
_INVISIBLE = (
    r"[\s\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]*"
)
_IDENTIFIER = re.compile(rf"\[({_INVISIBLE}(?:[A-Za-z]{_INVISIBLE})+)\]")
_EMPTY_TITLE = "Title: Content: "
_FIELD = re.compile(r"\{(\w+)\}")


def sanitise(text: str) -> str:
    """Return one line of ``text`` in which no ``[letters]`` are left.

    ``[A]`` becomes ``(A)``, also with blanks or zero-width characters inside, so that a passage
    cannot pose as another one. Whitespace runs become one blank: a passage is one line and cannot
    begin the next. The empty heading that some collections put in front is dropped.

    Notes
    -----
    The pattern is ``[A-Za-z]``, not ``[A-z]``, which would also match ``[\\]^_``` between the two
    alphabets.
    """
    text = " ".join(text.split())
    return _IDENTIFIER.sub(r"(\1)", text).removeprefix(_EMPTY_TITLE)


def cut_words(text: str, limit: int) -> str:
    """Return the first ``limit`` blank-separated words of a sanitised text."""
    words = text.split(" ")
    return text if len(words) <= limit else " ".join(words[:limit])


def shorten(text: str, max_words: int) -> str:
    """Return the beginning of a raw text, enough for ``max_words`` words of a usual length.

    A passage of many megabytes costs no more than one of a page, even without a blank in it: 64
    characters per word are kept, and some more. Shorter texts come back as they are.
    """
    limit = 64 * (max_words + 64)
    return text if len(text) <= limit else " ".join(text[: 8 * limit].split())[:limit]


def count_words(text: str) -> int:
    """Return the number of blank-separated words of a sanitised text."""
    return text.count(" ") + 1 if text else 0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Wording of the listwise prompt.

    ``{num}`` (passages in the window) and ``{query}`` may stand in ``system``, ``opening`` and
    ``closing``; ``{letter}`` and ``{text}`` must stand in ``passage``. Replacement happens once:
    braces in a query or a passage stay what they are. A checkpoint trained for reranking wants the
    exact wording of its training.

    ``answer`` is text that opens the model's answer, before the bracket that the letter follows.
    With ``chat`` false the parts are plain text, one after the other, without the turns of a chat
    template: base models, and small ones, may rank better so.
    """

    system: str = (
        "You are a careful search assistant that orders passages by how well they answer a query."
    )
    opening: str = (
        "Below are {num} passages, each marked by a letter in square brackets. "
        "Order them by their relevance to the search query: {query}"
    )
    passage: str = "[{letter}] {text}"
    closing: str = (
        "Search query: {query}\n"
        "Order the {num} passages above by their relevance to the search query. List the letters "
        "of all passages, the most relevant first, in the form [] > [], for example [B] > [A]. "
        "Answer with the ranking only."
    )
    answer: str = ""
    chat: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "system": {"num", "query"},
            "opening": {"num", "query"},
            "passage": {"letter", "text"},
            "closing": {"num", "query"},
            "answer": set(),
        }
        for name, fields in allowed.items():
            for used in _FIELD.findall(getattr(self, name)):
                if used not in fields:
                    raise InvalidInput(
                        f"prompt: {name}: unknown field {{{used}}}{did_you_mean(used, fields)}"
                    )
        for needed in ("{letter}", "{text}"):
            if needed not in self.passage:
                raise InvalidInput(f"prompt: passage: must contain {needed}")

    def messages(
        self, query: str, passages: Sequence[str], *, max_words: int
    ) -> list[dict[str, str]]:
        """Return the system and user message for one window.

        Parameters
        ----------
        query : str
        passages : sequence of str
            At most 26, in the window's order; passage ``j`` is marked ``chr(65 + j)``.
        max_words : int
            Words kept of each passage, at least 0.
        """
        lines = [
            self.line(letter, cut_words(sanitise(text), max_words))
            for letter, text in zip(LETTERS, passages)
        ]
        return self.around(query, len(passages), lines)

    def line(self, letter: str, text: str) -> str:
        """Return the line of one passage, whose text is sanitised and cut already."""
        return _fill(self.passage, {"letter": letter, "text": text})

    def around(self, query: str, num: int, lines: Sequence[str]) -> list[dict[str, str]]:
        """Return the messages that hold ``lines``, for a window of ``num`` passages."""
        shared = {"num": str(num), "query": sanitise(query)}
        user = "\n".join([_fill(self.opening, shared), *lines, _fill(self.closing, shared)])
        system = _fill(self.system, shared)
        return [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": user},
        ]


def merge_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Move a leading system message into the first user turn, for templates without that role."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return [dict(message) for message in messages]
    system, user, *rest = messages
    merged = {"role": user["role"], "content": f"{system['content']}\n {user['content']}"}
    return [merged, *(dict(message) for message in rest)]


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda found: values[found[1]], template)


def read_prompt(path: str | Path) -> Prompt:
    """Read a :class:`Prompt` from a YAML file with any of its fields.

    Raises
    ------
    MissingFile
    InvalidInput
        Not strict YAML, not a mapping of known names to text, or an unknown ``{field}``.
    """
    document = strict_yaml.read(path, error_type=InvalidInput)
    if not isinstance(document.data, dict):
        document.error((), "must be a mapping with system, opening, passage, closing")
    document.check_keys((), Prompt.__dataclass_fields__)
    for name, value in document.data.items():
        wanted = bool if name == "chat" else str
        if not isinstance(value, wanted):
            told = "true or false" if wanted is bool else "text"
            document.error((name,), f"must be {told}, got {type(value).__name__}")
    try:
        return Prompt(**document.data)
    except InvalidInput as error:
        raise InvalidInput(f"{document.source}: {error}") from None
