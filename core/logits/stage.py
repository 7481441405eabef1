"""What a stage of the logit chain is, and what it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from ..array import Array
from ..errors import UsageError
from ..model import IntArray, Tokenizer
from ..ops import mask_out


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage may look at besides the logits.

    Attributes
    ----------
    history : sequence of B int64 arrays
        Every token of each row so far, the prompt included.
    uniforms : float64 (B,) or None
        One random number in [0, 1) per row, for stages with ``needs_uniform``.
    state : object
        What this stage's ``init`` or last ``observe`` returned.
    ordered : bool
        The logits belong to candidates sorted from most to least likely, not to the vocabulary.
    """

    history: Sequence[IntArray] = ()
    uniforms: npt.NDArray[np.float64] | None = None
    state: Any = None
    ordered: bool = False


class Stage:
    """Base of the stages: frozen dataclasses of hyperparameters that map logits to logits.

    A stage returns new logits of the same shape and never writes into what it was given. Tokens it
    removes become -inf; the most likely remaining one may not be removed by a stage that says
    ``changes_argmax = False``.

    Attributes
    ----------
    name : str
        Key in profiles and first word of error messages.
    changes_argmax : bool
        Whether the most likely token can become another one. Greedy decoding skips stages for
        which this is False.
    truncates : bool
        Whether it only removes tokens, by :meth:`keep`; the chain goes on with those that remain.
    by_id : bool
        Whether it treats tokens by their id. Other stages see only values, and may be given
        candidates, sorted from most to least likely, instead of the vocabulary.
    needs_history, needs_uniform : bool
        What it reads from its :class:`Context`.
    listwise : bool
        Whether it has :meth:`on_list`, for a few candidates.
    needs_tokenizer : bool
        Whether :meth:`bind` must be called before use.
    """

    name: ClassVar[str]
    changes_argmax: ClassVar[bool] = False
    truncates: ClassVar[bool] = False
    by_id: ClassVar[bool] = False
    needs_history: ClassVar[bool] = False
    needs_uniform: ClassVar[bool] = False
    has_state: ClassVar[bool] = False
    listwise: ClassVar[bool] = False

    @property
    def off(self) -> bool:
        """Whether the parameters are neutral, so that the stage does nothing."""
        return False

    @property
    def needs_tokenizer(self) -> bool:
        """Whether :meth:`bind` is still due."""
        return False

    def bind(self, tokenizer: Tokenizer) -> Self:
        """Return the stage with everything resolved that depends on the tokenizer."""
        return self

    def __call__(self, logits: Array, context: Context) -> Array:
        """Return new logits (B, n) for ``logits`` (B, n)."""
        return mask_out(logits, self.keep(logits, context))

    def keep(self, logits: Array, context: Context) -> Array:
        """Return which tokens stay, bool (B, n): all that a truncating stage has to say."""
        raise NotImplementedError(f"{self.name}: neither __call__ nor keep is defined")

    def on_list(self, values: list[float]) -> list[float]:
        """Return the logits that are left of ``values``, which fall: the first few of them, scaled.

        The same as calling the stage, for stages that look at nothing but values and keep their
        order. On some dozens of candidates plain floats are several times faster than arrays.
        """
        raise NotImplementedError(f"{self.name}: on_list is not defined")

    def init(self, rows: int) -> Any:
        """Return the state of ``rows`` fresh rows."""
        return None

    def observe(self, state: Any, logprobs: npt.NDArray[np.float64]) -> Any:
        """Return the state after a token was drawn in every row.

        ``logprobs`` (B,) are natural logs under the distribution the tokens were drawn from.
        """
        return state

    def fork(self, state: Any, rows: IntArray) -> Any:
        """Return the state of rows that continue ``rows`` (B',) of the present ones."""
        return state


def hidden(default: Any = None) -> Any:
    """Return a dataclass field that is computed by ``bind`` and is no key of a profile."""
    return field(default=default, repr=False, compare=False, metadata={"hidden": True})


def check_number(
    name: str,
    key: str,
    value: object,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise UsageError unless ``value`` is a finite real number in the interval.

    The message reads like ``min_p: p must be in [0, 1], got 2``.
    """
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if good:
        number = float(value)  # type: ignore[arg-type]
        good = (
            math.isfinite(number)
            and (number > low if low_open else number >= low)
            and (number < high if high_open else number <= high)
        )
    if not good:
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise UsageError(f"{name}: {key} must be in {left}{low:g}, {high:g}{right}, got {value!r}")


def check_integer(name: str, key: str, value: object, low: int, high: int | None = None) -> None:
    """Raise UsageError unless ``value`` is an integer from ``low`` to ``high``."""
    good = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):  # type: ignore[operator]
        wanted = f"at least {low}" if high is None else f"in {low}..{high}"
        raise UsageError(f"{name}: {key} must be an integer, {wanted}, got {value!r}")
