"""``steersman generate --jsonl``: many prompts, one result per line in input order, resumable.

Each result is appended by a single write once it is complete, so a run that is cut off anywhere
leaves whole lines; the same command then goes on where it stopped. A line's result remembers which
input line, model and settings it came from, so that results of different runs never mix.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from steersman.core.decode.rng import Rng
from steersman.core.errors import (
    CapabilityError,
    InvalidInput,
    MissingFile,
    SteersmanError,
    UsageError,
)
from steersman.core.roles import role_options

from . import common, generation, output
from .batch_input import Item, lines, parse
from .envelope import PARTIAL, Envelope, problem, to_json
from .interrupts import ctrl_c_cancels
from .roles import note_opening, open_roles
from .tracing import Recorder, TraceArgs

if TYPE_CHECKING:
    from steersman.core.roles import Roles


def run_batch(
    source: str,
    out: str | None,
    *,
    model_args: common.ModelArgs,
    sampling: common.SamplingArgs,
    chat: bool,
    system: str | None,
    top_logprobs: int | None,
    envelope: Envelope,
    trace_args: TraceArgs | None = None,
) -> None:
    """Generate for every line of ``source``; results go to ``out`` or stdout.

    A line that is malformed or cannot be answered gets a result with ``error``, and the exit code
    becomes 7. Ctrl-C ends after the results so far (exit code 130). A trace beside ``out`` is
    appended to, like ``out`` itself.
    """
    if envelope.json and out is None:
        raise UsageError("--json: results of a batch go to stdout; name a file with --out")
    profile = sampling.load_profile()
    envelope.inputs = {"jsonl": source, "out": out, "profile": sampling.profile, "chat": chat}
    envelope.resolved = {
        "profile": profile.name,
        "profile_fingerprint": profile.fingerprint,
        "settings": [vars(s) for s in common.settings(profile, model_args, sampling)],
    }
    with (
        (trace_args or TraceArgs()).recorder(append=out is not None) as recorder,
        _source(source) as (file, total),
        open_roles(model_args, profile, envelope=envelope, all_known=True) as roles,
    ):
        facts = envelope.resolved["model"]
        run_key = _digest(
            facts["name"], facts["backend"], facts["dtype"], facts["fingerprint"],
            profile.fingerprint, sampling.stop, sampling.seed, sampling.truncate, chat, system,
            top_logprobs,
            *(
                (role, f["name"], f["backend"], f["dtype"], f["fingerprint"])
                for role, f in envelope.resolved.get("roles", {}).items()
            ),
        )  # fmt: skip
        worker = _Worker(roles, model_args, sampling, top_logprobs, recorder, envelope)
        with _Sink(out) as sink, ctrl_c_cancels() as cancel:
            done, failed = sink.done, sink.failed
            with output.progress(total, label="generate", unit="line", done=done) as bar:
                for place, (number, raw) in enumerate(lines(file)):
                    key = _digest(run_key, raw.strip())
                    if place < sink.done:
                        sink.check(place, key)
                        continue
                    if cancel.is_set():
                        break
                    record = worker.answer(number, raw, chat, system, cancel)
                    if record is None:
                        break
                    failed += record.get("error") is not None
                    record["steersman"] = {"line": number, "key": key, **worker.facts}
                    sink.write(record)
                    done += 1
                    bar.update()
            cancelled = cancel.is_set()
    envelope.artifacts = {"out": out} if out else {}
    if recorder.path is not None:
        envelope.artifacts["trace"] = recorder.path
    envelope.metrics = {"done": done, "failed": failed, "total": total, "resumed": sink.done}
    if sink.done:
        output.note(f"{out}: {sink.done} results were there already")
    if cancelled:
        output.note(f"cancelled after {done} results; the same command goes on from here")
        envelope.exit_code = 130
    elif failed:
        envelope.exit_code = PARTIAL
    output.note(f"{done} results, {failed} of them errors")


def _digest(*parts: Any) -> str:
    text = b"\x00".join(p if isinstance(p, bytes) else repr(p).encode() for p in parts)
    return hashlib.sha256(text).hexdigest()[:16]


@contextmanager
def _source(name: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """Open the input; the number of its lines where it can be told."""
    if name == "-":
        yield sys.stdin.buffer, None
        return
    try:
        with open(name, "rb") as file:
            total = sum(1 for _ in lines(file))
            file.seek(0)
            yield file, total
    except FileNotFoundError:
        raise MissingFile(f"{name}: no such file") from None
    except (IsADirectoryError, PermissionError) as exc:
        raise InvalidInput(f"{name}: cannot be read: {exc.strerror}") from None


class _Worker:
    """Answers one line after the other on one model, reusing what prompts have in common."""

    def __init__(
        self,
        roles: Roles,
        model_args: common.ModelArgs,
        sampling: common.SamplingArgs,
        top_logprobs: int | None,
        recorder: Recorder,
        envelope: Envelope,
    ) -> None:
        self._roles = roles
        self._model_args = model_args
        self._model = roles.target
        self._sampling = sampling
        self._logprobs = top_logprobs
        self._recorder = recorder
        self._envelope = envelope
        self._target = model_args.resolve(sampling.load_profile())
        self._base = sampling.seed if sampling.seed is not None else Rng.fresh().seed
        self._warned: set[str] = set()
        self.facts: dict[str, Any] = {}

    def answer(
        self, number: int, raw: bytes, chat: bool, system: str | None, cancel: threading.Event
    ) -> dict[str, Any] | None:
        """Return the result of one line, None when cancelled."""
        item: Item | None = None
        self.facts = {}
        try:
            item = parse(raw, line=number, chat=chat, system=system)
            return self._generate(item, cancel)
        except SteersmanError as exc:
            if isinstance(exc, CapabilityError) and (item is None or item.profile is None):
                raise  # no line could be answered
            found = problem(exc)
            self._envelope.errors.append(found)
            output.error(f"line {number}: {found.message}")
            record = dict(item.passed) if item is not None else _identity(raw)
            if item is not None and item.kind != "plain":
                record["response"] = None
            record["error"] = found.as_dict()
            return record

    def _generate(self, item: Item, cancel: threading.Event) -> dict[str, Any] | None:
        if item.model is not None:
            self._warn_once(
                f"body.model {item.model!r} is not obeyed: "
                f"every line runs on {self._model.info.name}"
            )
        profile = self._sampling.load_profile(item.profile)
        # A line speaks for itself alone, so it is stronger than flags.
        profile = profile.override(item.overrides, origin=f"line {item.line}")
        # The target is the run's; a line's profile may have other roles.
        wanted = role_options(profile, self._target, self._model_args.roles)
        self._roles.prepare(profile, wanted, opening=note_opening, keep=True)
        logprobs = item.logprobs if item.logprobs is not None else self._logprobs
        options = self._sampling.stream_options()
        options["stop"] = (*options["stop"], *item.stop)
        # Lines draw independently: each has a seed of its own, which its result names.
        options["seed"] = (
            item.seed if item.seed is not None else (self._base + item.line - 1) % 2**64
        )
        done = generation.run(
            self._model,
            item.prompt,
            profile,
            cancel=cancel,
            session=self._roles.sessions,
            models=self._roles.models,
            recorder=self._recorder,
            request=item.line,
            logprobs=logprobs,
            evidence=item.evidence,
            **options,
        )
        if done.finish_reason == "cancelled":
            return None
        if done.truncated:
            self._warn_once("some prompts were cut from the front, as --truncate allows")
        record = done.record(self._model, logprobs=logprobs is not None)
        usage = {
            "prompt_tokens": len(done.prompt_token_ids),
            "completion_tokens": len(done.tokens),
        }
        self.facts = {"seed": done.seed, "profile": profile.name}
        if item.kind != "plain":
            return _openai_answer(item, record, usage, self._model.info.name)
        result = {
            **item.passed,
            "text": record["text"],
            "finish_reason": record["finish_reason"],
            "token_ids": record["token_ids"],
            **usage,
            "truncated": done.truncated,
        }
        if "logprobs" in record:
            result["logprobs"] = record["logprobs"]
        return {**result, "error": None}

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._envelope.warn(message)


def _identity(raw: bytes) -> dict[str, Any]:
    """Return the id of a line that was refused, if one can be told."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {k: data[k] for k in ("id", "custom_id") if k in data}


def _openai_answer(
    item: Item, record: dict[str, Any], usage: dict[str, int], model: str
) -> dict[str, Any]:
    """Return a result in the shape of an OpenAI batch output line."""
    choice: dict[str, Any] = {"index": 0}
    if item.kind == "chat":
        choice["message"] = {"role": "assistant", "content": record["text"]}
    else:
        choice["text"] = record["text"]
    reason = record["finish_reason"]
    choice["finish_reason"] = "length" if reason == "length" else "stop"
    if "logprobs" in record:
        content = [
            {
                "token": t["token"],
                "bytes": t["bytes"],
                "logprob": t["raw_logprob"],
                "top_logprobs": [
                    {"token": a["token"], "logprob": a["raw_logprob"]} for a in t["top"]
                ],
            }
            for t in record["logprobs"]
        ]
        choice["logprobs"] = {"content": content}
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    body = {
        "object": "chat.completion" if item.kind == "chat" else "text_completion",
        "model": model,
        "choices": [choice],
        "usage": {**usage, "total_tokens": total},
    }
    return {
        **item.passed,
        "response": {"status_code": 200, "body": body},
        "error": None,
    }


class _Sink:
    """Where results go: stdout, or a file that is appended to a whole line at a time."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._handle: int | None = None
        self._keys: list[str] = []
        self.failed = 0

    @property
    def done(self) -> int:
        """Results that an earlier run has left."""
        return len(self._keys)

    def __enter__(self) -> _Sink:
        if self._path is None:
            return self
        try:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._lock()
            self._read()
        except OSError as exc:
            raise InvalidInput(f"{self._path}: cannot be written: {exc.strerror}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this platform
            return
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"{self._path}: another run is writing to it") from None

    def _read(self) -> None:
        """Take note of whole results; a last line that was cut off is removed."""
        assert self._handle is not None and self._path is not None
        end = 0
        with open(self._path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                end += len(raw)
                try:
                    record = json.loads(raw)
                    self._keys.append(record["steersman"]["key"])
                    self.failed += record.get("error") is not None
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise InvalidInput(
                        f"{self._path}:{number}: not a result of a batch; name another --out"
                    ) from None
        os.ftruncate(self._handle, end)

    def check(self, place: int, key: str) -> None:
        """Refuse to go on from results of another input, model or profile."""
        if self._keys[place] != key:
            raise InvalidInput(
                f"{self._path}:{place + 1}: made from another input, model or settings; "
                "name another --out, or remove the file to start anew"
            )

    def write(self, record: dict[str, Any]) -> None:
        """Append one result."""
        data = to_json(record) + "\n"
        if self._handle is None:
            sys.stdout.write(data)
            sys.stdout.flush()
            return
        left = data.encode()
        while left:
            left = left[os.write(self._handle, left) :]
        os.fsync(self._handle)
