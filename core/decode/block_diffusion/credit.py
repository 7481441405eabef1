"""CreditDecoding: what a masked position has preferred for several passes may be fixed earlier.

Every masked position keeps a credit ``C`` per token. In each pass it decays and the likeliest token
gains, ``C <- beta * C + [v = argmax] * p ** gamma``; then ``alpha * log(1 + C)`` is added to the
logits, which is the same as weighing probabilities with ``(1 + C) ** alpha``. Only tokens that led
at some time have any credit, so a short table per position holds all of it exactly: at most one
entry per pass, where a dense one would hold the vocabulary.

Wang et al., "CreditDecoding: Accelerating Parallel Decoding in Diffusion Large Language Models with
Trace Credits", arXiv:2510.06133.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...array import Array, asarray_like
from ...errors import UsageError, did_you_mean
from ...logits.stage import check_number
from ...model import IntArray
from ...ops.scatter import put_at, take_at

CreditSetting = Mapping[str, float] | Literal["tuning_free", False]


@dataclass(frozen=True, kw_only=True)
class CreditRule:
    """Coefficients of the credit; the defaults are the paper's.

    Parameters
    ----------
    alpha : float in [0, 10]
        How strongly credit moves the logits; 0 is plain decoding.
    beta : float in [0, 1]
        Share of the credit that is left after a pass. Credit stays below ``1 / (1 - beta)``.
    gamma : float in [0, 10]
        Exponent of the leading token's probability; small values reward leading as such.
    tuning_free : bool
        ``gamma = 1`` and ``alpha = beta = 1 - eta`` instead, with ``eta`` the share of the
        positions that are still masked: no effect in the first pass, nearly full in the last.
    """

    alpha: float = 0.65
    beta: float = 0.7
    gamma: float = 0.2
    tuning_free: bool = False

    def __post_init__(self) -> None:
        for key, most in (("alpha", 10), ("beta", 1), ("gamma", 10)):
            check_number("block_diffusion: credit", key, getattr(self, key), 0, most)

    @classmethod
    def read(cls, value: CreditSetting) -> CreditRule | None:
        """Return the rule that a profile's ``credit`` names; None for no credit.

        Raises
        ------
        UsageError
            An unknown key, or a value out of range.
        """
        if value is False:
            return None
        if value == "tuning_free":
            return cls(tuning_free=True)
        if not isinstance(value, Mapping):
            raise UsageError(
                "block_diffusion: credit must be off, tuning_free or {alpha, beta, gamma}, "
                f"got {value!r}"
            )
        known = ("alpha", "beta", "gamma")
        given: dict[str, Any] = dict(value)
        for key in given:
            if key not in known:
                raise UsageError(
                    f"block_diffusion: credit: unknown key {key!r}{did_you_mean(str(key), known)}"
                )
        return cls(**given)

    def coefficients(self, masked_share: float) -> tuple[float, float, float]:
        """Return ``(alpha, beta, gamma)`` of a pass that begins with this share still masked."""
        if self.tuning_free:
            return 1.0 - masked_share, 1.0 - masked_share, 1.0
        return self.alpha, self.beta, self.gamma


@dataclass(frozen=True)
class Credits:
    """Credit of one block: position to token to a number above 0. Immutable."""

    held: Mapping[int, Mapping[int, float]] = field(default_factory=dict)

    def observe(
        self,
        positions: Sequence[int],
        tokens: IntArray,
        probs: npt.NDArray[np.floating],
        *,
        beta: float,
        gamma: float,
    ) -> Credits:
        """Return the credit after a pass; positions that are not named are forgotten.

        Parameters
        ----------
        positions : sequence of m int
            Those still masked.
        tokens : int (m,)
            The likeliest token of each, before any credit was added.
        probs : float (m,)
            Its probability.
        """
        after = {}
        for position, token, prob in zip(positions, tokens.tolist(), probs.tolist(), strict=True):
            row = {v: beta * c for v, c in self.held.get(position, {}).items() if beta * c > 0}
            row[token] = row.get(token, 0.0) + prob**gamma
            after[position] = row
        return Credits(after)

    def entries(
        self, positions: Sequence[int]
    ) -> tuple[IntArray, IntArray, npt.NDArray[np.float64]]:
        """Return row numbers, tokens and credits of all entries of ``positions``, as arrays."""
        found = [
            (row, token, credit)
            for row, position in enumerate(positions)
            for token, credit in self.held.get(position, {}).items()
        ]
        rows, tokens, credits = zip(*found, strict=True) if found else ((), (), ())
        return np.array(rows, np.int64), np.array(tokens, np.int64), np.array(credits, np.float64)


def add_credit(
    logits: Array,
    rows: IntArray,
    tokens: IntArray,
    credit: npt.NDArray[np.float64],
    alpha: float,
) -> Array:
    """Return ``logits + alpha * log(1 + C)`` for a sparse ``C``.

    Parameters
    ----------
    logits : float array (m, V)
        Tokens at -inf stay there.
    rows, tokens : int64 (n,)
        Where ``C`` is not 0; no pair twice.
    credit : float64 (n,)
        ``C`` there.
    alpha : float
    """
    if alpha == 0 or len(rows) == 0:
        return logits
    gain = asarray_like((alpha * np.log1p(credit)).astype(np.float32), logits, dtype=logits.dtype)
    return put_at(logits, rows, tokens, take_at(logits, rows, tokens) + gain)
