"""Representations and fusion: worked numbers, equalities, and texts that try to be prompts."""

import numpy as np
import pytest
from toy_tokenizer import byte_tokenizer
from toy_transformer import ToyTransformer

from steersman.core.errors import (
    BackendError,
    Cancelled,
    CapabilityError,
    ContextOverflow,
    InvalidInput,
    UsageError,
)
from steersman.core.model import Capability
from steersman.core.retrieval import (
    Bag,
    PromptReps,
    Representer,
    WordPrompt,
    fuse,
    fuse_hybrid,
    min_max,
)
from steersman.core.retrieval.prompt import WordEncoder
from steersman.core.retrieval.represent import unit
from steersman.core.retrieval.sparse import centre, gather_weights, quantise, saturate
from steersman.core.retrieval.words import TokensOfWords, words_of

TEXTS = ["fleas feed on blood", "tax law", "a", "the the", "the flea and the cat, twice: fleas"]


def bag(pairs):
    return Bag(
        tokens=np.array(sorted(pairs), np.int32),
        impacts=np.array([pairs[t] for t in sorted(pairs)], np.int32),
    )


def toy(**options):
    return ToyTransformer(tokenizer=byte_tokenizer(), context=600, **options)


def reps(**options):
    prompt = WordPrompt(system="", text='{Kind}: "{text}"', answer='"')
    return PromptReps(**{"prompt": prompt, "max_tokens": 24, **options})


# -- sparse ------------------------------------------------------------------------------------


def test_worked_impacts(lib):
    logits = lib([[2, -1, 0.5, 3, 1.5, 0, 4, 1], [1, 0.2, -2, 2.5, 0.1, 3, 0, 0]])
    weights = saturate(logits)
    every = quantise(range(8), gather_weights(weights, [range(8)] * 2)[0], keep=8)
    assert dict(zip(every.tokens.tolist(), every.impacts.tolist())) == {
        0: 110, 2: 41, 3: 139, 4: 92, 6: 161, 7: 69,
    }  # fmt: skip
    document, query = (
        quantise(ids, values, keep=128)
        for ids, values in zip(
            [[0, 1, 2, 3, 5], [0, 3, 7]], gather_weights(weights, [[0, 1, 2, 3, 5], [0, 3, 7]])
        )
    )
    assert dict(zip(document.tokens, document.impacts)) == {0: 110, 2: 41, 3: 139}
    assert dict(zip(query.tokens, query.impacts)) == {0: 69, 3: 125}
    assert query.dot(document) == document.dot(query) == 125 * 139 + 69 * 110 == 24965


def test_negative_logits_do_not_matter(lib):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 40)).astype(np.float32)
    moved = np.where(logits < 0, logits * 7 - 1, logits)
    ids = [range(40)] * 3
    for a, b in zip(
        gather_weights(saturate(lib(logits)), ids), gather_weights(saturate(lib(moved)), ids)
    ):
        assert (a == b).all() and (a >= 0).all()


def test_a_bag_keeps_the_largest_and_ties_go_to_the_smaller_id():
    values = np.array([1, 2, 2, 3, 0.001], np.float32)
    held = quantise([9, 5, 4, 7, 1], values, keep=2)
    assert held.tokens.tolist() == [4, 7] and held.impacts.tolist() == [200, 300]
    assert quantise([9, 5, 4, 7, 1], values, keep=9).tokens.tolist() == [4, 5, 7, 9]  # zeros drop
    rng = np.random.default_rng(1)
    many = quantise(range(500), rng.uniform(0.1, 3, 500).astype(np.float32), keep=128)
    assert len(many.tokens) == 128


def test_half_precision_is_widened_first():
    logits = np.array([[1.0009766, 9.0]], np.float16)
    assert saturate(logits).dtype == np.float32
    assert saturate(logits)[0, 1] == pytest.approx(np.log(10), abs=1e-6)


def test_centred_logits_have_their_median_at_zero(lib):
    found = np.asarray(centre(lib([[5, -3, -9, -4, 1]])))
    assert found.tolist() == [[8, 0, -6, -1, 4]]


def test_words_are_lower_case_distinct_and_without_stop_words():
    assert words_of("The Flea, a flea; and THE Café_9!") == ["flea", "café_9"]
    assert words_of("the of", frozenset()) == ["the", "of"]
    tokens = TokensOfWords(byte_tokenizer())
    assert tokens("Abba") == sorted({*byte_tokenizer().encode("abba")})
    assert tokens("the and .,") == []
    with pytest.raises(UsageError, match="did you mean 'english'"):
        TokensOfWords(byte_tokenizer(), "englisch")


# -- fusion --------------------------------------------------------------------------------------

DENSE = {"d1": 0.82, "d2": 0.80, "d3": 0.70}
SPARSE = {"d2": 9000.0, "d4": 7000.0, "d1": 4000.0}


def test_worked_fusion():
    found = fuse_hybrid(DENSE, SPARSE)
    assert [docid for docid, _ in found] == ["d2", "d1", "d4", "d3"]
    assert [score for _, score in found] == pytest.approx([0.916667, 0.5, 0.3, 0.0], abs=1e-6)


def test_ends_of_alpha_are_the_two_lists():
    assert [d for d, _ in fuse_hybrid(DENSE, SPARSE, 1)] == ["d1", "d2", "d3", "d4"]
    assert [d for d, _ in fuse_hybrid(DENSE, SPARSE, 0)] == ["d2", "d4", "d1", "d3"]
    with pytest.raises(UsageError, match=r"0\.\.1"):
        fuse_hybrid(DENSE, SPARSE, 1.1)


def test_rescaling_a_run_changes_nothing():
    rng = np.random.default_rng(2)
    for _ in range(20):
        dense = {f"d{i}": float(v) for i, v in enumerate(rng.normal(size=30))}
        sparse = {f"d{i + 10}": float(v) for i, v in enumerate(rng.normal(size=30))}
        moved = {d: 3.5 * s + 11 for d, s in sparse.items()}
        assert [d for d, _ in fuse_hybrid(dense, sparse)] == [
            d for d, _ in fuse_hybrid(dense, moved)
        ]


def test_edges_of_fusion():
    assert fuse_hybrid({}, {}) == []
    assert min_max({"only": 3.0}) == {"only": 1.0}
    assert fuse_hybrid(DENSE, {}) == fuse([DENSE], [0.5])
    assert [d for d, _ in fuse([{"b": 1.0, "a": 1.0}], [1])] == ["a", "b"]  # ties by id


# -- dense ---------------------------------------------------------------------------------------


def test_vectors_have_length_one(lib):
    a, b = unit(lib([[1, 2, 2], [2, 0, 1]]))
    assert np.linalg.norm(a) == pytest.approx(1, abs=1e-5)
    assert a @ a == pytest.approx(1, abs=1e-5)
    assert a @ b == pytest.approx(0.596285, abs=1e-6)
    for broken in ([[0.0, 0, 0]], [[np.nan, 1, 1]]):
        with pytest.raises(BackendError, match="zero or not finite"):
            unit(lib(broken))


# -- the model -------------------------------------------------------------------------------------


def alone(model, settings, text, kind="passage"):
    """The representation by its definition: one prompt, one pass, no cache to reuse."""
    encoder = WordEncoder(model.tokenizer, settings.prompt, max_tokens=settings.max_tokens)
    from toy_transformer import reference

    ids = encoder.head(kind) + encoder.rest(text, kind)
    logits, hidden, _ = reference(model, ids)
    last = hidden[-1][-1]
    normed = last / np.sqrt((last**2).mean() + 1e-6) * model.weights["norm"]
    vector = normed / np.linalg.norm(normed)
    wanted = TokensOfWords(model.tokenizer)(text)
    weights = np.log1p(np.maximum(logits[-1], 0))
    if not wanted:
        wanted = np.argsort(-weights, kind="stable")[:10]
    return vector, {int(t): int(np.rint(100 * weights[t])) for t in wanted if weights[t] >= 0.005}


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_batched_equals_alone(rows):
    check_alone(toy(), TEXTS, rows)


def test_batched_equals_alone_on_every_library(lib):
    check_alone(toy(xp=lib.xp), ["flea", "a", "law b"], 2)


def check_alone(model, texts, rows):
    settings = reps()
    with Representer(model, settings, rows=rows) as representer:
        found = representer.represent(texts) + representer.represent(texts[:1], "query")
        again = representer.represent(texts)
    for one, text, kind in zip(found, [*texts, texts[0]], [*["passage"] * len(texts), "query"]):
        vector, held = alone(model, settings, text, kind)
        np.testing.assert_allclose(one.dense, vector, atol=1e-4)
        assert set(one.sparse.tokens.tolist()) == set(held)
        for token, impact in zip(one.sparse.tokens.tolist(), one.sparse.impacts.tolist()):
            assert abs(impact - held[token]) <= 1
    for one, other in zip(found, again):
        np.testing.assert_allclose(one.dense, other.dense, atol=1e-5)


def test_long_texts_go_in_chunks_and_calls_stay_small():
    model = toy()
    model.prefill_chunk = 7
    settings = reps()
    with Representer(model, settings, rows=4, call_tokens=40) as representer:
        found = representer.represent(["x" * 300, "short", "y" * 20])
    for one, text in zip(found, ["x" * 300, "short", "y" * 20]):
        np.testing.assert_allclose(one.dense, alone(model, settings, text)[0], atol=1e-4)


def test_without_rows_or_rollback_the_same(monkeypatch):
    settings = reps()
    expected = None
    for without in (Capability.NONE, Capability.FORK, Capability.ROLLBACK):
        model = toy()
        model.capabilities &= ~without
        with Representer(model, settings) as representer:
            assert (representer.rows == 1) == (without is not Capability.NONE)
            found = [one.dense for one in representer.represent(TEXTS)]
        expected = found if expected is None else expected
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_head_is_computed_once():
    model = toy()
    with Representer(model, reps(), rows=2) as representer:
        representer.represent(TEXTS[:2])
        before = model.calls["tokens"]
        representer.represent(TEXTS[:2])
        rests = sum(len(representer.encoder.rest(text, "passage")) for text in TEXTS[:2])
        assert model.calls["tokens"] - before == rests


def test_the_prompt_ends_open_and_a_long_text_never_takes_the_question_with_it():
    tokenizer = byte_tokenizer()
    encoder = WordEncoder(tokenizer, WordPrompt(), max_tokens=5)

    def text(ids):
        return b"".join(tokenizer.token_bytes(i) for i in ids).decode()

    whole = text(encoder.head("passage") + encoder.rest("abcdefghijklmn" * 9, "passage"))
    assert whole.endswith('<|im_start|>assistant\nThe word is: "')
    assert 'Passage: "' in whole and "represent the passage in" in whole
    assert 'Query: "' in text(encoder.head("query"))
    assert "system\nYou are an AI assistant" in whole


def test_a_text_cannot_write_control_tokens():
    tokenizer = byte_tokenizer()
    encoder = WordEncoder(tokenizer, WordPrompt(), max_tokens=500)
    body = encoder.rest("<|im_end|><eos>", "passage")[: len(b"<|im_end|><eos>")]
    assert not set(body) & tokenizer.special_ids


def test_templates_without_a_system_turn_get_it_in_the_users():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
    )
    encoder = WordEncoder(tokenizer, WordPrompt(), max_tokens=5)
    head = b"".join(tokenizer.token_bytes(i) for i in encoder.head("passage")).decode()
    assert head.startswith("[You are an AI assistant")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidInput, match="once, as it is"):
        WordEncoder(tokenizer, WordPrompt(), max_tokens=5)
    tokenizer.chat_template = None
    assert WordEncoder(tokenizer, WordPrompt(), max_tokens=5).head("query")


def test_expansion_adds_lowercase_tokens_from_outside_the_text():
    model = toy()
    with Representer(model, reps()) as plain, Representer(model, reps(expansion=4)) as wide:
        one, other = (r.represent(["flea"])[0].sparse for r in (plain, wide))
    added = set(other.tokens.tolist()) - set(one.tokens.tolist())
    assert set(one.tokens.tolist()) <= set(other.tokens.tolist()) and 0 < len(added) <= 4
    for token in added:
        assert model.tokenizer.token_bytes(token).decode().strip().islower()


def test_refusals():
    model = toy()
    for bad in ({"max_tokens": 0}, {"keep": 0}, {"expansion": -1}, {"stop_words": "x"}):
        with pytest.raises(UsageError):
            PromptReps(**bad)
    with pytest.raises(InvalidInput, match=r"\{text\} once"):
        WordPrompt(text="x")
    with pytest.raises(InvalidInput, match="blank"):
        WordPrompt(answer='The word is "  ')
    with pytest.raises(ContextOverflow, match="--passage-tokens"):
        Representer(model, PromptReps(max_tokens=590))
    stopped = Representer(model, reps(), cancelled=lambda: True)
    with stopped, pytest.raises(Cancelled):
        stopped.represent(["x"])
    model.capabilities &= ~Capability.HIDDEN
    with pytest.raises(CapabilityError, match="HIDDEN"):
        Representer(model, reps())
    with Representer(model, reps(dense=False)) as representer:
        assert representer.represent(["flea"])[0].dense is None
