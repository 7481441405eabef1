"""Means of right and wrong traces, and how near a new one is to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace
from ..errors import InvalidInput, UsageError
from ..tensor_file import read_tensors, save_tensors
from .span import TraceRule

Floats = npt.NDArray[np.float32]
KIND, MADE_BY = "clue 1", "steersman verify fit"


def layer_distance(delta: Array, centroid: Array, scale: Array | None = None) -> Array:
    """Return the mean over layers of the Euclidean distances within each layer.

    Parameters
    ----------
    delta, centroid : float array (..., L, D)
        Broadcast against each other.
    scale : float array (L,), optional
        Each layer's distance is divided by its own; 1 if None.

    Returns
    -------
    float array (...)
        0 or more. This is not the Frobenius norm, which would let the largest layer decide.

    References
    ----------
    Liang et al., "CLUE: Non-parametric Verification from Experience via Hidden-State Clustering",
    arXiv:2510.01591.
    """
    xp = array_namespace(delta, centroid)
    apart = delta - centroid
    norms = xp.sqrt(xp.sum(apart * apart, axis=-1))
    return xp.mean(norms if scale is None else norms / scale, axis=-1)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How a trace compares with experience.

    Attributes
    ----------
    success, failure : float
        Distances to the two centroids.
    """

    success: float
    failure: float

    @property
    def correct(self) -> bool:
        """Nearer to success; a tie counts as wrong."""
        return self.success < self.failure

    @property
    def margin(self) -> float:
        """``failure - success``: the larger, the more it looks like success."""
        return self.failure - self.success


@dataclass(frozen=True, kw_only=True)
class Centroids:
    """What experience comes to.

    Attributes
    ----------
    success, failure : float32 (L, D)
        Mean deltas of right and of wrong traces.
    scale : float32 (L,)
        Root mean square distance of a trace from its own class's mean, per layer.
    counts : (int, int)
        Right and wrong traces.
    rule : TraceRule
    model : mapping
        Facts of the model whose states these are; see :meth:`TraceRule.model_facts`.
    """

    success: Floats = field(repr=False)
    failure: Floats = field(repr=False)
    scale: Floats = field(repr=False)
    counts: tuple[int, int]
    rule: TraceRule = field(default_factory=TraceRule)
    model: Mapping[str, Any] = field(default_factory=dict)

    def judge(self, delta: Floats, *, standardise: bool = False) -> Judgement:
        """Compare one trace.

        Parameters
        ----------
        delta : float32 (L, D)
        standardise : bool
            Divide each layer's distance by its scale, so that layers of large norm do not decide
            alone.
        """
        scale = np.maximum(self.scale, np.finfo(np.float32).tiny) if standardise else None
        return Judgement(
            success=float(layer_distance(delta, self.success, scale)),
            failure=float(layer_distance(delta, self.failure, scale)),
        )

    def separation(self) -> npt.NDArray[np.float64]:
        """Return the distance between the two means in each layer, (L,)."""
        apart = self.success.astype(np.float64) - self.failure
        found: npt.NDArray[np.float64] = np.sqrt((apart * apart).sum(axis=-1))
        return found

    def check(self, facts: Mapping[str, Any], *, where: str) -> None:
        """Raise UsageError unless these are centroids of the model with these facts.

        Parameters
        ----------
        facts : mapping
            Of :meth:`TraceRule.model_facts`.
        where : str
            The centroids' file.
        """
        for name, made in self.model.items():
            if name != "model" and facts.get(name) != made:
                raise UsageError(
                    f"{where}: made with {name} {made!r} ({self.model.get('model')}), "
                    f"{facts.get('model')} has {facts.get(name)!r}; open the same model or make "
                    f"centroids for this one: {MADE_BY}"
                )

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        arrays = {"success": self.success, "failure": self.failure, "scale": self.scale}
        facts = {
            "counts": list(self.counts), "rule": self.rule.as_dict(), "model": dict(self.model),
        }  # fmt: skip
        save_tensors(path, arrays, facts, kind=KIND)


def read_centroids(path: Path) -> Centroids:
    """Read what :meth:`Centroids.save` wrote.

    Raises
    ------
    MissingFile, InvalidInput, MissingDependency
    """
    arrays, facts = read_tensors(path, kind=KIND, made_by=MADE_BY)
    try:
        success, failure, scale = arrays["success"], arrays["failure"], arrays["scale"]
        right, wrong = (int(n) for n in facts["counts"])
        fits = success.ndim == 2 and failure.shape == success.shape
        if not fits or scale.shape != success.shape[:1]:
            raise ValueError("its arrays do not fit each other")
        return Centroids(
            success=success.astype(np.float32),
            failure=failure.astype(np.float32),
            scale=scale.astype(np.float32),
            counts=(right, wrong),
            rule=TraceRule.from_dict(facts["rule"], str(path)),
            model=dict(facts["model"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path}: damaged: {error}") from None


class Experience:
    """Running sums of labelled deltas in float64; no single one is kept.

    Attributes
    ----------
    sums : float64 (2, L, D), or None before the first delta
        Of wrong and of right traces.
    squares : float64 (2, L)
        Sums of squared norms.
    counts : int64 (2,)
    """

    def __init__(self) -> None:
        self.sums: npt.NDArray[np.float64] | None = None
        self.squares: npt.NDArray[np.float64] | None = None
        self.counts = np.zeros(2, np.int64)

    def add(self, delta: npt.NDArray[Any], *, correct: bool) -> None:
        """Take one trace (L, D) in."""
        wide = np.asarray(delta, np.float64)
        if self.sums is None or self.squares is None:
            self.sums = np.zeros((2, *wide.shape))
            self.squares = np.zeros((2, len(wide)))
        self.sums[int(correct)] += wide
        self.squares[int(correct)] += (wide * wide).sum(axis=-1)
        self.counts[int(correct)] += 1

    def centroids(
        self, *, rule: TraceRule | None = None, model: Mapping[str, Any] | None = None
    ) -> Centroids:
        """Return the means.

        Raises
        ------
        InvalidInput
            There is no right trace, or no wrong one.
        """
        wrong, right = (int(n) for n in self.counts)
        if not wrong or not right or self.sums is None or self.squares is None:
            raise InvalidInput(
                f"clue: needs right and wrong traces with a span, got {right} right and {wrong} "
                "wrong ones"
            )
        means = self.sums / self.counts[:, None, None]
        spread = self.squares - self.counts[:, None] * (means * means).sum(axis=-1)
        scale = np.sqrt(np.maximum(spread.sum(axis=0), 0) / self.counts.sum())
        return Centroids(
            success=means[1].astype(np.float32),
            failure=means[0].astype(np.float32),
            scale=scale.astype(np.float32),
            counts=(right, wrong),
            rule=rule or TraceRule(),
            model=dict(model or {}),
        )
