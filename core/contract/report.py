"""What a check measures, how much of it is allowed, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..model import Capability, ModelInfo
from ..ops import kl_divergence

Result = Literal["passed", "failed", "skipped"]
Measure = Literal["logits", "relative", "absolute", "none"]
Floats = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Attributes
    ----------
    name : str
        Stable, usable with ``only=``.
    title : str
        What holds when it passes.
    capability : Capability
        What the model must offer for the check to run.
    result : {"passed", "failed", "skipped"}
    measure : str
        What ``value`` and ``bound`` are; empty where the check only asks yes or no.
    value, bound : float or None
        The check fails when ``value > bound``.
    detail : str
        Where the worst value was found, what was violated, or why the check was skipped.
    seconds : float
    """

    name: str
    title: str
    capability: Capability
    result: Result
    measure: str = ""
    value: float | None = None
    bound: float | None = None
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How far two answers that should be equal may differ.

    Attributes
    ----------
    logit : float or None
        Largest absolute difference of a logit; None where only divergences are bounded.
    kl_mean, kl_max : float
        Divergence in nats over the compared positions, used where ``logit`` is None. The largest
        is bounded too, so that one wrong row does not drown in the mean of many.
    relative : float
        Norm of the difference of two hidden states over the norm of the state, mean over
        positions (single states near zero differ by far more).
    absolute : float
        Difference of two attention weights, or of a sum of them from 1.
    """

    logit: float | None
    kl_mean: float = 0.0
    kl_max: float = 0.0
    relative: float
    absolute: float


# Bit for bit: what an adapter promises that reports ``batch_invariant``.
EXACT = Bound(logit=0.0, relative=0.0, absolute=0.0)

# Numbers that differ only by rounding, because the same sums were taken in another order.
ROUNDING = {
    # float64 inside, float32 logits of a few tens: one unit in the last place is 2e-6.
    "float64": Bound(logit=1e-5, relative=1e-6, absolute=1e-6),
    # torch and mlx measured 3e-5 to 1e-4 between kernels for 1 and for many positions.
    "float32": Bound(logit=1e-3, relative=1e-3, absolute=1e-3),
}
# bfloat16, float16 and quantised weights. A logit may move by 0.6 (bfloat16, one-token kernels), by
# 0.75 (llama.cpp, shared cells in another order) or 1.3 (K-quants, few rows) while the distribution
# hardly does: measured mean divergences are 0.001 to 0.003 nats over many positions, up to 0.009
# over two, single positions up to 0.13. Wrong positions or masks move it by tenths of a nat. One
# stale position among many may hide below this bound; float32 on the same engine, or a
# batch-invariant setting, shows it.
COARSE = Bound(logit=None, kl_mean=0.02, kl_max=0.25, relative=0.05, absolute=0.05)


def bound_for(info: ModelInfo, *, invariance: bool) -> Bound:
    """Return the bound that a model's answers must meet.

    Parameters
    ----------
    info : ModelInfo
    invariance : bool
        True where the same tokens are computed causally and only cut or batched otherwise: there
        a ``batch_invariant`` model must be exact. Draft trees, soft tokens and separate heads are
        computed in another way, and have the bound of the model's number type.
    """
    if invariance and info.batch_invariant:
        return EXACT
    return ROUNDING.get(info.dtype, COARSE)


class Meter:
    """Collects the comparisons of one check."""

    def __init__(self, bound: Bound, measure: Measure) -> None:
        self.bound = bound
        self.measure = measure
        self.violations: list[str] = []
        self._worst = -1.0
        self._where = ""
        self._kl_sum = 0.0
        self._kl_max = 0.0
        self._count = 0

    def holds(self, condition: bool, what: str) -> None:
        """Record a violation unless ``condition`` holds."""
        if not condition:
            self.violations.append(what)

    def logits(self, got: Floats, want: Floats, where: str) -> None:
        """Compare logits (..., V) that should be equal."""
        if not self._same_shape(got, want, where) or not got.size:
            return
        if not (np.isfinite(got).all() and np.isfinite(want).all()):
            self.holds(False, f"{where}: logits are not finite")
            return
        size = got.shape[-1]
        for a, b in zip(got.reshape(-1, size), want.reshape(-1, size)):
            gap = float(np.abs(a - b).max())
            self._note(gap, where)
            self._count += 1
            if gap > (self.bound.logit or 0.0):  # else it is not asked for, and costs time
                divergence = float(kl_divergence(b.astype(np.float64), a.astype(np.float64)))
                self._kl_sum += max(divergence, 0.0)
                self._kl_max = max(self._kl_max, divergence)

    def relative(self, got: Floats, want: Floats, where: str) -> None:
        """Compare vectors (..., D) by the mean relative norm of their difference."""
        if not self._same_shape(got, want, where):
            return
        gap = np.linalg.norm((got - want).astype(np.float64), axis=-1)
        size = np.linalg.norm(want.astype(np.float64), axis=-1)
        self._note(float((gap / np.maximum(size, 1e-12)).mean()), where)

    def absolute(self, got: Floats, want: Floats | float, where: str) -> None:
        """Compare numbers by their absolute difference."""
        if isinstance(want, np.ndarray) and not self._same_shape(got, want, where):
            return
        self._note(float(np.abs(np.asarray(got, np.float64) - want).max()), where)

    def _same_shape(self, got: Floats, want: Floats, where: str) -> bool:
        same = got.shape == want.shape
        self.holds(same, f"{where}: shape {got.shape}, expected {want.shape}")
        return same

    def _note(self, value: float, where: str) -> None:
        if not value <= self._worst:  # NaN is worst
            self._worst, self._where = value, where

    def verdict(self) -> dict[str, Any]:
        """Return the fields of :class:`Check` that the comparisons decide."""
        fields: dict[str, Any] = {"result": "failed" if self.violations else "passed"}
        notes = self.violations[:3]
        if len(self.violations) > 3:
            notes.append(f"and {len(self.violations) - 3} more")
        if self.measure == "none" or self._worst < 0:
            return fields | {"detail": "; ".join(notes)}
        if self.measure == "logits" and self.bound.logit is None:
            value, bound = self._kl_sum / max(self._count, 1), self.bound.kl_mean
            name = "mean KL (nats)"
            if not self._kl_max <= self.bound.kl_max:
                fields["result"] = "failed"
                notes.append(f"largest KL {self._kl_max:.3g} exceeds {self.bound.kl_max:g}")
            notes.append(f"max |Δlogit| {self._worst:.3g} at {self._where}")
            notes.append(f"max KL {self._kl_max:.3g}")
        elif self.measure == "logits":
            assert self.bound.logit is not None
            value, bound, name = self._worst, self.bound.logit, "max |Δlogit|"
            if self._worst > 0:
                notes.append(f"worst at {self._where}")
            if self._worst > bound:
                notes.append(f"mean KL {self._kl_sum / max(self._count, 1):.3g} nats")
        else:
            value, bound = self._worst, getattr(self.bound, self.measure)
            name = "relative error" if self.measure == "relative" else "max |Δ|"
            if self._worst > 0:
                notes.append(f"worst at {self._where}")
        if not value <= bound:
            fields["result"] = "failed"
        return fields | {
            "measure": name,
            "value": value,
            "bound": bound,
            "detail": "; ".join(notes),
        }
