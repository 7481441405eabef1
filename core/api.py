"""The library's front door: ``load``, ``stream``, ``generate``, ``score``.

Nothing here imports an engine; ``load`` finds one by name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .array import to_numpy
from .backend import engine_for, load_with
from .decode.events import Event, Finished, Started, Timings, TokenEvent, Withdrawn
from .decode.rng import Rng
from .decode.sessions import Sessions
from .errors import ContextOverflow, UsageError
from .evidence import evidence_spans
from .layers import LayerChoice, read_layers
from .locate import locate
from .model import Capability, Forward, IntArray, Model, Tokenizer
from .ops import target_logprobs

if TYPE_CHECKING:
    from .profile import Profile

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]

__all__ = [
    "Generation",
    "Score",
    "encode_prompt",
    "generate",
    "load",
    "open_session",
    "score",
    "stream",
]


def load(
    model: str = "smollm2",
    *,
    backend: str = "auto",
    context: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    layers: LayerChoice | None = None,
    adapter: str | None = None,
    offline: bool = False,
    **options: Any,
) -> Model:
    """Open a model.

    Parameters
    ----------
    model : str
        Known name ("smollm2"), GGUF file, Hugging Face folder, or hub id ("user/repo[:quant]").
    backend : {"auto", "llamacpp", "torch", "mlx"}
        "auto" takes the first installed engine that suits the file and the machine.
    context : int, optional
        Positions per row; the engine's default (at most what the model was trained for) if None.
    dtype, device : str
        Passed on to the engine; "auto" lets it choose.
    threads : int, optional
        CPU threads; ``$STEERSMAN_THREADS`` or the engine's choice if None.
    layers : int, str or sequence of int, optional
        Keep only some layers of the same weights: a number n (the first n), or a list such as
        "0-9,20-29" (:mod:`steersman.core.layers`). A cheap draft for the whole model.
    adapter : str, optional
        Folder of a LoRA adapter in peft's format, or the name of one that steersman brings
        (:mod:`steersman.core.adapters`). It is merged into the weights once, in the cache.
    offline : bool
        Never ask the hub.
    **options
        Options of one engine, as its documentation names them.

    Raises
    ------
    MissingFile, MissingDependency, InvalidInput, UsageError
        One line each: what, where and the remedy.
    """
    if layers is not None:
        read_layers(layers)  # a slip in writing is told before anything is opened
        options["layers"] = layers
    source = locate(model, offline=offline)
    name = engine_for(source.kind) if backend == "auto" else backend
    if threads is None:
        threads = _threads_from_environment()
    if threads is not None and threads < 1:
        raise UsageError(f"threads: must be at least 1, got {threads}")
    if context is not None and context < 8:
        raise UsageError(f"context: must be at least 8, got {context}")
    said = {"context": context, "dtype": dtype, "device": device, "threads": threads, **options}
    merged: dict[str, Any] = {}
    if adapter is not None:
        from .adapters import find_adapter

        merged["adapter"] = find_adapter(adapter)
        said["adapter"] = str(adapter)
    opened = load_with(name, source, **{**said, **merged})
    opened.options = {"model": model, "backend": name, **said, "offline": offline}
    return opened


def _threads_from_environment() -> int | None:
    value = os.environ.get("STEERSMAN_THREADS")
    if not value:
        return None
    if not value.isdecimal():
        raise UsageError(f"STEERSMAN_THREADS: must be a whole number, got {value!r}")
    return int(value)


def open_session(model: Model | Mapping[str, Model], *, context: int | None = None) -> Sessions:
    """Return an empty conversation cache for ``stream(..., session=...)``."""
    return Sessions(model, context=context)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> IntArray:
    """Return the token ids (T,) of raw text, chat messages or ready ids.

    Raises
    ------
    UsageError
        The prompt is empty, or messages are given and the model has no chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            ids = [tokenizer.bos_id, *ids]
    elif prompt and isinstance(prompt[0], Mapping):
        from .chat import encode_chat

        ids = encode_chat(tokenizer, cast("Sequence[Message]", prompt))
    else:
        ids = [int(i) for i in cast("Sequence[int]", prompt)]
    if not ids:
        raise UsageError("prompt: empty; give some text or at least one message")
    return np.asarray(ids, np.int64)


def stream(
    model: Model,
    prompt: Prompt,
    *,
    profile: str | Profile = "balanced",
    seed: int | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    trace: int | None = None,
    session: Sessions | None = None,
    truncate: bool = False,
    cancel: Callable[[], bool] | threading.Event | None = None,
    overrides: Mapping[str, Any] | None = None,
    models: Mapping[str, Model] | None = None,
    evidence: Sequence[str] = (),
) -> Iterator[Event]:
    """Generate, and yield typed events as they happen.

    Parameters
    ----------
    model : Model
        Takes the role "target".
    prompt : str, sequence of messages, or sequence of token ids
        A str is raw text; messages (``{"role": ..., "content": ...}``) go through the model's chat
        template.
    profile : str or Profile
        Name, path or loaded profile.
    seed : int, optional
        Same seed, same prompt, same logits: same text. Drawn afresh if None, and reported.
    max_tokens : int, optional
        The profile's limit if None; what is left of the context bounds both.
    stop : sequence of str
        Strings that end the text, beside the profile's own.
    logprobs : int, optional
        0: raw and final log-probability of each token; n: the n most likely tokens as well.
    trace : int, optional
        n: tell in ``TokenEvent.trace`` what every stage of the chain changed (``Chain.explain``),
        with the n likeliest tokens after it, 0..100. Some milliseconds per token. Log-probabilities
        come with it.
    session : Sessions, optional
        Cache kept between turns (:func:`open_session`). Only one stream may use it at a time.
    truncate : bool
        Cut a prompt that does not fit from the front instead of raising.
    cancel : callable or threading.Event, optional
        Polled between tokens and between prompt chunks.
    overrides : mapping, optional
        Profile parameters to change, such as ``{"temperature.t": 0.5}``.
    models : mapping of role to Model, optional
        Models for other roles ("draft", ...).
    evidence : sequence of str
        Texts of the prompt that the answer shall rest on; strategies that look at evidence (opera)
        are told where they stand. Each must occur in the prompt.

    Yields
    ------
    Event
        Started, Prefilled..., TokenEvent / Withdrawn / Note..., Finished.

    Raises
    ------
    CapabilityError, ContextOverflow, UsageError, ProfileError
        Before the first token.
    """
    # Checked now, not at the first next(): a caller learns of bad input where the call stands.
    chosen = _profile(profile, model, overrides)
    own = session is None
    sessions = Sessions({"target": model, **(models or {})}) if session is None else session
    if sessions.target is not model:
        raise UsageError("session: belongs to another model; open one for this model")
    ids = encode_prompt(model.tokenizer, prompt)
    rng = Rng.fresh() if seed is None else Rng(seed)
    limit = max_tokens if max_tokens is not None else chosen.max_tokens
    if limit is not None and limit < 0:
        raise UsageError(f"max_tokens: must be at least 0, got {limit}")
    if logprobs is not None and not 0 <= logprobs <= 1000:
        raise UsageError(f"logprobs: must be in 0..1000, got {logprobs}")
    if trace is not None and not 0 <= trace <= 100:
        raise UsageError(f"trace: must be in 0..100, got {trace}")
    open_sessions = sessions.prepare(chosen.strategy, name=chosen.strategy_name)
    tightest = min(open_sessions, key=lambda role: open_sessions[role].context)
    room = open_sessions[tightest].context
    ids, cut = _fit(ids, room, truncate, tightest)
    if isinstance(evidence, str):
        raise UsageError("evidence: must be a sequence of texts, got one text")
    spans = evidence_spans(model.tokenizer, ids, evidence)
    poll = cancel.is_set if isinstance(cancel, threading.Event) else cancel
    return _events(
        chosen, sessions, open_sessions, ids, cut, rng,
        limit=min(limit if limit is not None else room, room - len(ids)),
        context=room,
        stop=(*chosen.stop, *stop),
        logprobs=logprobs if logprobs is not None or trace is None else 0,
        trace=trace,
        evidence=spans,
        cancelled=poll or (lambda: False),
        own=own,
    )  # fmt: skip


def _events(
    profile: Profile,
    sessions: Sessions,
    open_sessions: Mapping[str, Any],
    ids: IntArray,
    cut: int,
    rng: Rng,
    *,
    limit: int,
    context: int,
    stop: Sequence[str],
    logprobs: int | None,
    trace: int | None,
    evidence: tuple[tuple[int, int], ...],
    cancelled: Callable[[], bool],
    own: bool,
) -> Iterator[Event]:
    from .decode.loop import decode
    from .decode.types import Request

    try:
        yield Started(prompt_token_ids=tuple(ids.tolist()), seed=rng.seed, truncated=cut)
        request = Request(
            prompt=ids,
            models=sessions.models,
            eos_ids=sessions.target.tokenizer.eos_ids,
            max_tokens=limit,
            context=context,
            logprobs=logprobs,
            trace=trace,
            evidence=evidence,
        )
        yield from decode(
            profile.strategy, open_sessions, request, rng, stop=stop, cancelled=cancelled
        )
    finally:
        if own:
            sessions.close()


def _profile(profile: str | Profile, model: Model, overrides: Mapping[str, Any] | None) -> Profile:
    from .profile import Profile, load_profile

    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    if overrides:
        loaded = loaded.override(overrides)
    return loaded.bind(model.tokenizer)


def _fit(ids: IntArray, room: int, truncate: bool, role: str) -> tuple[IntArray, int]:
    """Return ids that leave room for at least one new token, and how many were cut."""
    most = room - 1
    if len(ids) <= most:
        return ids, 0
    if not truncate:
        whose = f" (of role {role!r})" if role != "target" else ""
        raise ContextOverflow(
            f"prompt: {len(ids)} tokens do not fit into a context of {room}{whose}; "
            "shorten it, raise --ctx-size or allow --truncate"
        )
    return ids[len(ids) - most :], len(ids) - most


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished text.

    ``tokens`` holds one TokenEvent per remaining token, with its log-probabilities.
    """

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    tokens: tuple[TokenEvent, ...]
    finish_reason: str
    seed: int
    truncated: int
    timings: Timings


def generate(model: Model, prompt: Prompt, **options: Any) -> Generation:
    """Run :func:`stream` to its end and return the result; the same parameters."""
    started: Started | None = None
    tokens: list[TokenEvent] = []
    for event in stream(model, prompt, **options):
        if isinstance(event, Started):
            started = event
        elif isinstance(event, TokenEvent):
            tokens.append(event)
        elif isinstance(event, Withdrawn):
            del tokens[event.keep :]
        elif isinstance(event, Finished) and started is not None:
            return Generation(
                text=event.text,
                prompt_token_ids=started.prompt_token_ids,
                token_ids=event.token_ids,
                tokens=tuple(tokens),
                finish_reason=event.reason,
                seed=started.seed,
                truncated=started.truncated,
                timings=event.timings,
            )
    raise AssertionError("stream ended without a Finished event")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probability of every token of a text.

    Attributes
    ----------
    token_ids : tuple of int
    logprobs : tuple of float or None
        Natural log of each token given all before it (in its window); None for a first token that
        nothing precedes.
    token_bytes : tuple of bytes
    windows : int
        1 if the text fits the context; otherwise it was scored in overlapping windows.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    token_bytes: tuple[bytes, ...]
    windows: int

    @property
    def scored(self) -> int:
        """Number of tokens that have a log-probability."""
        return sum(lp is not None for lp in self.logprobs)

    @property
    def nll(self) -> float:
        """Total negative log-likelihood in nats."""
        return -sum(lp for lp in self.logprobs if lp is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; nan if nothing was scored."""
        return float(np.exp(self.nll / self.scored)) if self.scored else float("nan")

    @property
    def bits_per_byte(self) -> float:
        """Total bits over the bytes of the scored tokens; nan if there are none."""
        pairs = zip(self.token_bytes, self.logprobs, strict=True)
        size = sum(len(b) for b, lp in pairs if lp is not None)
        return self.nll / np.log(2.0) / size if size else float("nan")


def score(
    model: Model,
    text: str,
    *,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Score:
    """Return the log-probability of every token of ``text``.

    A text longer than the context is scored in windows of the full context that advance by
    ``stride`` tokens; each token is scored once, in the window that gives it the most context.

    Parameters
    ----------
    stride : int, optional
        Tokens per window that are newly scored, 1..context-1; half the context if None.
    progress : callable, optional
        Called with (tokens done, tokens in all).
    cancel : callable, optional
        Polled between chunks; raises Cancelled.
    """
    from .errors import Cancelled

    tokenizer = model.tokenizer
    ids = np.asarray(tokenizer.encode(text), np.int64)
    lead = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    tokens = np.concatenate([np.asarray(lead, np.int64), ids])
    room = model.info.context
    advance = room // 2 if stride is None else stride
    if not 1 <= advance < room:
        raise UsageError(f"stride: must be in 1..{room - 1}, got {advance}")
    values = np.full(len(tokens), np.nan)
    windows = 0
    with model.session(needs=Capability.ALL_LOGITS) as session:
        done = 1  # tokens[0] has nothing before it
        while done < len(tokens):
            windows += 1
            # The window ends at most ``room`` after its begin, and scores what is not yet done.
            end = min(len(tokens), room if windows == 1 else done + advance)
            begin = max(0, end - room)
            keep = 0
            for at in range(begin, end - 1, model.prefill_chunk):
                if cancel is not None and cancel():
                    raise Cancelled("score: cancelled")
                stop_at = min(end - 1, at + model.prefill_chunk)
                piece = tokens[at:stop_at]
                wanted = stop_at >= done  # some target in this chunk is not scored yet
                out = session.forward(
                    Forward(keep=keep, tokens=piece[None], logits="all" if wanted else "none")
                )
                keep += len(piece)
                if wanted and out.logits is not None:
                    answers = target_logprobs(out.logits[0], tokens[at + 1 : stop_at + 1])
                    chunk = to_numpy(answers)
                    first = max(done, at + 1)
                    values[first : stop_at + 1] = chunk[first - at - 1 :]
                if progress is not None:
                    progress(min(stop_at + 1, end), len(tokens))
            done = end
    kept = values[len(lead) :]
    return Score(
        token_ids=tuple(ids.tolist()),
        logprobs=tuple(None if np.isnan(v) else float(v) for v in kept),
        token_bytes=tuple(tokenizer.token_bytes(int(i)) for i in ids),
        windows=max(windows, 1),
    )
