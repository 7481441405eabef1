"""Mirostat v2: hold the surprise of the text near a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace, asarray_like
from ..model import IntArray
from ..ops import logsumexp, mask_out
from .stage import Context, Stage, check_number


def apply_mirostat(logits: Array, mu: Array) -> Array:
    """Set to -inf every token whose surprise ``-log2(prob)`` exceeds ``mu``.

    Parameters
    ----------
    logits : float array (..., V)
    mu : float array (...)
        Largest surprise allowed, in bits. The most likely token and its equals always stay.

    References
    ----------
    Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity",
    arXiv:2007.14966.
    """
    return mask_out(logits, keep_mirostat(logits, mu))


def keep_mirostat(logits: Array, mu: Array) -> Array:
    """Return the mask (..., V) of :func:`apply_mirostat`."""
    xp = array_namespace(logits)
    floor = logsumexp(logits, keepdims=True) - mu[..., None] * math.log(2.0)
    return logits >= xp.minimum(floor, xp.max(logits, axis=-1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class Mirostat(Stage):
    """Remove tokens more surprising than ``mu`` bits and steer ``mu`` so that surprise meets tau.

    After each token ``mu`` falls by ``eta`` times (observed surprise - tau). It must be the last
    stage of a chain; it starts at ``2 * tau`` and is kept per row.

    Parameters
    ----------
    tau : float in (0, 100]
        Target surprise in bits per token.
    eta : float in (0, 1]
        Learning rate.

    Notes
    -----
    As in llama.cpp, the observed surprise is measured after truncation, under the renormalised
    distribution the token was drawn from; the paper's released code measures it before.
    """

    name: ClassVar[str] = "mirostat"
    truncates: ClassVar[bool] = True
    has_state: ClassVar[bool] = True
    tau: float = 5.0
    eta: float = 0.1

    def __post_init__(self) -> None:
        check_number(self.name, "tau", self.tau, 0, 100, low_open=True)
        check_number(self.name, "eta", self.eta, 0, 1, low_open=True)

    def keep(self, logits: Array, context: Context) -> Array:
        mu = asarray_like(np.asarray(context.state, np.float32), logits, dtype=logits.dtype)
        return keep_mirostat(logits, mu)

    def init(self, rows: int) -> Any:
        return np.full(rows, 2.0 * self.tau)

    def observe(self, state: Any, logprobs: npt.NDArray[np.float64]) -> Any:
        return state - self.eta * (-logprobs / math.log(2.0) - self.tau)

    def fork(self, state: Any, rows: IntArray) -> Any:
        return state[np.asarray(rows)]
