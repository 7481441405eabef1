"""Log-probabilities of bytes, outside the decode loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ...errors import UsageError
from ...model import Capability, IntArray, Model, Session
from ..loop import prompt_chunks
from ..sessions import reuse_prefix
from .begin import begin_covers
from .covers import Covers
from .law import mixture
from .parts import Law, Settings
from .vocabulary import FloatArray

_SURE = 30  # times more probable than what is left out, and a byte's own figure is close enough
NEEDS = Capability.LAST_LOGITS | Capability.ROLLBACK
FORKS = Capability.ROWS | Capability.FORK


def needs_of(settings: Settings) -> Capability:
    """Return what a model must offer for these settings."""
    return NEEDS | FORKS if settings.rows > 1 else NEEDS


def evaluated(covers: Covers, session: Session, *, law: bool = True, whole: bool = False) -> Covers:
    """Return the covers after all calls that :meth:`.covers.Covers.missing` names."""
    while sequences := covers.missing(law=law, whole=whole):
        size = len(covers.history) + max(map(len, sequences))
        if size > session.context:
            raise UsageError(f"byte_level: {size} tokens do not fit into {session.context}")
        first = not covers.cached
        covers, ask = covers.ask(sequences)
        if first:
            ask, _ = reuse_prefix(session, ask)
        for chunk in prompt_chunks(session, ask):
            answer = session.forward(chunk)
        covers = covers.answered(sequences, answer.logits)
    return covers


def symbols_of(covers: Covers, *, ends_only: bool) -> tuple[FloatArray, Law, Covers]:
    """Return the law over 256 bytes and control tokens, the law in parts, and the covers.

    With ``ends_only`` all end tokens are one symbol and other control tokens none, so that models
    with different vocabularies share their symbols.
    """
    law, covers = covers.law()
    specials = law.specials
    if ends_only:
        ends = np.isin(covers.text.vocabulary.specials, sorted(covers.text.tokenizer.eos_ids))
        specials = np.array([specials[ends].sum()])
    return np.concatenate([law.bytes, specials]), law, covers


def _about(
    covers: Covers, session: Session, byte: int, ends_only: bool
) -> tuple[FloatArray, Law, Covers]:
    """Return the law of the next byte, with nothing left out where ``byte`` is improbable.

    A law is off by ``left_out`` at most in all, which says little about a single byte of less
    probability: all that can be followed by it may have been left out.
    """
    covers = evaluated(covers, session)
    symbols, law, covers = symbols_of(covers, ends_only=ends_only)
    if symbols[byte] < _SURE * law.left_out:
        covers = evaluated(covers, session, whole=True)
        symbols, law, covers = symbols_of(covers, ends_only=ends_only)
    if symbols.sum() == 0:
        covers = evaluated(covers.fallback(), session)
        symbols, law, covers = symbols_of(covers, ends_only=ends_only)
    return symbols, law, covers


def byte_logprobs(
    models: Model | Sequence[Model],
    prompt: Sequence[int] | Sequence[Sequence[int]] | IntArray,
    data: bytes,
    *,
    settings: Settings | None = None,
    weights: Sequence[float] | None = None,
    counts: dict[str, float] | None = None,
) -> FloatArray:
    """Return the natural-log probability of each byte of ``data`` after a prompt.

    Parameters
    ----------
    models : Model or sequence of Model
        Several are mixed byte by byte.
    prompt : sequence of int, or one per model
        Token ids, with BOS where the model wants one.
    data : bytes
    settings : Settings, optional
        How covers are searched; exact by default.
    weights : sequence of float, optional
        Of the models; equal by default.
    counts : dict, optional
        Receives "calls", "rows" and "tokens" after the prompt, "fallbacks", and the largest shares
        of probability in any law: "left_out" and "unchecked" (see :class:`.parts.Law`).

    Returns
    -------
    float64 (len(data),)
        -inf for a byte that is impossible after those before it.
    """
    settings = settings or Settings()
    several = [models] if isinstance(models, Model) else list(models)
    prompts = [prompt] if isinstance(models, Model) else list(prompt)
    shares = [1 / len(several)] * len(several) if weights is None else list(weights)
    needs = needs_of(settings)
    sessions = [model.session(max_rows=settings.rows, needs=needs) for model in several]
    found = np.zeros(len(data))
    left_out = unchecked = 0.0
    try:
        covers = [
            begin_covers(model.tokenizer, ids, settings)  # type: ignore[arg-type]
            for model, ids in zip(several, prompts, strict=True)
        ]
        for at, byte in enumerate(data):
            laws = []
            for i, session in enumerate(sessions):
                symbols, law, covers[i] = _about(covers[i], session, byte, len(several) > 1)
                left_out = max(left_out, law.left_out)
                unchecked = max(unchecked, law.unchecked)
                laws.append(symbols)
            chance = float(mixture(laws, shares)[byte])
            found[at] = math.log(chance) if chance > 0 else -math.inf
            covers = [c.append(byte) for c in covers]
    finally:
        for session in sessions:
            session.close()
    if counts is not None:
        totals: list[Mapping[str, int]] = [c.counts for c in covers]
        for key in ("calls", "rows", "tokens"):
            counts[key] = float(sum(t[key] for t in totals))
        counts["left_out"], counts["unchecked"] = left_out, unchecked
        counts["fallbacks"] = float(sum(c.fallbacks for c in covers))
    return found
