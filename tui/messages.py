"""What the answering thread tells the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textual.message import Message


@dataclass
class AnswerStarted(Message):
    """The model is open and the prompt is on its way; ``label`` says what answers."""

    answer: int
    label: str


@dataclass
class ModelOpening(Message):
    """A model is being opened for ``role``; ``what`` says which."""

    role: str
    what: str


@dataclass
class ProfileChanged(Message):
    """The models of a profile are open, or, with a ``reason``, they could not be."""

    change: object
    reason: str | None = None


@dataclass
class AnswerProgress(Message):
    """``done`` of ``total`` prompt tokens are computed."""

    answer: int
    done: int
    total: int


@dataclass
class AnswerText(Message):
    """Text since the last such message; ``withdrawn`` characters are taken back first.

    ``taken`` is what was last taken back, even if it never reached the screen, and ``rewinds``
    counts how often that has happened in this answer.
    """

    answer: int
    withdrawn: int
    text: str
    tokens: int
    seconds: float
    taken: str = ""
    rewinds: int = 0


@dataclass
class AnswerDone(Message):
    """The answer is complete (or was cancelled); ``facts`` go into the history."""

    answer: int
    text: str
    facts: dict[str, Any]
    truncated: int


@dataclass
class AnswerFailed(Message):
    """No answer; ``reason`` is one line with a remedy."""

    answer: int
    reason: str
