"""Measures: equal to ir-measures and to trec_eval's own definition, ties included."""

import math

import numpy as np
import pytest

from steersman.core.errors import UsageError
from steersman.core.reranking.evaluate import (
    bootstrap_interval,
    compare,
    count_ties,
    evaluate,
    parse_measures,
    randomisation_test,
)

ir_measures = pytest.importorskip("ir_measures")
NAMES = ("nDCG@10", "RR", "RR@10", "AP", "P(rel=2)@5", "R@20")


def random_case(seed: int, tied: bool):
    rng = np.random.default_rng(seed)
    qrels = {f"q{i}": {f"d{j}": int(rng.integers(0, 4)) for j in range(12)} for i in range(7)}
    run = {}
    for i in range(1, 8):  # q0 is judged but not retrieved, q7 retrieved but not judged
        scores = rng.integers(0, 4, 15).astype(float) if tied else rng.random(15)
        run[f"q{i}"] = {f"d{j}": float(s) for j, s in enumerate(scores)}
    return run, qrels


def by_trec_eval(scores):
    """trec_eval's order: C floats, then document ids from the last."""
    return sorted(scores, key=lambda d: (np.float32(scores[d]), d), reverse=True)


def ndcg(run, qrels, cut=10):
    values = []
    for qid, judged in qrels.items():
        order = by_trec_eval(run.get(qid, {}))[:cut]
        gain = sum(judged.get(d, 0) / math.log2(i + 2) for i, d in enumerate(order))
        ideal = sorted(judged.values(), reverse=True)[:cut]
        best = sum(g / math.log2(i + 2) for i, g in enumerate(ideal))
        values.append(gain / best if best else 0.0)
    return sum(values) / len(values)


def reciprocal_rank(run, qrels):
    values = []
    for qid, judged in qrels.items():
        order = by_trec_eval(run.get(qid, {}))
        values.append(next((1 / (i + 1) for i, d in enumerate(order) if judged.get(d, 0) > 0), 0.0))
    return sum(values) / len(values)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equal_to_ir_measures_and_to_the_definition(seed, tied):
    run, qrels = random_case(seed, tied)
    found = {m.name: m for m in evaluate(run, qrels, NAMES, samples=100)}
    want = ir_measures.calc_aggregate([ir_measures.parse_measure(n) for n in NAMES], qrels, run)
    assert {name: m.value for name, m in found.items()} == {str(k): v for k, v in want.items()}
    assert found["nDCG@10"].value == pytest.approx(ndcg(run, qrels), abs=1e-12)
    assert found["RR"].value == pytest.approx(reciprocal_rank(run, qrels), abs=1e-12)
    assert found["RR"].value == pytest.approx(np.mean(list(found["RR"].per_query.values())))


def test_two_programs_break_the_same_tie_two_ways():
    qrels = {"1": {"a": 1, "b": 0}}
    run = {"1": {"a": 1.0, "b": 1.0}}
    rr, rr10 = evaluate(run, qrels, ("RR", "RR@10"))
    assert (rr.value, rr10.value) == (0.5, 1.0)
    assert "last first" in rr.tie_rule and "first first" in rr10.tie_rule


def test_scores_that_only_double_precision_tells_apart_are_ties_to_trec_eval():
    run = {"1": {"a": 1.0 + 1e-12, "b": 1.0}, "2": {"a": 2.0, "b": 1.0, "c": 1.0}}
    ties = count_ties(run)
    assert (ties.queries, ties.documents, ties.single_only) == (2, 4, 2)
    (rr,) = evaluate({"1": run["1"]}, {"1": {"a": 1}}, ("RR",))
    assert rr.value == 0.5
    assert count_ties({"1": {"a": 1.0, "b": 0.5}}).queries == 0


def test_totals_have_no_interval():
    run, qrels = random_case(0, False)
    total, mean = evaluate(run, qrels, ("NumRel", "nDCG@10"), samples=100)
    assert total.interval is None and mean.interval is not None
    # ir-measures counts the relevant documents of queries that the run has.
    assert total.value == sum(v > 0 for q, d in qrels.items() if q in run for v in d.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndcg@10", "unknown measure, did you mean 'nDCG'"),
        ("nonsense", "unknown measure"),
        ("nDCG@", "problem parsing"),
        ("__import__('os')", "problem parsing"),
        ("P", "no installed program"),
    ],
)
def test_bad_measures(name, message):
    with pytest.raises(UsageError, match=message):
        parse_measures([name])


def test_bootstrap_covers_what_it_should():
    """Over many samples from a known distribution the interval holds the mean about 95 % often."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 60), samples=400, seed=seed)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_edges():
    assert bootstrap_interval([0.5]) is None
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)
    assert bootstrap_interval([0, 1, 1, 0, 1]) == bootstrap_interval([0, 1, 1, 0, 1])


def test_randomisation_test_equals_the_exact_one_on_few_queries():
    gaps = np.array([0.3, 0.1, -0.05, 0.2, 0.4, 0.25])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = float((np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-12).mean())
    assert randomisation_test(gaps, samples=20_000) == pytest.approx(exact, abs=0.01)
    assert randomisation_test([0.0, 0.0]) == 1.0


def test_comparison_is_paired():
    run, qrels = random_case(0, False)
    better = {q: {d: float(qrels.get(q, {}).get(d, 0)) for d in hits} for q, hits in run.items()}
    (a,) = evaluate(better, qrels, ("nDCG@10",), samples=100)
    (b,) = evaluate(run, qrels, ("nDCG@10",), samples=100)
    gap = compare(a, b, samples=1000)
    assert gap.value == pytest.approx(a.value - b.value)
    assert gap.worse == 0 and gap.better + gap.equal == len(qrels) and gap.p_value < 0.05
