"""Writing a trace while text is generated."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..decode.events import Event, Finished, Note, Prefilled, Started, TokenEvent, Withdrawn
from ..errors import InvalidInput, UsageError
from ..strict_json import plain, to_json
from .format import (
    DEFAULT_LIMIT,
    FORMAT,
    MAX_DEPTH,
    MAX_LINES,
    MAX_NOTE,
    VERSION,
    depth_within,
    note_ids,
)

if TYPE_CHECKING:
    from ..model import Model, Tokenizer
    from ..profile import Profile

PROMPT_TOKENS = 32_768  # the last ones; what stands before them is left out
PROMPT_BYTES = 256 << 10
SETTINGS_BYTES = 1 << 20
LEAST_LIMIT = 1 << 10
_RESERVED = 64  # bytes kept for the line that says that the trace is full


class TraceWriter:
    """A trace file that grows by whole lines.

    Every line is written at once, so that whatever ends the program leaves a readable prefix. At
    ``limit`` a last line says that the trace is full; generation goes on. A disk that fails is no
    reason to lose a text either: :attr:`problem` tells of it.

    Parameters
    ----------
    path : str or Path
        Must not exist, unless ``append``.
    limit : int
        Bytes, 1024 or more.
    append : bool
        Go on with a trace that is there; a last line that was cut off is removed.
    clock : callable
        Seconds from any fixed moment.

    Raises
    ------
    InvalidInput
        The file exists, is no trace, or cannot be written.
    UsageError
        ``limit`` is too small.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        limit: int = DEFAULT_LIMIT,
        append: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if limit < LEAST_LIMIT:
            raise UsageError(f"trace: the limit must be at least {LEAST_LIMIT} bytes, got {limit}")
        self.path = Path(path)
        self.limit = limit
        self.full = False
        self.problem: str | None = None
        self._clock = clock
        self._size = self._lines = 0
        self._request = -1
        self._begun = clock()
        self._named: set[int] = set()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (0 if append else os.O_EXCL)
        try:
            self._handle = os.open(self.path, flags, 0o644)
        except FileExistsError:
            raise InvalidInput(f"{path}: exists already; choose another name") from None
        except OSError as exc:
            raise InvalidInput(f"{path}: cannot be written: {exc.strerror}") from None
        if append:
            try:
                self._go_on()
            except BaseException:
                self.close()
                raise
        if not self._lines:
            self._write({"format": FORMAT, "version": VERSION, "steersman": _version()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    @property
    def open(self) -> bool:
        """Whether events are still written."""
        return self._handle >= 0 and not self.full and self.problem is None

    def record(
        self,
        events: Iterable[Event],
        *,
        models: Model | Mapping[str, Model],
        profile: Profile,
        request: int | None = None,
    ) -> Iterator[Event]:
        """Yield the events of one stream on, each after it was written.

        Parameters
        ----------
        events : iterable of Event
            What ``stream(..., trace=n)`` yields.
        models : Model or mapping of role to Model
            A single model has the role "target".
        profile : Profile
        request : int, optional
            Number of the request in the file; one more than the last if None.
        """
        roles = dict(models) if isinstance(models, Mapping) else {"target": models}
        self._request = self._request + 1 if request is None else request
        self._begun = self._clock()
        self._named = set()
        try:
            for event in events:
                if self.open:
                    self._take(event, roles, profile)
                yield event
        except Exception as exc:
            self._event("failed", message=str(exc)[:2000])
            raise

    # -- events --------------------------------------------------------------------------------

    def _take(self, event: Event, models: Mapping[str, Model], profile: Profile) -> None:
        tokenizer = models["target"].tokenizer
        if isinstance(event, Started):
            self._started(event, models, profile)
        elif isinstance(event, Prefilled):
            self._event("prefilled", done=event.done, total=event.total, cached=event.cached)
        elif isinstance(event, TokenEvent):
            self._token(event, tokenizer)
        elif isinstance(event, Withdrawn):
            self._event("withdrawn", keep=event.keep, tokens=event.tokens)
        elif isinstance(event, Note):
            self._note(event, tokenizer)
        elif isinstance(event, Finished):
            self._finished(event)

    def _started(self, event: Started, models: Mapping[str, Model], profile: Profile) -> None:
        ids = event.prompt_token_ids
        tokenizer = models["target"].tokenizer
        pieces: list[bytes] = []
        size = 0
        for token in reversed(ids[-PROMPT_TOKENS:]):
            pieces.append(tokenizer.token_bytes(token))
            size += len(pieces[-1])
            if size >= PROMPT_BYTES:
                break
        first = len(ids) - len(pieces)
        settings: Any = {k: v for k, v in profile.as_dict().items() if k != "description"}
        if len(to_json(settings)) > SETTINGS_BYTES or not depth_within(settings, MAX_DEPTH):
            settings = None
        self._event(
            "started",
            models={role: _facts(model) for role, model in models.items()},
            profile={
                "name": profile.name,
                "fingerprint": profile.fingerprint,
                "settings": settings,
            },
            seed=event.seed,
            truncated=event.truncated,
            prompt=b"".join(reversed(pieces)).decode("utf-8", "replace"),
            prompt_ids=list(ids[first:]),
            prompt_omitted=first,
        )

    def _token(self, event: TokenEvent, tokenizer: Tokenizer) -> None:
        trace = event.trace or {}
        ids = [event.id]
        for entry in (trace.get("raw"), *trace.get("stages", ())):
            ids += [i for i, _ in (entry or {}).get("top", ())]
        facts: dict[str, Any] = {"index": event.index, "id": event.id, "text": event.text}
        if event.bytes != event.text.encode("utf-8", "surrogatepass"):
            facts["bytes"] = event.bytes.hex()
        for key in ("raw_logprob", "logprob"):
            if getattr(event, key) is not None:
                facts[key] = float(f"{getattr(event, key):.6g}")
        facts |= {key: trace[key] for key in ("raw", "stages") if key in trace}
        self._event("token", **facts, **self._names(ids, tokenizer))

    def _note(self, event: Note, tokenizer: Tokenizer) -> None:
        values = plain(dict(event.values))
        size = len(to_json(values)) if depth_within(values, MAX_DEPTH) else None
        if size is None or size > MAX_NOTE:
            values = {"omitted": sorted(values)[:32], "bytes": size}
            if len(to_json(values)) > MAX_NOTE:
                values = {"omitted": len(values["omitted"]), "bytes": size}
        self._event("note", values=values, **self._names(note_ids(values), tokenizer))

    def _finished(self, event: Finished) -> None:
        timings = event.timings
        self._event(
            "finished",
            reason=event.reason,
            stop=event.stop,
            tokens=len(event.token_ids),
            timings={
                "prompt_tokens": timings.prompt_tokens,
                "cached_tokens": timings.cached_tokens,
                "prefill_s": round(timings.prefill_s, 6),
                "generated_tokens": timings.generated_tokens,
                "decode_s": round(timings.decode_s, 6),
                "calls": dict(timings.calls),
            },
        )

    def _names(self, ids: Iterable[int], tokenizer: Tokenizer) -> dict[str, dict[str, str]]:
        """Return what to add to a line that mentions ``ids``: the names that are new."""
        new = sorted({i for i in ids if i not in self._named and 0 <= i < tokenizer.vocab_size})
        self._named.update(new)
        return {"names": {str(i): tokenizer.token_name(i) for i in new}} if new else {}

    # -- lines ---------------------------------------------------------------------------------

    def _event(self, event: str, **facts: Any) -> None:
        at = round(self._clock() - self._begun, 4)
        self._write({"event": event, "request": self._request, "t": at, **facts})

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self.open:
            return
        line = (to_json(record) + "\n").encode()
        if self._size + len(line) > self.limit - _RESERVED or self._lines + 2 > MAX_LINES:
            self.full = True
            line = (to_json({"event": "full", "limit": self.limit}) + "\n").encode()
        self._size += len(line)
        self._lines += 1
        try:
            while line:
                line = line[os.write(self._handle, line) :]
        except OSError as exc:
            self.problem = f"{self.path}: cannot be written: {exc.strerror}; the trace ends here"

    def _go_on(self) -> None:
        """Take note of what an existing file holds, and remove a line that was cut off."""
        from .reader import read_trace

        if not os.fstat(self._handle).st_size:
            return
        for line in read_trace(self.path):
            self._size = line.end
            self._lines = line.number
            self._request = max(self._request, line.data.get("request", -1))
            self.full = line.event == "full"
        try:
            os.ftruncate(self._handle, self._size)
        except OSError as exc:
            raise InvalidInput(f"{self.path}: cannot be written: {exc.strerror}") from None


def _facts(model: Model) -> dict[str, Any]:
    info = model.info
    return {
        "name": info.name,
        "backend": info.backend,
        "dtype": info.dtype,
        "device": info.device,
        "vocab_size": info.vocab_size,
        "fingerprint": info.fingerprint,
    }


def _version() -> str:
    try:
        return version("steersman")
    except PackageNotFoundError:
        return "unknown"
