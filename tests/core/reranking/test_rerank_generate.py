"""The generated permutation: parsing, counting, and agreement with the judge."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rerank_toys import JudgeModel, passages, spell

from steersman.core.reranking import Generate, rerank
from steersman.core.reranking.generate import parse_permutation
from steersman.core.reranking.identifiers import LETTERS


@pytest.mark.parametrize(
    ("text", "size", "order", "malformed"),
    [
        ("[B] > [A] > [C]", 3, (1, 0, 2), False),
        ("[B] > [B] > [A]", 3, (1, 0, 2), True),  # a repeat, and C is missing
        ("[D] > [B]", 3, (1, 0, 2), True),  # out of range
        ("[C", 3, (2, 0, 1), True),  # never closed
        ("C > A > B", 3, (2, 0, 1), False),  # no brackets at all
        ("A passage about [C] is best", 3, (2, 0, 1), True),  # brackets beat the article
        ("", 3, (0, 1, 2), True),
        ("[ B ] > [A]", 2, (1, 0), False),
        ("[b] > [a]", 2, (0, 1), True),
    ],
)
def test_parse(text, size, order, malformed):
    assert parse_permutation(text, size) == (order, malformed)


@given(st.integers(1, 26), st.text("ABC[] >xZ", max_size=40))
def test_any_text_gives_a_permutation(size, text):
    order, _ = parse_permutation(text, size)
    assert sorted(order) == list(range(size))


@given(st.permutations(range(20)))
def test_round_trip(order):
    assert parse_permutation(spell([LETTERS[i] for i in order]), 20) == (tuple(order), False)


def test_agrees_with_first_on_a_consistent_judge():
    values = np.random.default_rng(0).permutation(30)
    first = rerank(JudgeModel(), "q", passages(values), window=10, stride=5)
    generated = rerank(JudgeModel(), "q", passages(values), window=10, stride=5, method="generate")
    assert generated.indices == first.indices
    assert generated.logit_kind == "none" and set(generated.logits) == {None}
    assert generated.usage.malformed == 0
    # "[" stands in the prompt; each further byte of "X] > [Y] > ..." is one token here, and the
    # last letter's bracket ends the window.
    assert generated.usage.generated_tokens == generated.usage.windows * (10 * 6 - 3 - 1)


def test_malformed_answers_are_counted_and_completed():
    model = JudgeModel(answer=lambda letters: f"[{letters[0]}] is the best one")
    ranking = rerank(model, "q", passages([1, 2, 3]), method="generate")
    assert ranking.indices == (2, 0, 1)
    assert ranking.usage.malformed == 1


def test_token_limit_ends_a_babbling_model():
    model = JudgeModel(answer=lambda letters: f"[{letters[0]}] " + "and so on " * 1000)
    ranking = rerank(model, "q", passages([1, 2, 3]), method=Generate(max_tokens=25))
    assert ranking.usage.generated_tokens == 25
    assert ranking.usage.malformed == 1


def test_room_for_the_answer_is_kept_free():
    texts = [f"worth {i} " + "word " * 100 for i in range(10)]
    model = JudgeModel(context=2000)
    ranking = rerank(model, "q", texts, method="generate")
    assert ranking.indices == tuple(range(9, -1, -1))
    assert ranking.usage.prompt_tokens + ranking.usage.generated_tokens <= 2000
