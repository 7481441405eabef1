"""Evidence in a prompt: which of its tokens come from a document that the answer shall rest on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .errors import UsageError
from .model import IntArray, Tokenizer

Messages = list[dict[str, str]]

_CONTROL = b"\xff"  # stands for a control token: no UTF-8 text holds this byte


def evidence_spans(
    tokenizer: Tokenizer, prompt: IntArray | Sequence[int], texts: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    """Return the token ranges of ``prompt`` that hold ``texts``.

    Texts are found by their bytes, white space around them left aside, however tokens cut them. A
    token that only overlaps a text counts as part of it.

    Parameters
    ----------
    prompt : int64 (T,)
    texts : sequence of str
        Every place where one occurs is evidence.

    Returns
    -------
    tuple of (begin, end)
        In order, without overlap, 0 <= begin < end <= T.

    Raises
    ------
    UsageError
        A text is empty or does not occur.
    """
    if not texts:
        return ()
    special = tokenizer.special_ids
    pieces = [_CONTROL if t in special else tokenizer.token_bytes(t) for t in map(int, prompt)]
    ends = np.cumsum([len(piece) for piece in pieces])
    whole = b"".join(pieces)
    inside = np.zeros(len(pieces), np.bool_)
    for text in texts:
        wanted = _stripped(text).encode()
        at = whole.find(wanted)
        if at < 0:
            raise UsageError(
                f"evidence: {_shortened(text)!r} does not occur in the prompt; "
                "it must stand there word for word (and must not be cut off by truncation)"
            )
        while at >= 0:
            first = int(np.searchsorted(ends, at, side="right"))
            last = int(np.searchsorted(ends, at + len(wanted), side="left"))
            inside[first : last + 1] = True
            at = whole.find(wanted, at + len(wanted))
    turns = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return tuple((int(a), int(b)) for a, b in turns.reshape(-1, 2))


def with_evidence(
    prompt: str | Sequence[Mapping[str, str]], texts: Sequence[str]
) -> str | Messages:
    """Return ``prompt`` with every text in front of it that it does not hold yet.

    Documents stand in their order, an empty line after each; in a chat, before the last user
    message.

    Raises
    ------
    UsageError
        A text is empty, or there is no user message to put it before.
    """
    texts = [_stripped(text) for text in texts]
    if isinstance(prompt, str):
        return _front(texts, (prompt,)) + prompt
    messages = [dict(message) for message in prompt]
    front = _front(texts, [message.get("content", "") for message in messages])
    if not front:
        return messages
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = front + message["content"]
            return messages
    raise UsageError("evidence: there is no user message to put it before")


def _front(texts: Iterable[str], held: Sequence[str]) -> str:
    absent = [text for text in texts if not any(text in content for content in held)]
    return "".join(f"{text}\n\n" for text in absent)


def _stripped(text: str) -> str:
    stripped = text.strip()
    if not stripped:
        raise UsageError("evidence: a text is empty; give a passage that the prompt holds")
    return stripped


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
