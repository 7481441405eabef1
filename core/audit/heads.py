"""Do sampled tokens belong to their block, and blocks to the answer? Small trained matchers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace
from ..errors import InvalidInput, UsageError
from ..tensor_file import read_tensors, save_tensors
from .protocol import Sampled

Weights = Mapping[str, Array]
KIND, MADE_BY = "coin 1", "steersman train coin"
HEADS = ("tokens", "answer")  # tokens to block, block to answer
TINY = 1e-12


def cosine(a: Array, b: Array) -> Array:
    """Return the cosine of vectors (..., d); 0 where one is zero."""
    xp = array_namespace(a, b)
    dot = xp.sum(a * b, axis=-1)
    square = xp.sum(a * a, axis=-1) * xp.sum(b * b, axis=-1)
    return dot / xp.sqrt(square + TINY)


def untrained_match(a: Array, b: Array) -> Array:
    """Return ``(cos + 1) / 2``: a match probability that needs no training."""
    return (cosine(a, b) + 1) / 2


def match_logit(weights: Weights, a: Array, b: Array) -> Array:
    """Return the log-odds that two vectors match: ``gain * cos(P(a - o), P(b - o)) + bias``.

    Parameters
    ----------
    weights : mapping
        ``projection`` (d, r), ``centre`` (d,), ``gain`` and ``bias`` (1,).
    a, b : float array (..., d)

    Returns
    -------
    float array (...)
    """
    left = (a - weights["centre"]) @ weights["projection"]
    right = (b - weights["centre"]) @ weights["projection"]
    return weights["gain"][0] * cosine(left, right) + weights["bias"][0]


def init_head(
    vectors: npt.NDArray[Any], *, centred: bool = False
) -> dict[str, npt.NDArray[np.float32]]:
    """Return an untrained head: identity.

    Parameters
    ----------
    vectors : float array (n, d)
    centred : bool
        Take their mean off first. This sharpens what distinguishes one text from another, and hides
        what distinguishes texts from random tokens.
    """
    width = vectors.shape[1]
    mean = np.asarray(vectors, np.float64).mean(axis=0) if centred else np.zeros(width)
    return {
        "projection": np.eye(width, dtype=np.float32),
        "centre": mean.astype(np.float32),
        "gain": np.array([5], np.float32),
        "bias": np.array([-1], np.float32),
    }


def set_logit(weights: Weights, pairs: Array) -> Array:
    """Return the log-odds that an unordered set of score pairs is an honest trace's.

    Parameters
    ----------
    weights : mapping
        ``phi1`` (2, H), ``phi2`` (H, H), ``rho1`` (H, H), ``rho2`` (H, 1), and the offsets
        ``phi1_b`` to ``rho2_b``.
    pairs : float array (..., n, 2)
        Scores of tokens to block and of block to answer, for each sampled block.

    Returns
    -------
    float array (...)

    References
    ----------
    Zaheer et al., "Deep Sets", arXiv:1703.06114.
    """
    xp = array_namespace(pairs)

    def layer(x: Array, name: str, *, last: bool = False) -> Array:
        y = x @ weights[name] + weights[f"{name}_b"]
        return y if last else xp.where(y > 0, y, 0 * y)

    inner = layer(layer(pairs, "phi1"), "phi2")
    pooled = xp.mean(inner, axis=-2)
    return layer(layer(pooled, "rho1"), "rho2", last=True)[..., 0]


def init_set(*, width: int = 32, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Return random weights of :func:`set_logit`."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    shapes = {
        "phi1": (2, width),
        "phi2": (width, width),
        "rho1": (width, width),
        "rho2": (width, 1),
    }
    made: dict[str, npt.NDArray[np.float32]] = {}
    for name, (rows, columns) in shapes.items():
        scale = np.sqrt(2 / rows)
        made[name] = (rng.normal(size=(rows, columns)) * scale).astype(np.float32)
        made[f"{name}_b"] = np.zeros(columns, np.float32)
    return made


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the auditor finds.

    Attributes
    ----------
    outcome : {"accept", "reject", "undecided"}
        "undecided": ask for more blocks, in another round.
    tokens, answer : float
        Mean match of sampled tokens with their blocks (weighted by the tokens seen), and of blocks
        with the answer.
    honest : float or None
        Probability by the trained set network.
    """

    outcome: Literal["accept", "reject", "undecided"]
    tokens: float
    answer: float
    honest: float | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Trained matchers, thresholds, and the embedding they were trained on.

    Attributes
    ----------
    tokens, answer : mapping of name to float32 array, or None
        Weights of :func:`match_logit`; None: :func:`untrained_match`.
    verdict : mapping or None
        Weights of :func:`set_logit`.
    thresholds : mapping
        ``tokens``, ``answer`` and ``honest``: below, a trace is rejected. ``tokens_clear`` and so
        on: from here a trace is accepted; between the two it is undecided. ``plain_tokens`` and
        ``plain_answer``: the same for means of :func:`untrained_match`, which know random tokens
        better than heads that were trained on text.
    embedder, facts : mapping
    """

    tokens: Weights | None = field(default=None, repr=False)
    answer: Weights | None = field(default=None, repr=False)
    verdict: Weights | None = field(default=None, repr=False)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    embedder: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def pairs(
        self, found: Sequence[Sampled], answer: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the scores of sampled blocks and the weight of each.

        Parameters
        ----------
        found : sequence of Sampled
            At least one.
        answer : float32 (d,)

        Returns
        -------
        pairs : float64 (n, 2)
            Tokens to block, block to answer.
        seen : float64 (n,)
            Tokens seen of each block.
        """
        blocks = np.stack([s.vector for s in found])
        means = np.stack([s.tokens.mean(axis=0) for s in found])
        whole = np.broadcast_to(answer, blocks.shape)
        a = _probability(self.tokens, means, blocks)
        b = _probability(self.answer, blocks, whole)
        return np.stack([a, b], axis=-1), np.array([len(s.tokens) for s in found], np.float64)

    def judge(self, found: Sequence[Sampled], answer: npt.NDArray[Any]) -> Verdict:
        """Say whether sampled blocks look like reasoning that led to the answer.

        With the set network its probability decides, else the two means; means of the untrained
        match are looked at as well where they have thresholds.
        """
        if not found:
            return Verdict(outcome="accept", tokens=1.0, answer=1.0)
        pairs, seen = self.pairs(found, answer)
        means = {
            "tokens": float((pairs[:, 0] * seen).sum() / seen.sum()),
            "answer": float(pairs[:, 1].mean()),
        }
        honest = None
        looked: dict[str, float] = dict(means)
        if self.verdict is not None:
            logit = float(set_logit(self.verdict, pairs.astype(np.float32)))
            honest = float(1 / (1 + np.exp(-logit)))
            looked = {"honest": honest}
        plain = replace(self, tokens=None, answer=None).pairs(found, answer)[0]
        for name, value in (
            ("plain_tokens", float((plain[:, 0] * seen).sum() / seen.sum())),
            ("plain_answer", float(plain[:, 1].mean())),
        ):
            if name in self.thresholds:
                looked[name] = value
        outcome: Literal["accept", "reject", "undecided"] = "accept"
        for name, value in looked.items():
            limit = self.thresholds.get(name, 0.5)
            if value < limit:
                outcome = "reject"
            elif value < self.thresholds.get(f"{name}_clear", limit) and outcome == "accept":
                outcome = "undecided"
        return Verdict(
            outcome=outcome,
            honest=honest,
            **means,
        )

    def check(self, embedder: Mapping[str, Any], *, where: str) -> None:
        """Raise UsageError unless the heads were trained on this embedding."""
        for name, made in self.embedder.items():
            if embedder.get(name) != made:
                raise UsageError(
                    f"{where}: trained on an embedding with {name} {made!r}, this one has "
                    f"{embedder.get(name)!r}; train heads for it: {MADE_BY}"
                )

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        arrays = {
            f"{part}.{name}": np.asarray(value, np.float32)
            for part in (*HEADS, "verdict")
            for name, value in (getattr(self, part) or {}).items()
        }
        facts = {"thresholds": dict(self.thresholds), "embedder": dict(self.embedder),
                 "facts": dict(self.facts)}  # fmt: skip
        save_tensors(path, arrays, facts, kind=KIND)


def _probability(
    weights: Weights | None, a: npt.NDArray[Any], b: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    if weights is None:
        return np.asarray(untrained_match(a, b), np.float64)
    logit = np.asarray(match_logit(weights, a, b), np.float64)
    found: npt.NDArray[np.float64] = 1 / (1 + np.exp(-logit))
    return found


def read_heads(path: Path) -> Heads:
    """Read what :meth:`Heads.save` wrote.

    Raises
    ------
    MissingFile, InvalidInput, MissingDependency
    """
    arrays, facts = read_tensors(path, kind=KIND, made_by=MADE_BY)
    parts: dict[str, dict[str, Any]] = {part: {} for part in (*HEADS, "verdict")}
    try:
        for name, value in arrays.items():
            part, _, key = name.partition(".")
            parts[part][key] = value
        width = int(facts["embedder"]["width"])
        for part in HEADS:
            head = parts[part]
            if head and (head["projection"].shape[0], head["centre"].shape) != (width, (width,)):
                raise ValueError(f"{part}: its arrays do not fit its stated width")
        return Heads(
            **{part: held or None for part, held in parts.items()},
            thresholds={k: float(v) for k, v in facts["thresholds"].items()},
            embedder=dict(facts["embedder"]),
            facts=dict(facts["facts"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"{path}: damaged: {error}") from None
