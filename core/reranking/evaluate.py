"""Measuring runs against judgements: ir-measures for the values, resampling for the doubt.

Values are exactly those of the ``ir_measures`` command on the same files. What is added: how many
scores are tied and what the measure makes of that, confidence intervals over queries, and a paired
comparison of two runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingDependency, UsageError, did_you_mean

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]
Floats = npt.NDArray[np.float64]

# What the programs behind ir-measures do with equal scores.
TIE_RULES: Mapping[str, str] = {
    "pytrec_eval": "trec_eval: by document id, last first; scores count in single precision",
    "msmarco": "MS MARCO script: by document id, first first; scores count in double precision",
}


@dataclass(frozen=True, kw_only=True)
class Ties:
    """Equal scores within a query.

    Attributes
    ----------
    queries : int
        Queries with at least one tie.
    documents : int
        Documents that share their score with another one of the same query.
    single_only : int
        Those among ``documents`` whose scores differ in double precision and are equal in the
        single precision that trec_eval uses.
    """

    queries: int
    documents: int
    single_only: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure of a run.

    Attributes
    ----------
    name : str
    value : float
        Over all judged queries; a judged query that the run lacks counts 0.
    interval : (float, float) or None
        Percentile bootstrap over queries; None for totals and for fewer than two queries.
    per_query : dict of qid to float
    provider : str
        Program that computes it.
    tie_rule : str
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    per_query: Mapping[str, float]
    provider: str
    tie_rule: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired comparison of two runs in one measure.

    Attributes
    ----------
    name : str
    value : float
        Mean over queries of first minus second.
    interval : (float, float) or None
        Percentile bootstrap of the paired differences.
    p_value : float
        Two-sided sign-flip randomisation test; at least ``1 / (samples + 1)``.
    better, worse, equal : int
        Queries.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    p_value: float
    better: int
    worse: int
    equal: int


def count_ties(run: Run) -> Ties:
    """Count equal scores within the queries of a run; see :class:`Ties`."""
    queries = documents = single_only = 0
    for scores in run.values():
        values = np.fromiter(scores.values(), np.float64, len(scores))
        single = _sharing(values.astype(np.float32))
        queries += bool(single)
        documents += single
        single_only += single - _sharing(values)
    return Ties(queries=queries, documents=documents, single_only=single_only)


def _sharing(values: npt.NDArray[Any]) -> int:
    _, counts = np.unique(values, return_counts=True)
    return int(counts[counts > 1].sum())


def bootstrap_interval(
    values: Sequence[float] | Floats, *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of a mean; None for fewer than two values.

    Parameters
    ----------
    values : float array (n,)
        One per query.
    level : float in (0, 1)
    samples : int
        Resamples, at least 1.
    seed : int
        Same seed, same interval.
    """
    data = np.asarray(values, np.float64)
    if len(data) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            rng.choice(data, (min(256, samples - done), len(data))).mean(axis=1)
            for done in range(0, samples, 256)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def randomisation_test(
    differences: Sequence[float] | Floats, *, samples: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p-value of a sign-flip randomisation test that a mean is 0.

    Parameters
    ----------
    differences : float array (n,)
        Paired differences, one per query.

    References
    ----------
    Smucker, Allan, Carterette, "A comparison of statistical significance tests for information
    retrieval evaluation", CIKM 2007.
    """
    data = np.asarray(differences, np.float64)
    data = data[data != 0]
    if not len(data):
        return 1.0
    rng = np.random.default_rng(seed)
    # A hair of slack, so that the observed sum counts as extreme as itself whatever the rounding.
    observed = abs(data.sum()) * (1 - 1e-12)
    extreme = 0
    for done in range(0, samples, 256):
        signs = rng.choice([-1.0, 1.0], (min(256, samples - done), len(data)))
        extreme += int((np.abs(signs @ data) >= observed).sum())
    return (extreme + 1) / (samples + 1)


def parse_measures(names: Iterable[str]) -> list[tuple[Any, str]]:
    """Return ir-measures' objects for names such as ``nDCG@10`` and ``P(rel=2)@5``.

    Returns
    -------
    list of (measure, provider name)

    Raises
    ------
    MissingDependency
        ir-measures is not installed.
    UsageError
        A name is unknown, lacks a parameter, or no installed program computes it.
    """
    try:
        import ir_measures
    except ImportError:
        raise MissingDependency(
            'ir-measures is not installed; run: pip install "steersman[eval]"'
        ) from None
    found: list[tuple[Any, str]] = []
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
        except NameError:
            known = ir_measures.measures.registry
            plain = name.partition("@")[0].partition("(")[0]
            near = {k.lower(): known[k].NAME for k in known}.get(plain.lower())
            hint = f", did you mean {near!r}?" if near else did_you_mean(plain, known)
            raise UsageError(f"--measure {name!r}: unknown measure{hint}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"--measure {name!r}: {error}") from None
        provider = _provider(measure)
        if provider is None:
            raise UsageError(
                f"--measure {name!r}: no installed program computes it with these parameters"
            )
        if measure not in [m for m, _ in found]:
            found.append((measure, provider))
    return found


def _provider(measure: Any) -> str | None:
    import ir_measures

    for provider in ir_measures.DefaultPipeline.providers:
        try:
            if provider.is_available() and provider.supports(measure):
                return str(provider.NAME)
        except (AssertionError, ValueError):
            return None  # a needed parameter such as the cutoff is missing
    return None


def evaluate(
    run: Run,
    qrels: Qrels,
    measures: Sequence[str] = ("nDCG@10",),
    *,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> list[Measured]:
    """Measure a run.

    Parameters
    ----------
    run : mapping of qid to mapping of docid to score
    qrels : mapping of qid to mapping of docid to relevance
        Every query in here counts, as in trec_eval's ``-c``.
    measures : sequence of str
        ir-measures' names.
    level, samples, seed
        Of the bootstrap.

    Raises
    ------
    MissingDependency, UsageError
    """
    import ir_measures

    parsed = parse_measures(measures)
    if not qrels:
        raise UsageError("qrels: hold no judgement")
    result = ir_measures.calc(
        [m for m, _ in parsed], dict(qrels), {q: dict(d) for q, d in run.items()}
    )
    per_query: dict[Any, dict[str, float]] = {m: {} for m, _ in parsed}
    for metric in result.per_query:
        per_query[metric.measure][metric.query_id] = float(metric.value)
    found = []
    for measure, provider in parsed:
        averaged = type(measure.aggregator()).__name__ == "MeanAgg"
        values = [per_query[measure].get(qid, 0.0) for qid in qrels]
        found.append(
            Measured(
                name=str(measure),
                value=float(result.aggregated[measure]),
                interval=bootstrap_interval(values, level=level, samples=samples, seed=seed)
                if averaged
                else None,
                per_query={qid: per_query[measure].get(qid, 0.0) for qid in qrels},
                provider=provider,
                tie_rule=TIE_RULES.get(provider, f"left to {provider}"),
            )
        )
    return found


def compare(
    first: Measured, second: Measured, *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare two runs, query by query, in the same measure over the same judgements."""
    if first.name != second.name or first.per_query.keys() != second.per_query.keys():
        raise UsageError(f"compare: {first.name} and {second.name} are over different queries")
    gaps = np.array([first.per_query[q] - second.per_query[q] for q in first.per_query])
    return Difference(
        name=first.name,
        value=float(gaps.mean()),
        interval=bootstrap_interval(gaps, level=level, samples=samples, seed=seed),
        p_value=randomisation_test(gaps, samples=samples, seed=seed),
        better=int((gaps > 0).sum()),
        worse=int((gaps < 0).sum()),
        equal=int((gaps == 0).sum()),
    )
