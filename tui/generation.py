"""Running one generation: to the terminal as it comes, and as a record for JSON."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steersman.core.decode.events import (
    Alternative,
    Event,
    Finished,
    Note,
    Started,
    Timings,
    TokenEvent,
    Withdrawn,
)

from . import output
from .envelope import Envelope
from .safe_text import show

if TYPE_CHECKING:
    from steersman.core.model import Model
    from steersman.core.profile import Profile

    from .tracing import Recorder


@dataclass
class Printer:
    """Shows text as it is generated, and takes it back as far as a terminal can.

    A terminal cannot unprint lines that have scrolled. When text is withdrawn, a mark says how
    much, and the line that the text now ends with is written again. Into a pipe nothing may be
    written that is later withdrawn, so there everything waits for the end, unless ``live``.

    Parameters
    ----------
    live : bool
        Write pieces at once.
    """

    live: bool
    text: str = ""

    def add(self, piece: str) -> None:
        """Append text."""
        self.text += piece
        if self.live and piece:
            output.write_generated(piece)

    def withdraw(self, gone: str) -> None:
        """Take back the end of the text."""
        if not gone:
            return
        self.text = self.text.removesuffix(gone)
        if not self.live:
            return
        mark = f"[took back {len(gone)} character{'s' if len(gone) != 1 else ''}]"
        if output.is_terminal(sys.stdout):
            last_line = self.text.rpartition("\n")[2]
            sys.stdout.write("\n" + output.styled(mark, "dim") + "\n" + show(last_line))
            sys.stdout.flush()
        else:
            output.warn(f"{mark[1:-1]} that had been written already; leave out --stream")

    def finish(self) -> None:
        """Write what has waited; on a terminal, end the line."""
        if not self.live:
            output.write_generated(self.text)
        if output.is_terminal(sys.stdout) and self.text and not self.text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()


@dataclass
class Collected:
    """A generation as it stands: what events have told so far."""

    prompt_token_ids: tuple[int, ...] = ()
    seed: int = 0
    truncated: int = 0
    tokens: list[TokenEvent] = field(default_factory=list)
    notes: list[Mapping[str, Any]] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    stop: str | None = None
    timings: Timings | None = None

    def take(self, event: Event) -> None:
        """Update with one event."""
        if isinstance(event, Started):
            self.prompt_token_ids = event.prompt_token_ids
            self.seed = event.seed
            self.truncated = event.truncated
        elif isinstance(event, TokenEvent):
            self.tokens.append(event)
            self.text += event.text
        elif isinstance(event, Withdrawn):
            del self.tokens[event.keep :]
            self.text = self.text.removesuffix(event.text)
        elif isinstance(event, Note):
            self.notes.append(event.values)
        elif isinstance(event, Finished):
            self.text = event.text
            self.finish_reason = event.reason
            self.stop = event.stop
            self.timings = event.timings

    def record(self, model: Model, *, logprobs: bool) -> dict[str, Any]:
        """Return the JSON-able result."""
        record: dict[str, Any] = {
            "text": self.text,
            "prompt_token_ids": list(self.prompt_token_ids),
            "token_ids": [t.id for t in self.tokens],
            "finish_reason": self.finish_reason,
            "stop": self.stop,
            "seed": self.seed,
            "truncated": self.truncated,
        }
        if logprobs:
            record["logprobs"] = [token_record(t, model) for t in self.tokens]
        if self.notes:
            record["notes"] = [dict(n) for n in self.notes]
        record["timings"] = timings_record(self.timings)
        return record


def token_record(token: TokenEvent, model: Model) -> dict[str, Any]:
    """Return one token with its log-probabilities; ``bytes`` is exact, ``token`` to read."""
    return {
        "id": token.id,
        "token": model.tokenizer.token_name(token.id),
        "bytes": list(token.bytes),
        "raw_logprob": token.raw_logprob,
        "logprob": token.logprob,
        "top": [_alternative(a) for a in token.top],
    }


def _alternative(alternative: Alternative) -> dict[str, Any]:
    return {
        "id": alternative.id,
        "token": alternative.text,
        "raw_logprob": alternative.raw_logprob,
    }


def timings_record(timings: Timings | None) -> dict[str, Any]:
    """Return timings as JSON."""
    if timings is None:
        return {}
    return {
        "prompt_tokens": timings.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "prefill_s": timings.prefill_s,
        "generated_tokens": timings.generated_tokens,
        "decode_s": timings.decode_s,
        "tokens_per_second": timings.tokens_per_second,
        "calls": dict(timings.calls),
    }


def run(
    model: Model,
    prompt: str | Sequence[Mapping[str, str]],
    profile: Profile,
    *,
    printer: Printer | None = None,
    cancel: threading.Event | None = None,
    envelope: Envelope | None = None,
    recorder: Recorder | None = None,
    request: int | None = None,
    **options: Any,
) -> Collected:
    """Generate; show the text through ``printer`` and return all that was learned.

    With a ``recorder`` the events go into its trace, as ``request`` if that is given.
    """
    from steersman.core import stream

    if recorder is not None:
        options["trace"] = recorder.top
    events = stream(model, prompt, profile=profile, cancel=cancel, **options)
    if recorder is not None:
        models = {**(options.get("models") or {}), "target": model}
        events = recorder.follow(events, models=models, profile=profile, request=request)
    return follow(events, printer=printer, envelope=envelope)


def follow(
    events: Iterable[Event], *, printer: Printer | None = None, envelope: Envelope | None = None
) -> Collected:
    """Consume a stream of events; see :func:`run`."""
    collected = Collected()
    for event in events:
        collected.take(event)
        if isinstance(event, Started) and event.truncated and envelope is not None:
            envelope.warn(
                f"prompt: the first {event.truncated} tokens were cut, as --truncate allows"
            )
        if printer is None:
            continue
        if isinstance(event, TokenEvent):
            printer.add(event.text)
        elif isinstance(event, Withdrawn):
            printer.withdraw(event.text)
        elif isinstance(event, Finished):
            printer.add(event.tail)
            printer.finish()
    return collected


def summary(collected: Collected) -> str:
    """Return one line about a finished generation."""
    timings = collected.timings
    if timings is None:
        return "no result"
    rewinds = sum("rewind" in note for note in collected.notes)
    return (
        f"{timings.prompt_tokens} prompt tokens"
        + (f" ({timings.cached_tokens} cached)" if timings.cached_tokens else "")
        + f", {timings.generated_tokens} generated, {timings.tokens_per_second:.1f} tok/s"
        + (f", went back {rewinds} times" if rewinds > 1 else ", went back once" * rewinds)
        + f", seed {collected.seed}, end: {collected.finish_reason}"
    )
