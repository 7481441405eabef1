"""Between which two tokens of a trace the hidden states are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from ..errors import InvalidInput, UsageError
from ..model import IntArray, Model, Tokenizer

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class TraceRule:
    """How a trace becomes tokens, a first and a last position, and a matrix of states.

    Parameters
    ----------
    span : {"tags", "response"}
        "tags": from the last token of the opening tag to the last token of the closing tag.
        "response": from the last token of the prompt to the last token of the response, or to the
        last one before ``answer_marker``; for models that do not mark their reasoning.
    opening, closing : str
        Tags. The first opening tag counts (it may stand in the prompt), and the last closing tag
        after it.
    answer_marker : str
        With "response": the final answer begins at the last place where this stands, such as
        ``\\boxed`` or ``####``; empty: the whole response counts.
    max_tokens : int or None
        Tokens of a response that are read at most. A closing tag behind them is not seen, so that
        a cut trace has no span; with "response" the span ends at the cut.
    chat : bool
        Send a plain prompt as a message through the model's chat template.
    layers : {"all", "last"}
        "last" compares the last layer alone: a reduced variant.
    final_norm : bool
        Take the last layer's state after the model's final norm.
    """

    span: Literal["tags", "response"] = "tags"
    opening: str = "<think>"
    closing: str = "</think>"
    answer_marker: str = ""
    max_tokens: int | None = None
    chat: bool = False
    layers: Literal["all", "last"] = "all"
    final_norm: bool = True

    def __post_init__(self) -> None:
        if self.span not in ("tags", "response"):
            raise UsageError(f"clue: span must be tags or response, got {self.span!r}")
        if self.layers not in ("all", "last"):
            raise UsageError(f"clue: layers must be all or last, got {self.layers!r}")
        if self.span == "tags" and not (self.opening and self.closing):
            raise UsageError("clue: opening and closing must not be empty with span tags")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"clue: max_tokens must be at least 1, got {self.max_tokens}")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> TraceRule:
        """Return the rule that :meth:`as_dict` described.

        Raises
        ------
        InvalidInput
            Another version wrote it, or it is damaged.
        """
        try:
            if set(values) != {f.name for f in fields(cls)}:
                raise ValueError("its fields are not those of this version")
            return cls(**values)
        except (TypeError, ValueError, UsageError) as error:
            raise InvalidInput(f"{where}: rule: {error}") from None

    def model_facts(self, model: Model) -> dict[str, Any]:
        """Return what states depend on beside this rule: weights, number format, template."""
        import hashlib

        info = model.info
        template = model.tokenizer.chat_template or ""
        return {
            "model": info.name,
            "weights": info.fingerprint,
            "dtype": info.dtype,
            "depth": info.layers,
            "width": info.width,
            "template": hashlib.sha256(template.encode()).hexdigest()[:16],
        }

    def locate(
        self, tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int]
    ) -> Span | None:
        """Return the span of a trace; None where it has none.

        Parameters
        ----------
        tokenizer : Tokenizer
        prompt, response : sequence of int
            Token ids; tags are found by their bytes, however tokens cut them.
        """
        kept = list(response)[: self.max_tokens]
        ids = np.asarray([*prompt, *kept], np.int64)
        pieces = [tokenizer.token_bytes(int(t)) for t in ids]
        ends = np.cumsum([len(piece) for piece in pieces])
        whole = b"".join(pieces)
        if self.span == "tags":
            opening, closing = self.opening.encode(), self.closing.encode()
            first = whole.find(opening)
            last = whole.rfind(closing, first + len(opening)) if first >= 0 else -1
            if last < 0:
                return None
            start = int(np.searchsorted(ends, first + len(opening), side="left"))
            end = int(np.searchsorted(ends, last + len(closing), side="left"))
        else:
            start, stop = len(prompt) - 1, len(ids)
            while stop > len(prompt) and int(ids[stop - 1]) in tokenizer.special_ids:
                stop -= 1
            if self.answer_marker:
                begin = int(ends[start]) if start >= 0 else 0
                at = whole.rfind(self.answer_marker.encode(), begin)
                if at >= 0:  # the token that the marker begins in belongs to the answer
                    stop = min(stop, int(np.searchsorted(ends, at, side="right")))
            end = stop - 1
        if not 0 <= start < end:
            return None
        return Span(tokens=ids[: end + 1], start=start)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A trace up to its last position.

    Attributes
    ----------
    tokens : int64 (end + 1,)
        What a model has to read.
    start : int
        Index of the first position; the last one is ``len(tokens) - 1``.
    """

    tokens: IntArray
    start: int

    @property
    def length(self) -> int:
        """Tokens between the two positions."""
        return len(self.tokens) - 1 - self.start


def encode_trace(
    tokenizer: Tokenizer, prompt: str | Messages, response: str, rule: TraceRule
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of the response to it.

    Control tokens are read from a response only where a tag of ``rule`` is one.
    """
    from ..api import encode_prompt

    if isinstance(prompt, str) and rule.chat:
        prompt = [{"role": "user", "content": prompt}]
    begun = encode_prompt(tokenizer, prompt if isinstance(prompt, str) else list(prompt))
    return [int(t) for t in begun], _encode_response(tokenizer, response, rule)


def _encode_response(tokenizer: Tokenizer, text: str, rule: TraceRule) -> list[int]:
    if rule.span != "tags":
        return tokenizer.encode(text)
    for tag in (rule.opening, rule.closing):
        ids = tokenizer.encode(tag, special=True)
        if tag in text and set(ids) <= tokenizer.special_ids:
            before, _, after = text.partition(tag)
            head = _encode_response(tokenizer, before, rule) if before else []
            return [*head, *ids, *(_encode_response(tokenizer, after, rule) if after else [])]
    return tokenizer.encode(text)
