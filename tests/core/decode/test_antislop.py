"""Antislop: its formulas, neutral settings and exact distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from toys import TableModel

from steersman.core.array import to_numpy
from steersman.core.decode import Antislop, Sample
from steersman.core.decode.antislop.redraw import inverted, penalised
from steersman.core.decode.events import TokenEvent
from steersman.core.logits import Chain, TopK
from steersman.core.ops import softmax

from .antislop_support import (
    AB,
    Bursts,
    end,
    letters,
    quick,
    run,
)

# -- formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (1.0, [0.030303, 0.581818, 0.290909, 0.096970]),
        (0.25, [0.295997, 0.422402, 0.211201, 0.070400]),
        (0.0, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_a_soft_ban_multiplies_and_renormalises(
    lib: Any, strength: float, expected: list[float]
) -> None:
    logits = lib(np.log([[0.5, 0.3, 0.15, 0.05]]))
    got = softmax(penalised(logits, {0: 0.03125**strength}))
    np.testing.assert_allclose(to_numpy(got)[0], expected, atol=1e-6)


def test_a_hard_ban_removes(lib: Any) -> None:
    got = softmax(penalised(lib(np.log([[0.5, 0.3, 0.15, 0.05]])), {0: 0.0, 3: 0.0}))
    np.testing.assert_allclose(to_numpy(got)[0], [0, 2 / 3, 1 / 3, 0], atol=1e-6)


def test_inversion(lib: Any) -> None:
    with np.errstate(divide="ignore"):
        logits = lib(np.log([[0, 0.3, 0.15, 0.05]]))
    got = to_numpy(softmax(inverted(logits)))[0]
    np.testing.assert_allclose(got, [0, 0.090909, 0.363636, 0.545455], atol=1e-5)
    narrow = to_numpy(softmax(inverted(logits, 2)))[0]  # of 2/3 and 1/3
    np.testing.assert_allclose(narrow, [0, 1 / 3, 2 / 3, 0], atol=1e-5)


# -- neutral settings ------------------------------------------------------------------------------


NEUTRAL = [
    {},
    {"phrases": ("a", "b c"), "factor": 1.0},
    {"phrases": ("a", "b"), "regexes": ("c+",), "strength": 0.0},
    {"phrases": ("a",), "ngrams": ("b",), "factors": {"a": 1.0, "b": 1.0}},
    {"phrases": ("never there",)},
]


@pytest.mark.parametrize("options", NEUTRAL)
@pytest.mark.parametrize("inner", [Sample(), Bursts(size=3)])
def test_neutral_settings_are_plain_sampling(options: dict[str, Any], inner: Any) -> None:
    model = TableModel(order=2, seed=4)
    strategy = Antislop(inner=inner, **options)
    for seed in range(12):
        plain = run(model, Sample(), seed=seed, logprobs=2)
        got = run(model, strategy, seed=seed, logprobs=2)
        tokens = [[e for e in events if isinstance(e, TokenEvent)] for events in (plain, got)]
        assert tokens[0] == tokens[1]
        assert (end(plain).reason, end(plain).text) == (end(got).reason, end(got).text)


def test_a_text_without_hits_is_the_plain_one() -> None:
    model = TableModel(order=2, seed=4)
    for seed in range(30):
        plain, got = (run(model, s, seed=seed) for s in (Sample(), Antislop(phrases=("dab",))))
        if "rewind" not in str(got):
            assert end(plain).token_ids == end(got).token_ids


# -- exact distributions ---------------------------------------------------------------------------


def chi_square(counts: Counter[str], expected: Mapping[str, float]) -> float:
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    seen = [counts[text] for text in expected]
    p: float = chisquare(seen, [total * p for p in expected.values()]).pvalue
    return p


PAIR: dict[str, Any] = {"phrases": ("-+",)}


@pytest.mark.parametrize(
    ("rule", "inner"),
    [
        (PAIR, Sample()),
        (PAIR, Bursts(size=2)),
        (PAIR, Bursts(size=3)),
        (PAIR | {"variants": False}, Sample()),
        ({"regexes": (r"-\+",)}, Bursts(size=3)),
    ],
)
def test_hard_ban_of_a_pair_by_enumeration(rule: dict[str, Any], inner: Any) -> None:
    """Five tests at an error rate of 1e-3 each, with fixed seeds."""
    expected = {"---": 0.216, "+--": 0.28224, "++-": 0.301056, "+++": 0.200704}
    assert sum(expected.values()) == pytest.approx(1)
    model, strategy = letters(AB), Antislop(inner=inner, **rule)
    counts = Counter(quick(model, strategy, max_tokens=3, seed=seed)[0] for seed in range(800))
    assert chi_square(counts, expected) > 1e-3
    # It is not the model's distribution on the condition that the pair does not occur.
    conditional = {"---": 0.4154, "+--": 0.2769, "++-": 0.1846, "+++": 0.1231}
    assert chi_square(counts, conditional) < 1e-9


def test_soft_ban_decided_by_a_draw() -> None:
    """A pair stays with the probability of its first token after the penalty, renormalised."""
    stay = 0.6 * 0.5 / (0.6 * 0.5 + 0.4)
    expected = {
        "--": 0.36,
        "-+": 0.24 * stay,
        "+-": 0.24 + 0.24 * (1 - stay) * 0.6,
        "++": 0.16 + 0.24 * (1 - stay) * 0.4,
    }
    strategy = Antislop(phrases=("-+",), factor=0.5, acceptance="draw")
    counts = Counter(
        quick(letters(AB), strategy, max_tokens=2, seed=seed)[0] for seed in range(1000)
    )
    assert chi_square(counts, expected) > 1e-3


def test_inversion_draws_the_unlikely() -> None:
    model = letters({"-": 0.5, "a": 0.3, "b": 0.15, "c": 0.05})
    strategy = Antislop(phrases=("-",), invert=True, chain=Chain((TopK(k=4),)))
    counts = Counter(quick(model, strategy, max_tokens=1, seed=seed)[0] for seed in range(800))
    turned = {"a": 1 / 11, "b": 4 / 11, "c": 6 / 11}
    plain = {"a": 0.3, "b": 0.15, "c": 0.05}
    assert chi_square(counts, {key: plain[key] + 0.5 * p for key, p in turned.items()}) > 1e-3
