"""DRY against its definition, and its sequence breakers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import small_tokenizer

from steersman.core.array import to_numpy
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, Dry, apply_dry
from steersman.core.logits.breakers import breaker_tokens
from steersman.core.logits.dry import dry_penalties


def naive(tokens, *, multiplier, base, allowed_length, penalty_last_n, breakers):
    """DRY word for word: for every earlier position, count backwards how far it matches the end."""
    tokens = list(tokens)
    if penalty_last_n >= 0:
        tokens = tokens[len(tokens) - min(penalty_last_n, len(tokens)) :]
    n = len(tokens)
    limit = n
    for start in range(n - 1, -1, -1):
        fits = [
            len(tail)
            for tail in breakers.get(tokens[start], ())
            if tuple(tokens[start + 1 : start + 1 + len(tail)]) == tail
        ]
        if fits:
            limit = n - 1 - start - max(fits)
            break
    longest: dict[int, int] = {}
    for place in range(1, n):
        length = 0
        while length < min(place, limit) and tokens[place - 1 - length] == tokens[n - 1 - length]:
            length += 1
        if length >= allowed_length:
            longest[tokens[place]] = max(longest.get(tokens[place], 0), length)
    return {
        token: multiplier * base ** (length - allowed_length)
        for token, length in longest.items()
        if () not in breakers.get(token, ())
    }


TAILS = st.frozensets(st.lists(st.integers(0, 4), max_size=2).map(tuple), min_size=1, max_size=2)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=60),
    st.integers(1, 4),
    st.sampled_from([-1, 0, 1, 7, 30]),
    st.dictionaries(st.integers(0, 4), TAILS, max_size=2),
)
def test_penalties_equal_the_naive_definition(tokens, allowed_length, last_n, breakers):
    asked = {
        "multiplier": 0.8,
        "base": 1.5,
        "allowed_length": allowed_length,
        "penalty_last_n": last_n,
        "breakers": breakers,
    }
    ids, costs = dry_penalties(np.array(tokens, np.int64), **asked)
    want = naive(tokens, **asked)
    assert len(set(ids.tolist())) == len(ids)
    assert dict(zip(ids.tolist(), costs.tolist())) == pytest.approx(want)


def test_worked_example(lib):
    # "1 2 3 | 9 | 1 2": after 1 2 came 3, so 3 would prolong a repetition of length 2.
    history = [np.array([1, 2, 3, 9, 1, 2])]
    got = to_numpy(apply_dry(lib(np.zeros((1, 12))), history, multiplier=0.8))
    want = np.zeros((1, 12))
    want[0, 3] = -0.8
    np.testing.assert_allclose(got, want)
    # Two tokens more: the repetition has length 4, so base ** 2.
    history = [np.array([7, 8, 1, 2, 3, 9, 7, 8, 1, 2])]
    got = to_numpy(apply_dry(lib(np.zeros((1, 12))), history, multiplier=0.8))
    want[0, 3] = -0.8 * 1.75**2
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_rows_are_independent_and_foreign_ids_are_passed_over(lib):
    history = [np.array([1, 2, 50, 1, 2]), np.array([4, 5, 6, 4, 5]), np.array([], np.int64)]
    got = to_numpy(apply_dry(lib(np.zeros((3, 12))), history, multiplier=1.0))
    assert np.argwhere(got).tolist() == [[1, 6]]


def test_very_long_repetitions_stay_finite():
    ids, costs = dry_penalties(
        np.full(3_000, 7), multiplier=2.0, base=4.0, allowed_length=2, penalty_last_n=-1
    )
    assert ids.tolist() == [7]
    assert np.isfinite(costs).all()
    x = np.full((1, 9), 50.0, np.float32)
    got = Chain((Dry(multiplier=2.0, base=4.0, sequence_breakers=()),)).select(
        x, history=[np.full(3_000, 7)], uniforms=lambda *_: 0.99
    )
    assert got.tokens[0] != 7


def test_breakers_are_found_inside_and_across_tokens():
    class Words:
        vocab_size = 7
        pieces = (b"a", b"x\n", b"\n\nb", b"<", b"|end", b"|", b"a<|")

        def token_bytes(self, token):
            return self.pieces[token]

        def encode(self, text, *, special=False):
            return {"|end": [4], "end": [5, 0], "nd": [0]}.get(text, [0])

    found = breaker_tokens(Words(), ("\n", "<|end"))
    assert found[1] == found[2] == {()}
    assert found[3] == {(4,)}
    assert found[6] == {(5, 0)}
    assert set(found) == {1, 2, 3, 6}


def test_bind_turns_texts_into_tokens():
    tokenizer = small_tokenizer()
    stage = Dry(multiplier=1.0)
    assert stage.needs_tokenizer
    with pytest.raises(UsageError, match="call bind"):
        stage(np.zeros((1, 4), np.float32), None)
    bound = Chain((stage,)).bind(tokenizer).stages[0]
    assert not bound.needs_tokenizer
    assert bound == stage  # what bind found out is no parameter
    for token, tails in bound.breakers.items():
        text = tokenizer.token_bytes(token)
        if () in tails:
            assert any(mark.encode() in text for mark in stage.sequence_breakers)
    assert not Dry(sequence_breakers=()).needs_tokenizer
    assert Dry(multiplier=0).bind(tokenizer).breakers is None
