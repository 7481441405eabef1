"""CreditDecoding's and NBDiff's formulas, against the papers' definitions and worked numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy_tokenizer import ToyTokenizer, byte_tokenizer, small_tokenizer

from steersman.core.array import to_numpy
from steersman.core.decode.block_diffusion import (
    CreditRule,
    Credits,
    add_credit,
    confidences,
    find_mask,
    to_fix,
)
from steersman.core.errors import UsageError

TRACE = np.array([(0.5, 0.3, 0.2), (0.6, 0.25, 0.15), (0.3, 0.5, 0.2), (0.7, 0.2, 0.1)])
IMPLEMENTATION = CreditRule(alpha=0.7, beta=0.8, gamma=0.2)
PAPER = CreditRule()


def fused(credits: Credits, rule: CreditRule, logits: Any) -> np.ndarray:
    """Return the distribution of one position after its credit, from ``logits`` (1, V)."""
    moved = to_numpy(add_credit(logits, *credits.entries([0]), rule.alpha)).astype(np.float64)
    return np.exp(moved[0]) / np.exp(moved[0]).sum()


def observe(credits: Credits, rule: CreditRule, probs: np.ndarray) -> Credits:
    leader = np.array([int(np.argmax(probs))])
    return credits.observe([0], leader, np.array([probs.max()]), beta=rule.beta, gamma=rule.gamma)


def test_worked_trace_to_the_digits(lib: Any) -> None:
    credits, seen, final = Credits(), [], []
    for row in TRACE:
        credits = observe(credits, IMPLEMENTATION, row)
        seen.append([credits.held[0].get(v, 0.0) for v in range(3)])
        final.append(fused(credits, IMPLEMENTATION, lib(np.log(row)[None])))
    np.testing.assert_allclose(
        seen,
        [
            (0.870551, 0, 0),
            (1.599321, 0, 0),
            (1.279457, 0.870551, 0),
            (1.954715, 0.696440, 0),
        ],
        atol=1e-6,
    )
    np.testing.assert_allclose(
        final,
        [
            (0.607869, 0.235279, 0.156852),
            (0.745383, 0.159135, 0.095481),
            (0.353890, 0.513586, 0.132524),
            (0.793229, 0.153690, 0.053081),
        ],
        atol=2e-6,
    )


def test_worked_trace_with_the_papers_coefficients() -> None:
    credits, leads = Credits(), []
    for row in TRACE:
        credits = observe(credits, PAPER, row)
        leads.append(fused(credits, PAPER, np.log(row)[None]))
    first = [q[0] for q in leads]
    np.testing.assert_allclose(first, [0.600381, 0.731890, 0.335231, 0.780697], atol=1e-6)
    assert leads[2].argmax() == 1
    assert leads[2][1] == pytest.approx(0.524993, abs=1e-6)


def test_a_steady_position_passes_the_threshold_at_the_third_step() -> None:
    credits, lead = Credits(), []
    row = np.array([0.8, 0.15, 0.05])
    for _ in range(3):
        credits = observe(credits, IMPLEMENTATION, row)
        lead.append(fused(credits, IMPLEMENTATION, np.log(row)[None])[0])
    np.testing.assert_allclose(lead, [0.864836, 0.889644, 0.902833], atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "tau", "least"),
    [
        (IMPLEMENTATION, 0.9, 0.727103),
        (PAPER, 0.9, 0.780527),
        (IMPLEMENTATION, 0.95, 0.846779),
        (PAPER, 0.95, 0.881209),
    ],
)
def test_credit_widens_the_threshold_by_a_bounded_amount(
    rule: CreditRule, tau: float, least: float
) -> None:
    """The credit's limit is p ** gamma / (1 - beta); below the least p it never suffices."""
    for p, reaches in ((least + 2e-6, True), (least - 2e-6, False)):
        row, credits = np.array([p, 1 - p]), Credits()
        for _ in range(200):
            credits = observe(credits, rule, row)
        assert credits.held[0][0] == pytest.approx(p**rule.gamma / (1 - rule.beta), rel=1e-9)
        # float64 logits: the gap is smaller than float32 resolves.
        weights = row * (1 + np.array([credits.held[0][0], 0.0])) ** rule.alpha
        assert (weights[0] / weights.sum() >= tau) == reaches


def test_sparse_equals_dense_and_stays_in_bounds(lib: Any) -> None:
    rng = np.random.default_rng(1)
    m, vocab = 4, 9
    dense, credits, rule = np.zeros((m, vocab)), Credits(), PAPER
    for step in range(30):
        logits = rng.normal(size=(m, vocab)).astype(np.float32) * 2
        probs = np.exp(logits.astype(np.float64))
        probs /= probs.sum(-1, keepdims=True)
        leaders = logits.argmax(-1)
        dense *= rule.beta
        dense[np.arange(m), leaders] += probs.max(-1) ** rule.gamma
        credits = credits.observe(
            range(m), leaders, probs.max(-1), beta=rule.beta, gamma=rule.gamma
        )
        rows, tokens, values = credits.entries(range(m))
        spread = np.zeros((m, vocab))
        spread[rows, tokens] = values
        np.testing.assert_allclose(spread, dense, atol=1e-6)
        assert (values > 0).all() and (values <= 1 / (1 - rule.beta)).all()
        assert max(len(row) for row in credits.held.values()) <= step + 1
        moved = to_numpy(add_credit(lib(logits), rows, tokens, values, rule.alpha))
        np.testing.assert_allclose(moved, logits + rule.alpha * np.log1p(dense), atol=1e-6)
        weights = probs * (1 + dense) ** rule.alpha
        after = weights / weights.sum(-1, keepdims=True)
        best = dense.argmax(-1)
        assert (after >= probs - 1e-12)[np.arange(m), best].all()
        for row in range(m):  # the rank of tokens without credit does not change
            none = dense[row] == 0
            assert (np.argsort(moved[row][none]) == np.argsort(logits[row][none])).all()


def test_positions_are_independent_and_forgotten_when_not_masked() -> None:
    both = Credits().observe([3, 5], np.array([1, 2]), np.array([0.5, 0.4]), beta=0.7, gamma=0.2)
    alone = Credits().observe([5], np.array([2]), np.array([0.4]), beta=0.7, gamma=0.2)
    assert both.held[5] == alone.held[5]
    later = both.observe([5], np.array([1]), np.array([0.6]), beta=0.7, gamma=0.2)
    assert set(later.held) == {5}
    assert later.held[5] == {2: pytest.approx(0.7 * 0.4**0.2), 1: pytest.approx(0.6**0.2)}
    assert both.held[3] == {1: 0.5**0.2}, "the earlier value is untouched"


def test_impossible_tokens_stay_impossible(lib: Any) -> None:
    logits = lib([[0.0, -np.inf, 1.0]])
    moved = to_numpy(
        add_credit(logits, np.array([0, 0]), np.array([1, 2]), np.array([1.0, 1.0]), 0.5)
    )
    np.testing.assert_allclose(moved, [[0.0, -np.inf, 1 + 0.5 * np.log(2)]], atol=1e-6)
    assert add_credit(logits, *Credits().entries([0]), 0.5) is logits


def test_tuning_free_begins_with_no_effect() -> None:
    rule = CreditRule.read("tuning_free")
    assert rule is not None
    assert rule.coefficients(1.0) == (0.0, 0.0, 1.0)
    assert rule.coefficients(0.25) == (0.75, 0.75, 1.0)
    assert CreditRule.read(False) is None
    assert CreditRule.read({}) == CreditRule(alpha=0.65, beta=0.7, gamma=0.2)
    assert CreditRule.read({"alpha": 0}).coefficients(0.5) == (0, 0.7, 0.2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alfa": 1}, r"credit: unknown key 'alfa', did you mean 'alpha'\?"),
        ({"beta": 1.5}, r"block_diffusion: credit: beta must be in \[0, 1\], got 1.5"),
        ({"gamma": -1}, r"credit: gamma must be"),
        ("on", r"credit must be off, tuning_free or \{alpha, beta, gamma\}, got 'on'"),
        (True, r"credit must be off, tuning_free or"),
    ],
)
def test_bad_credit_is_named(setting: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CreditRule.read(setting)


# -- confidence ----------------------------------------------------------------------------------


def test_confidences_equal_their_definitions(lib: Any) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(5, 7)).astype(np.float32) * 3
    logits[2, 3:] = -np.inf
    logits[3, 1:] = -np.inf  # one token left: margin 1, entropy 0
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    tokens = np.array([0, 3, 1, 0, 6])
    ordered = np.sort(probs, axis=-1)
    surprise = np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0)
    expected = {
        "origin": probs[np.arange(5), tokens],
        "confidence_threshold": probs[np.arange(5), tokens],
        "topk_margin": ordered[:, -1] - ordered[:, -2],
        "entropy": surprise.sum(-1),
    }
    for algorithm, want in expected.items():
        got = to_numpy(confidences(lib(logits), lib(tokens, np.int64), algorithm))
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=algorithm)


def test_which_positions_are_fixed() -> None:
    confidence = np.array([0.3, 0.95, 0.9, 0.95, 0.1])

    def fixed(*args: Any) -> list[int]:
        return np.flatnonzero(to_fix(confidence, *args)).tolist()

    assert fixed(None) == [1]
    assert fixed(0.9) == [1, 3], "strictly above"
    assert fixed(1.0) == [1]
    assert fixed(-1.0) == [0, 1, 2, 3, 4]
    assert fixed(0.99, 1e-5) == [1, 3], "near-ties go together"
    assert fixed(0.9, 1e-5) == [1, 2, 3], "at least the threshold"


# -- the mask token ------------------------------------------------------------------------------


def controls(*names: str, template: str | None = None) -> ToyTokenizer:
    return ToyTokenizer(
        [b"a", b"b"], controls=names, eos=("<eos>",), bos=None, chat_template=template
    )


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (controls("<eos>", "<|MASK|>", "<pad>"), "<|MASK|>"),
        (controls("<eos>", "<unused7>", "<unused8>", "<pad>"), "<unused7>"),
        (controls("<eos>", "<file>", "<user>", template="{{'<user>'}}"), "<file>"),
        (controls("<eos>", "<user>", template="{{'<user>'}}"), "<user>"),
        (small_tokenizer(), "<bos>"),
        (byte_tokenizer(), "<|im_start|>"),
    ],
)
def test_a_mask_token_is_found(tokenizer: ToyTokenizer, name: str) -> None:
    found = find_mask(tokenizer, "auto", tokenizer.eos_ids)
    assert tokenizer.token_name(found) == name
    assert find_mask(tokenizer, name, tokenizer.eos_ids) == found
    assert find_mask(tokenizer, found, tokenizer.eos_ids) == found


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (13, r"mask 13 is outside the vocabulary 0\.\.12"),
        (12, "mask 12 ends a text"),
        ("<eos>", "mask '<eos>' ends a text"),
        ("abc", "mask 'abc' is 2 tokens of this model; name the one token"),
    ],
)
def test_a_bad_mask_is_named(wanted: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_mask(small_tokenizer(), wanted, small_tokenizer().eos_ids)


def test_a_model_without_control_tokens_is_told_to_name_one() -> None:
    with pytest.raises(UsageError, match="no mask token and no control token to spare; name a"):
        find_mask(controls("<eos>"), "auto", controls("<eos>").eos_ids)
