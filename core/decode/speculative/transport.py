"""Optimal transport with membership cost: the best that any choice among drafts can do.

A rule that turns ``k`` independent drafts from ``p`` into a token of law ``q`` is a joint law of
drafts and token. The one that most often chooses a drafted token solves a linear program over
``V**k * V`` variables, so only small vocabularies can be solved; K-SEQ (:mod:`.kseq`) comes within
a factor of ``1 - (1 - 1/k)**k`` of it. Used to check K-SEQ, not to decode.

References
----------
Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport", arXiv:2310.15141.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import MissingDependency, UsageError

Probs = npt.NDArray[np.float64]

MAX_SUBSETS = 20  # a vocabulary of this size has a million subsets
MAX_CELLS = 200_000  # variables of the linear program


def best_acceptance(p: Probs, q: Probs, k: int) -> float:
    """Return the largest probability with which a token of law ``q`` can be one of ``k`` drafts.

    By max-flow and min-cut it is the least ``q(H) + 1 - p(H)**k`` over all sets ``H`` of tokens.

    Parameters
    ----------
    p, q : float64 (V,)
        Probabilities; at most 20 tokens.
    k : int, at least 1
    """
    size = len(p)
    if size > MAX_SUBSETS:
        raise UsageError(
            f"transport: a vocabulary of {size} is too large; at most {MAX_SUBSETS} "
            "tokens can be searched by subsets"
        )
    inside_p, inside_q = np.zeros(1), np.zeros(1)
    for a, b in zip(p, q, strict=True):
        inside_p = np.concatenate([inside_p, inside_p + a])
        inside_q = np.concatenate([inside_q, inside_q + b])
    return float((inside_q + 1 - inside_p**k).min())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An optimal rule.

    Attributes
    ----------
    joint : float64 (V**k, V)
        Probability of each tuple of drafts, in the order of ``np.ndindex``, with each token.
    acceptance : float
        Probability that the token is one of the drafts.
    """

    joint: Probs
    acceptance: float


def optimal_plan(p: Probs, q: Probs, k: int) -> Plan:
    """Solve the linear program of the best rule for ``k`` drafts.

    Parameters
    ----------
    p, q : float64 (V,)
        Probabilities; ``V**(k + 1)`` may not exceed 200,000.
    k : int, at least 1

    Raises
    ------
    MissingDependency
        SciPy is not installed.
    UsageError
        The program is too large, or has no solution because ``p`` or ``q`` does not sum to 1.
    """
    try:
        from scipy import sparse
        from scipy.optimize import linprog
    except ImportError:
        raise MissingDependency(
            "transport: solving for the optimal plan needs SciPy; run: pip install scipy"
        ) from None
    size = len(p)
    tuples = size**k
    if tuples * size > MAX_CELLS:
        raise UsageError(
            f"transport: {size} tokens and {k} drafts make {tuples * size} variables, "
            f"more than {MAX_CELLS}"
        )
    drafts = np.array(list(np.ndindex(*(size,) * k)))  # (V**k, k)
    chance = np.prod(p[drafts], axis=1)
    member = (drafts[:, :, None] == np.arange(size)).any(axis=1)  # (V**k, V)
    rows = sparse.kron(sparse.eye(tuples), np.ones((1, size)))
    columns = sparse.kron(np.ones((1, tuples)), sparse.eye(size))
    found = linprog(
        -member.astype(np.float64).ravel(),
        A_eq=sparse.vstack([rows, columns]).tocsr(),
        b_eq=np.concatenate([chance, q]),
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if found.x is None:
        raise UsageError(f"transport: the linear program has no solution ({found.message})")
    joint = np.asarray(found.x, np.float64).reshape(tuples, size)
    return Plan(joint=joint, acceptance=float(joint[member].sum()))
