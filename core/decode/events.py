"""What a caller of ``stream`` receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A token the model considered at a position."""

    id: int
    text: str
    raw_logprob: float


@dataclass(frozen=True, kw_only=True)
class Started:
    """The prompt is ready: sent once, before anything runs.

    ``truncated`` counts prompt tokens that were cut from the front because truncation was allowed.
    """

    prompt_token_ids: tuple[int, ...]
    seed: int
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Prompt progress: ``done`` of ``total`` tokens are cached, ``cached`` of them from before."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One token was appended.

    Attributes
    ----------
    index : int
        Place among the generated tokens.
    id : int
    bytes : bytes
        The token's exact bytes.
    text : str
        Text that became complete with this token; "" inside a multi-byte character or while a
        stop string might be forming.
    raw_logprob, logprob : float or None
        Natural log; before and after the sampling chain.
    top : tuple of Alternative
        Most likely first; empty unless asked for.
    trace : mapping or None
        What each stage of the chain changed; None unless asked for.
    """

    index: int
    id: int
    bytes: bytes
    text: str
    raw_logprob: float | None = None
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()
    trace: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Withdrawn:
    """Tokens from index ``keep`` on are taken back; ``text`` is the shown text that goes."""

    keep: int
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Note:
    """A strategy's own remark on a step (accepted drafts, a gave-up ban ...)."""

    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time went. Seconds; ``calls`` counts forward calls per role after the prompt."""

    prompt_tokens: int
    cached_tokens: int
    prefill_s: float
    generated_tokens: int
    decode_s: float
    calls: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of decoding, the prompt not counted."""
        return self.generated_tokens / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event.

    ``reason`` is "eos", "stop" (a stop string; it is cut from the text), "length" or "cancelled".
    ``tail`` is the end of ``text`` that no earlier event carried: it was held back because a
    character or a stop string might still have been completed.
    """

    reason: str
    text: str
    tail: str
    token_ids: tuple[int, ...]
    timings: Timings
    stop: str | None = None


Event = Started | Prefilled | TokenEvent | Withdrawn | Note | Finished
