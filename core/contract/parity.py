"""How far two models, or two engines with the same weights, agree on a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..array import to_numpy
from ..errors import InvalidInput
from ..model import Capability, Forward, Model, Output
from ..ops import kl_divergence, target_logprobs
from .report import Check, Floats

# What engines with the same weights must reach; quantised activations and other kernels move
# logits by tenths while distributions hardly change (measured: KL 0.003, top-1 97.9 %).
KL_MEAN = 0.01
TOP1 = 0.96
COSINE = 0.98
LOGIT = 1e-3  # both in float32


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Agreement of a model with a reference over ``positions`` of one text.

    Attributes
    ----------
    max_abs : float
        Largest absolute difference of a logit.
    kl_mean, kl_max : float
        ``KL(reference || model)`` per position, in nats.
    top1 : float
        Share of positions whose most probable token is the same.
    nll, reference_nll : float
        Mean negative log-probability of the text's next tokens, in nats.
    cosine : tuple of float
        Mean cosine of the hidden states, layers 0..L; empty where one of the two has none.
    """

    positions: int
    max_abs: float
    kl_mean: float
    kl_max: float
    top1: float
    nll: float
    reference_nll: float
    cosine: tuple[float, ...]


def compare_models(
    model: Model,
    reference: Model,
    tokens: Sequence[int],
    *,
    chunk: int = 64,
    hidden: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Feed the same tokens to both models and compare logits and hidden states.

    Both read ``chunk`` tokens at a time, so that memory stays at ``chunk * V`` and
    ``chunk * (L + 1) * D`` numbers.

    Parameters
    ----------
    model, reference : Model
        With equal vocabulary size; hidden states are compared if both offer them and have the
        same number of layers and width.
    tokens : sequence of int
        At least 2.
    chunk : int
        Positions per call.
    hidden : bool
        False leaves the hidden states out.
    progress : callable, optional
        Called with the positions done and their total.

    Raises
    ------
    InvalidInput
        The vocabularies differ in size.
    """
    a, b = model.info, reference.info
    if a.vocab_size != b.vocab_size:
        raise InvalidInput(
            f"{a.name} on {a.backend} has {a.vocab_size} token ids, {b.name} on {b.backend} "
            f"{b.vocab_size}: compare engines on the same model"
        )
    ids = np.asarray(tokens, np.int64)
    needs = Capability.ALL_LOGITS
    deep = hidden and (a.layers, a.width) == (b.layers, b.width)
    deep = deep and bool(model.capabilities & reference.capabilities & Capability.HIDDEN)
    layers = tuple(range(a.layers + 1)) if deep else ()
    if deep:
        needs |= Capability.HIDDEN
    kl: list[Floats] = []
    same: list[Floats] = []
    nll: list[tuple[float, float]] = []
    cosine: list[Floats] = []
    max_abs = 0.0
    with (
        model.session(needs=needs, context=len(ids)) as one,
        reference.session(needs=needs, context=len(ids)) as two,
    ):
        for start in range(0, len(ids), chunk):
            part = ids[None, start : start + chunk]
            ask = Forward(keep=start, tokens=part, logits="all", hidden=layers)
            out, ref = one.forward(ask), two.forward(ask)
            got, want = (np.asarray(to_numpy(x.logits))[0] for x in (out, ref))
            max_abs = max(max_abs, float(np.abs(got - want).max()))
            kl.append(np.asarray(kl_divergence(want, got)))
            same.append(got.argmax(-1) == want.argmax(-1))
            following = ids[start + 1 : start + 1 + part.shape[1]]
            m = len(following)
            nll.extend(
                (float(x), float(y))
                for x, y in zip(
                    target_logprobs(got[:m], following), target_logprobs(want[:m], following)
                )
            )
            if layers:
                cosine.append(_cosines(out, ref, layers))
            if progress:
                progress(min(start + chunk, len(ids)), len(ids))
    divergence = np.concatenate(kl)
    mine, theirs = (-np.mean([pair[i] for pair in nll]) for i in (0, 1))
    return Parity(
        positions=len(ids),
        max_abs=max_abs,
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=float(np.concatenate(same).mean()),
        nll=float(mine),
        reference_nll=float(theirs),
        cosine=tuple(np.concatenate(cosine, axis=1).mean(1).tolist()) if layers else (),
    )


def _cosines(out: Output, ref: Output, layers: tuple[int, ...]) -> Floats:
    rows = []
    for layer in layers:
        x, y = (np.asarray(to_numpy(o.hidden[layer]), np.float64)[0] for o in (out, ref))
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        rows.append((x * y).sum(-1) / np.maximum(norms, 1e-30))
    return np.stack(rows)


def parity_checks(
    model: Model,
    reference: Model,
    tokens: Sequence[int],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Check]:
    """Run :func:`compare_models` and return its figures as checks with their bounds."""
    begin = time.perf_counter()
    found = compare_models(model, reference, tokens, progress=progress)
    seconds = time.perf_counter() - begin
    against = f"{reference.info.backend} ({reference.info.dtype})"
    detail = (
        f"{found.positions} positions; NLL {found.nll:.4f}, {found.reference_nll:.4f} on "
        f"{reference.info.backend}; max KL {found.kl_max:.3g}; max |Δlogit| {found.max_abs:.3g}"
    )
    figures = [("mean KL (nats)", "parity-kl", found.kl_mean, KL_MEAN, detail)]
    # A short text may fall below by chance: allow two standard errors.
    chance = 2 * math.sqrt(TOP1 * (1 - TOP1) / found.positions)
    figures.append(("1 - top-1 agreement", "parity-top1", 1 - found.top1, 1 - TOP1 + chance, ""))
    if model.info.dtype == reference.info.dtype == "float32":
        figures.append(("max |Δlogit|", "parity-logits", found.max_abs, LOGIT, ""))
    if found.cosine:
        worst = int(np.argmin(found.cosine))
        figures.append(
            (
                "1 - cosine",
                "parity-hidden",
                1 - found.cosine[worst],
                1 - COSINE,
                f"worst at layer {worst}",
            )
        )
    titles = {
        "parity-kl": "distributions agree with",
        "parity-top1": "the best token is the same as on",
        "parity-logits": "logits equal those of",
        "parity-hidden": "hidden states of every layer agree with",
    }
    return [
        Check(
            name=name,
            title=f"{titles[name]} {against}",
            capability=Capability.HIDDEN if name == "parity-hidden" else Capability.ALL_LOGITS,
            result="passed" if value <= bound else "failed",
            measure=measure,
            value=value,
            bound=bound,
            detail=text,
            seconds=seconds if name == "parity-kl" else 0.0,
        )
        for measure, name, value, bound, text in figures
    ]
