"""Drawing another token where a banned phrase began."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...array import Array, array_namespace, asarray_like, to_numpy
from ...errors import BackendError
from ...logits import Chain, LogitBias, Mirostat
from ...logits.candidates import DRAW_STAGES, DRAW_TOKEN, Uniforms
from ...logits.logit_bias import apply_logit_bias
from ...model import IntArray
from ...ops import log_softmax, logsumexp, softmax, top_k
from ...ops.categorical import draw_1d
from ...ops.scatter import put_at
from ..types import Token

MIN_MASS = 1e-6  # probability below which what remains counts as nothing
INVERTED = 20  # candidates that inversion chooses among


def penalised(logits: Array, factors: Mapping[int, float]) -> Array:
    """Multiply the probabilities of some tokens; softmax of the result renormalises.

    Parameters
    ----------
    logits : float array (B, V)
    factors : mapping of token id to float in [0, 1]
        0 removes the token.
    """
    return apply_logit_bias(logits, _bias(factors))


def _bias(factors: Mapping[int, float]) -> dict[int, float]:
    return {token: math.log(f) if f > 0 else -math.inf for token, f in factors.items()}


def inverted(logits: Array, width: int = INVERTED) -> Array:
    """Turn the order of the likeliest tokens around: the least likely becomes the likeliest.

    Parameters
    ----------
    logits : float array (1, V)
    width : int
        The likeliest tokens that take part; the others are removed.

    Returns
    -------
    float array (1, V)
        ``log((p_max - p) + p_min)`` for those that have a probability, -inf elsewhere.
    """
    xp = array_namespace(logits)
    values, ids = top_k(logits, min(width, int(logits.shape[-1])))
    probs = softmax(values)
    some = probs > 0
    lowest = xp.min(xp.where(some, probs, xp.ones_like(probs)), axis=-1, keepdims=True)
    turned = xp.max(probs, axis=-1, keepdims=True) - probs + lowest
    # What has no probability gets none; log(1) stands in so that no library warns.
    scores = xp.where(some, xp.log(xp.where(some, turned, xp.ones_like(turned))), -xp.inf)
    columns = to_numpy(ids).astype(np.int64)[0]
    none = xp.zeros_like(logits) + asarray_like(-np.inf, logits, dtype=logits.dtype)
    return put_at(none, np.zeros_like(columns), columns, scores[0, ...])


@dataclass(frozen=True, kw_only=True)
class Redraw:
    """What came of drawing again.

    Attributes
    ----------
    token : Token or None
        The new token; None when the old one stays.
    exhausted : bool
        Nothing else was possible.
    """

    token: Token | None = None
    exhausted: bool = False


def redraw(
    logits: Array,
    *,
    hit: int,
    factors: Mapping[int, float],
    keep_likeliest: bool,
    force: bool,
    invert: bool,
    chain: Chain,
    history: IntArray,
    uniforms: Uniforms,
    logprobs: int | None,
    trace: int | None = None,
) -> Redraw:
    """Draw a token from the chain's distribution with some tokens' probabilities multiplied.

    Parameters
    ----------
    logits : float array (1, V)
        Of the model.
    hit : int
        The token that stands there.
    factors : mapping of token id to float in [0, 1)
        Holds ``hit``.
    keep_likeliest : bool
        Leave ``hit`` where it is if it is still the likeliest token.
    force : bool
        Where the chain leaves next to nothing but tokens of ``factors``, apply these before the
        chain, so that the truncations and the temperature work on what remains.
    invert : bool
        Draw from the :func:`inverted` distribution of the tokens that are not in ``factors``.
    history : int64 (T,)
        Prompt and text before the token.
    logprobs, trace : int, optional
        As in ``Request``.
    """
    # The text went back, which is rare: one copy to the host, and everything else happens there.
    raw = np.asarray(to_numpy(logits), np.float32)
    gone = dict.fromkeys(factors, 0.0)

    def filtered(scores: Array) -> Array:
        return chain.apply(scores, history=[history], uniforms=uniforms)

    before = filtered(raw)
    after, others = penalised(before, factors), penalised(before, gone)
    first = force and _mass(others, before) < MIN_MASS
    if first:
        before = raw
        after, others = penalised(raw, factors), penalised(raw, gone)
        if _mass(after, before) < MIN_MASS:
            return Redraw(exhausted=True)
        try:
            after = filtered(after)
            others = filtered(others) if invert else others
        except BackendError:  # the chain itself allows nothing else
            return Redraw(exhausted=True)
    elif _mass(after, before) < MIN_MASS:
        return Redraw(exhausted=True)
    if keep_likeliest and int(after.argmax()) == hit and factors[hit] > 0:
        return Redraw()
    if invert:
        after = inverted(others)
    if not math.isfinite(after.max()):
        return Redraw(exhausted=True)
    token, logprob = draw_1d(after[0], uniforms(0, DRAW_TOKEN))
    if token == hit:
        return Redraw()
    told = None
    if trace is not None:
        told = _explained(raw, factors, first, chain, history, uniforms, token, trace)
    if logprobs is None:
        return Redraw(token=Token(id=token, trace=told))
    known = log_softmax(raw)[0]
    most, where = top_k(known, logprobs) if logprobs else ((), ())
    return Redraw(
        token=Token(
            id=token,
            raw_logprob=float(known[token]),
            logprob=logprob,
            top=tuple((int(i), float(v)) for i, v in zip(where, most)),
            trace=told,
        )
    )


@dataclass(frozen=True, kw_only=True)
class _Ban(LogitBias):
    """The factors as a stage, so that a trace lists them among the others."""

    name: ClassVar[str] = "antislop"


def _explained(
    raw: Array,
    factors: Mapping[int, float],
    first: bool,
    chain: Chain,
    history: IntArray,
    uniforms: Uniforms,
    token: int,
    n: int,
) -> Mapping[str, Any]:
    """Return what the chain and the factors did; inversion is not told."""
    ban = _Ban(bias={i: bias for i, bias in _bias(factors).items()})
    stages = chain.stages
    end = 0 if first else len(stages) - any(isinstance(stage, Mirostat) for stage in stages)
    explained = replace(chain, stages=(*stages[:end], ban, *stages[end:]))

    def shifted(row: int, key: int) -> float:  # stages behind the new one keep their numbers
        return uniforms(row, key - (key > DRAW_STAGES + end))

    return explained.explain(raw, history=[history], uniforms=shifted, n=n, tokens=[token])[0]


def _mass(part: Array, whole: Array) -> float:
    """Return the probability under ``whole`` (1, V) that ``part`` has kept."""
    return float(np.exp(logsumexp(part)[0] - logsumexp(whole)[0]))
