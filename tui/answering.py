"""One answer, run in a thread of its own and reported to the screen in small portions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steersman.core.errors import SteersmanError

from . import messages
from .envelope import problem
from .roles import described

if TYPE_CHECKING:
    from textual.message import Message

    from steersman.core.profile import Profile

    from .engine import ChatEngine
    from .generation import Collected
    from .tracing import Recorder

# The screen is told at most this often: often enough to look continuous, seldom enough that the
# terminal does not take the processor from the model.
REPORT_EVERY = 1 / 8


@dataclass(kw_only=True)
class Answer:
    """What to answer, and how.

    Attributes
    ----------
    id : int
        Names the answer in every message about it.
    thread : sequence of messages
    profile : Profile
    cancel : threading.Event
        Set to stop.
    recorder : Recorder, optional
        Where to record how the answer comes about.
    """

    id: int
    thread: Sequence[Mapping[str, str]]
    profile: Profile
    seed: int | None = None
    truncate: bool = False
    recorder: Recorder | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    def run(self, engine: ChatEngine, post: Callable[[Message], Any]) -> None:
        """Answer, and ``post`` messages as it goes. Never raises an error of steersman's own."""
        from .generation import Collected

        try:
            model = engine.prepare(
                self.profile,
                opening=lambda role, what: post(messages.ModelOpening(role, what)),
                cancelled=self.cancel.is_set,
            )
            post(messages.AnswerStarted(self.id, f"{self._maker(model)} · {self.profile.name}"))
            collected = Collected()
            reporter = _Reporter(self.id, post)
            events = engine.stream(
                self.thread,
                self.profile,
                cancel=self.cancel,
                seed=self.seed,
                truncate=self.truncate,
                trace=self.recorder.top if self.recorder is not None else None,
            )
            if self.recorder is not None:
                events = self.recorder.follow(events, models=engine.models, profile=self.profile)
            for event in events:
                collected.take(event)
                reporter.take(event)
            reporter.flush()
            facts = self._facts(collected, model)
            if roles := described(engine.models):
                facts["roles"] = roles
            if reporter.rewinds:
                facts["rewinds"] = reporter.rewinds
            post(messages.AnswerDone(self.id, collected.text, facts, collected.truncated))
        except SteersmanError as exc:
            post(messages.AnswerFailed(self.id, str(exc)))
        except Exception as exc:  # an engine's own failure must not take the chat down
            post(messages.AnswerFailed(self.id, problem(exc).message))

    @staticmethod
    def _maker(model: Any) -> str:
        return f"{model.info.name} on {model.info.backend}"

    def _facts(self, collected: Collected, model: Any) -> dict[str, Any]:
        from .generation import timings_record

        return {
            "model": model.info.name,
            "backend": model.info.backend,
            "profile": self.profile.name,
            "profile_fingerprint": self.profile.fingerprint,
            "seed": collected.seed,
            "finish_reason": collected.finish_reason,
            "timings": timings_record(collected.timings),
        }


class _Reporter:
    """Gathers events and posts what they come to, at most eight times a second."""

    def __init__(self, answer: int, post: Callable[[Message], Any]) -> None:
        self._answer = answer
        self._post = post
        self._text = ""
        self._withdrawn = 0
        self._taken = ""
        self.rewinds = 0
        self._tokens = 0
        self._first: float | None = None
        self._last_post = 0.0

    def take(self, event: Any) -> None:
        from steersman.core.decode.events import Finished, Prefilled, TokenEvent, Withdrawn

        if isinstance(event, Prefilled):
            self._post(messages.AnswerProgress(self._answer, event.done, event.total))
        elif isinstance(event, TokenEvent):
            self._tokens = event.index + 1
            self._text += event.text
            self._first = self._first or time.perf_counter()
        elif isinstance(event, Withdrawn):
            self._tokens = event.keep
            self._taken = event.text
            self.rewinds += bool(event.text)
            # What was not posted yet is simply forgotten; the rest has to be taken back on screen.
            unposted = min(len(self._text), len(event.text))
            self._text = self._text[: len(self._text) - unposted]
            self._withdrawn += len(event.text) - unposted
        elif isinstance(event, Finished):
            self._text += event.tail
        if time.perf_counter() - self._last_post >= REPORT_EVERY:
            self.flush()

    def flush(self) -> None:
        """Post what has gathered."""
        if not self._text and not self._withdrawn and not self._taken:
            return
        now = time.perf_counter()
        seconds = now - self._first if self._first is not None else 0.0
        self._post(
            messages.AnswerText(
                self._answer,
                self._withdrawn,
                self._text,
                self._tokens,
                seconds,
                self._taken,
                self.rewinds,
            )
        )
        self._text, self._withdrawn, self._taken, self._last_post = "", 0, "", now
