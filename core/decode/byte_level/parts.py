"""The pieces that the covers of a text are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .canonical import Tokens
from .vocabulary import FloatArray

Search = Literal["exact", "healing", "naive"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How exact, and at what cost.

    Attributes
    ----------
    exact : bool
        True: tokens that the tokenizer would not produce have no probability. False: they keep
        the little that the model gives them.
    negligible : float in [0, 0.1]
        Share of the probability that may be left out of a law: in left parts that no call was made
        for, and in tokens whose canonicity was not checked (these count as canonical). 0: nothing.
    checks : int
        Most tokens checked per law.
    rows : int
        Most left parts evaluated in one call.
    search : {"exact", "healing", "naive"}
        What covers the bytes of the prompt: all canonical sequences; those that share all but the
        prompt's last token; the prompt's own tokens.
    """

    exact: bool = True
    negligible: float = 1e-3
    checks: int = 16
    rows: int = 8
    search: Search = "exact"


@dataclass(frozen=True, kw_only=True, eq=False)
class Left:
    """Tokens after the cut, and the tokens that may come next.

    Attributes
    ----------
    tokens : tuple of int
    begin : int
        Bytes of ``tokens``: the offset in the tail at which the next token begins.
    weight : float
        Log-probability of ``tokens`` after the cut.
    low, high : int
        Range of the tokens that continue the tail from ``begin`` on.
    probs : float64 (high - low,)
        Their probabilities; 0 for those found not to be canonical here.
    known : bool (high - low,)
        Whether that was checked.
    specials : float64 (S,)
        Probabilities of control tokens; of use where ``begin`` is the tail's end.
    """

    tokens: Tokens
    begin: int
    weight: float
    low: int
    high: int
    probs: FloatArray
    known: npt.NDArray[np.bool_]
    specials: FloatArray


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A left part that was not evaluated yet, and its log-probability."""

    tokens: Tokens
    begin: int
    weight: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """What may come next.

    Attributes
    ----------
    bytes : float64 (256,)
        Probabilities; together with ``specials`` they sum to 1.
    specials : float64 (S,)
        Of the control tokens, in ascending order of their ids.
    left_out, unchecked : float
        Shares of the probability that no call was made for, or that was not checked.
    leaked : float
        Share that the model gives to tokens which cannot follow here.
    """

    bytes: FloatArray
    specials: FloatArray
    left_out: float
    unchecked: float
    leaked: float
