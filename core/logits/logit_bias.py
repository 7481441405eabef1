"""Logit bias: add a constant to the logits of chosen tokens, or forbid them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from ..array import Array, asarray_like
from ..errors import UsageError
from ..model import Tokenizer
from ..ops.scatter import put_at, take_at
from .stage import Context, Stage


def apply_logit_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """Add ``bias[id]`` to the logit of every token named.

    Parameters
    ----------
    logits : float array (B, V)
    bias : mapping of token id to float
        -inf forbids the token.

    Raises
    ------
    UsageError
        An id is outside 0..V-1.
    """
    if not bias:
        return logits
    rows, size = logits.shape
    ids = np.fromiter(bias, np.int64, len(bias))
    if ids.min() < 0 or ids.max() >= size:
        wrong = next(i for i in bias if not 0 <= i < size)
        raise UsageError(f"logit_bias: token id {wrong} is outside the vocabulary 0..{size - 1}")
    columns = np.tile(ids, rows)
    lines = np.repeat(np.arange(rows), len(ids))
    added = np.tile(np.fromiter(bias.values(), np.float32, len(bias)), rows)
    values = take_at(logits, lines, columns) + asarray_like(added, logits, dtype=logits.dtype)
    return put_at(logits, lines, columns, values)


@dataclass(frozen=True, kw_only=True)
class LogitBias(Stage):
    """Add a constant to the logits of chosen tokens; an empty ``bias`` is off.

    Parameters
    ----------
    bias : mapping of token id (int) or text (str) to float
        -inf forbids a token, otherwise -1000 to 1000. Text must be a single token of the model,
        written with its leading space if it has one; it is looked up when the stage is bound.
    """

    name: ClassVar[str] = "logit_bias"
    changes_argmax: ClassVar[bool] = True
    by_id: ClassVar[bool] = True
    bias: Mapping[int | str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.bias, Mapping):
            raise UsageError(
                f"{self.name}: bias must map token ids or texts to numbers, got {self.bias!r}"
            )
        for key, value in self.bias.items():
            if isinstance(key, bool) or not isinstance(key, (int, np.integer, str)) or key == "":
                raise UsageError(f"{self.name}: bias key must be a token id or a text, got {key!r}")
            if not isinstance(key, str) and key < 0:
                raise UsageError(f"{self.name}: token id must be 0 or more, got {key!r}")
            good = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
            if not good or not (value == -math.inf or -1000 <= value <= 1000):
                raise UsageError(
                    f"{self.name}: bias of {key!r} must be -inf or in [-1000, 1000], got {value!r}"
                )
        object.__setattr__(self, "bias", dict(self.bias))

    @property
    def off(self) -> bool:
        return not self.bias

    @property
    def needs_tokenizer(self) -> bool:
        return any(isinstance(key, str) for key in self.bias)

    def bind(self, tokenizer: Tokenizer) -> LogitBias:
        """Return the stage with every text replaced by its id.

        Raises
        ------
        UsageError
            A text is not a single token, or an id is outside the vocabulary.
        """
        bias: dict[int | str, float] = {}
        for key, value in self.bias.items():
            token = self._single(key, tokenizer) if isinstance(key, str) else int(key)
            if token >= tokenizer.vocab_size:
                raise UsageError(
                    f"{self.name}: token id {token} is outside the vocabulary "
                    f"0..{tokenizer.vocab_size - 1}"
                )
            bias[token] = bias.get(token, 0.0) + float(value)
        return replace(self, bias=bias)

    def _single(self, text: str, tokenizer: Tokenizer) -> int:
        tokens = tokenizer.encode(text)
        if len(tokens) != 1:
            raise UsageError(
                f"{self.name}: {text!r} is {len(tokens)} tokens of this model ({tokens}); "
                "give a text that is one token, or ids"
            )
        return tokens[0]

    def __call__(self, logits: Array, context: Context) -> Array:
        if self.needs_tokenizer:
            raise UsageError(f"{self.name}: texts are not looked up yet; call bind(tokenizer)")
        return apply_logit_bias(logits, self.bias)  # type: ignore[arg-type]
