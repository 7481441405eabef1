"""Byte-level probabilities against brute force on texts of bounded length."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from bpe_toys import BpeTokenizer, ByteSource, InducedModel, prompts_of

from steersman.core.array import to_numpy
from steersman.core.decode.byte_level import (
    Cover,
    Covers,
    Settings,
    TokenHealing,
    begin_covers,
    byte_logprobs,
)
from steersman.core.decode.byte_level.law import mixture, sharpened
from steersman.core.decode.byte_level.score import evaluated, needs_of

from .byte_level_support import ABC, EXACT, end, prompt_of, random_model, run, search


@pytest.fixture(scope="module")
def worked() -> InducedModel:
    """The worked example: bytes at random, merges b+c and a+bc."""
    tokenizer = BpeTokenizer(b"abc", [(b"b", b"c"), (b"a", b"bc")])
    return InducedModel(tokenizer, ByteSource(b"abc", 7, 0.0, np.random.default_rng(0), iid=ABC))


def spelled(model: InducedModel, covers: Covers) -> dict[tuple[bytes, ...], float]:
    pieces = model.tokenizer.pieces
    return {
        tuple(pieces[t] for t in tokens): math.exp(value)
        for tokens, value in covers.covers().items()
        if value > -100
    }


# -- the worked example ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a", {(b"a",): 0.47, (b"abc",): 0.03}),
        (b"ab", {(b"a", b"b"): 0.12, (b"abc",): 0.03}),
        (b"cab", {(b"c", b"a", b"b"): 0.024, (b"c", b"abc"): 0.006}),
    ],
)
def test_worked_example(
    worked: InducedModel, data: bytes, expected: dict[tuple[bytes, ...], float]
) -> None:
    covers = search(worked, prompt_of(worked, data))
    law, covers = covers.law()
    assert spelled(worked, covers) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(law.bytes[list(b"abc")], ABC, atol=1e-12)


def test_what_tokens_alone_would_say(worked: InducedModel) -> None:
    ids = prompt_of(worked, b"ab")
    naive, _ = search(worked, ids, Settings(negligible=0, search="naive", exact=False)).law()
    np.testing.assert_allclose(naive.bytes[list(b"abc")], [0.625, 0.375, 0], atol=1e-12)
    # Token healing keeps [a] and draws b or bc; the tokenizer never writes a, bc.
    healed, _ = search(worked, ids, Settings(negligible=0, search="healing", exact=False)).law()
    assert healed.bytes[ord("c")] == pytest.approx(0, abs=1e-12)


# -- brute force -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force(seed: int) -> None:
    """Covers, their sum, the law of the next byte and of the end, and covers grown by bytes."""
    model = random_model(seed)
    source, tokenizer = model.source, model.tokenizer
    (eos,) = tokenizer.eos_ids
    where = sorted(tokenizer.special_ids).index(eos)
    written = {text: (*tokenizer.encode(text.decode()), eos) for text in source.texts}
    with model.session(max_rows=8, needs=needs_of(EXACT)) as session:
        for data in prompts_of(source, 4):
            covers = evaluated(begin_covers(tokenizer, prompt_of(model, data), EXACT), session)
            whole = source.prefix(data)
            assert math.exp(covers.logprob) == pytest.approx(whole, abs=1e-10)
            law, covers = covers.law()
            for byte in source.letters:
                exact = source.prefix(data + bytes([byte])) / whole
                assert law.bytes[byte] == pytest.approx(exact, abs=1e-10)
            ends = source.texts.get(data, 0.0) / whole
            assert law.specials[where] == pytest.approx(ends, abs=1e-10)
            assert law.bytes.sum() + law.specials.sum() == pytest.approx(1, abs=1e-12)
            # Which covers there are: the shortest beginnings of all texts' tokens that reach.
            found: Counter[tuple[int, ...]] = Counter()
            for text, ids in written.items():
                if text.startswith(data):
                    size = _reaching(tokenizer, ids, len(data))
                    found[ids[:size]] += source.texts[text]  # type: ignore[assignment]
            listed = {t: math.exp(v) for t, v in covers.covers().items() if v > -100}
            assert listed == pytest.approx(dict(found), abs=1e-10)
            # Grown byte by byte: the same set with the same probabilities.
            if len(data) == 4 and data[0] != data[1]:
                continue
            grown = begin_covers(tokenizer, [tokenizer.bos_id or 0], EXACT)
            for byte in data:
                grown = evaluated(grown, session).append(byte)
            _, grown = evaluated(grown, session).law()
            again = {t: math.exp(v) for t, v in grown.covers().items() if v > -100}
            assert again == pytest.approx(listed, abs=1e-10)
            assert grown.logprob == pytest.approx(math.log(whole), abs=1e-10)


def _reaching(tokenizer: BpeTokenizer, ids: tuple[int, ...], size: int) -> int:
    """Return how many first tokens have at least ``size`` bytes."""
    at = 0
    for count, token in enumerate(ids, 1):
        at += len(tokenizer.pieces[token])
        if at >= size:
            return count
    raise AssertionError("the text is shorter")


def test_conditionals_multiply_to_the_whole() -> None:
    for seed in range(4):
        model = random_model(seed)
        for text in list(model.source.texts)[::37]:
            values = byte_logprobs(model, [model.tokenizer.bos_id or 0], text, settings=EXACT)
            whole = model.source.prefix(text)
            assert values.sum() == pytest.approx(math.log(whole), abs=1e-10)


def test_a_model_that_leaks_into_other_spellings() -> None:
    """Exact mode: no spelling but the canonical counts, and the laws still sum to one."""
    base = random_model(3)
    model = InducedModel(base.tokenizer, base.source, leak=0.05)
    for data in prompts_of(model.source, 3):
        covers = search(model, prompt_of(model, data))
        law, covers = covers.law()
        assert law.bytes.sum() + law.specials.sum() == pytest.approx(1, abs=1e-12)
        for tokens in covers.covers():
            written = b"".join(model.tokenizer.pieces[t] for t in tokens)
            assert tuple(model.tokenizer.encode(written.decode())) == tokens
        loose, _ = search(model, prompt_of(model, data), Settings(negligible=0, exact=False)).law()
        assert loose.leaked == 0 and law.leaked > 0


def test_what_is_left_out_stays_below_the_bound() -> None:
    for seed in range(6):
        model = random_model(seed)
        for data in prompts_of(model.source, 3):
            exact, _ = search(model, prompt_of(model, data)).law()
            rough, _ = search(model, prompt_of(model, data), Settings(negligible=0.05)).law()
            away = np.abs(exact.bytes - rough.bytes).sum() / 2
            assert rough.left_out <= 0.05
            assert away <= rough.left_out + rough.unchecked + 1e-12


def test_an_improbable_byte_is_looked_at_more_closely() -> None:
    """What a law may leave out is small against its sum, not against a single byte."""
    for seed in (1, 3, 7):
        model = random_model(seed)
        bos = [model.tokenizer.bos_id or 0]
        for text in list(model.source.texts)[::53]:
            exact = byte_logprobs(model, bos, text, settings=EXACT)
            rough = byte_logprobs(model, bos, text, settings=Settings(negligible=0.02))
            np.testing.assert_allclose(rough, exact, atol=0.04)


def test_a_vocabulary_of_bytes_has_one_cover() -> None:
    tokenizer = BpeTokenizer(b"abc", [])
    source = ByteSource(b"abc", 5, 0.1, np.random.default_rng(1))
    model = InducedModel(tokenizer, source)
    covers = search(model, prompt_of(model, b"cab"))
    assert len(covers.covers()) == 1
    law, _ = covers.law()
    expected = model.probs(prompt_of(model, b"cab"))
    np.testing.assert_allclose(law.bytes[list(b"abc")], expected[:3], atol=1e-12)


def test_one_row_at_a_time_gives_the_same() -> None:
    model = random_model(1)
    for data in (b"abca", b"cba"):
        many, _ = search(model, prompt_of(model, data)).law()
        one, _ = search(model, prompt_of(model, data), Settings(negligible=0, rows=1)).law()
        np.testing.assert_allclose(many.bytes, one.bytes, atol=1e-14)


# -- mixing and sharpening -------------------------------------------------------------------------


def test_sharpened(lib: Any) -> None:
    law = lib([ABC], np.float32)
    np.testing.assert_allclose(
        to_numpy(sharpened(law, 0.5))[0], [0.657895, 0.236842, 0.105263], atol=2e-6
    )
    np.testing.assert_array_equal(to_numpy(sharpened(law, 1.0)), to_numpy(law))
    np.testing.assert_array_equal(to_numpy(sharpened(law, 0.0))[0], [1, 0, 0])
    cut = to_numpy(sharpened(law, 1.0, 0.75))[0]
    np.testing.assert_allclose(cut, [0.625, 0.375, 0], atol=1e-6)
    never = to_numpy(sharpened(lib([[0.7, 0.3, 0.0]], np.float32), 2.0))[0]
    assert never[2] == 0


def test_mixture() -> None:
    mean = mixture([np.array(ABC), np.array([0.1, 0.6, 0.3])], [1, 1])
    np.testing.assert_allclose(mean, [0.3, 0.45, 0.25], atol=1e-15)
    weighted = mixture([np.array(ABC), np.array([0.1, 0.6, 0.3])], [3, 1])
    np.testing.assert_allclose(weighted, [0.4, 0.375, 0.225], atol=1e-15)
    silent = mixture([np.array(ABC), np.zeros(3)], [1, 1])
    np.testing.assert_allclose(silent, ABC, atol=1e-15)


def test_two_copies_equal_one_model_and_two_models_their_mean() -> None:
    first, second = random_model(3), random_model(5)
    text = b"abcb"
    alone = byte_logprobs(first, [first.tokenizer.bos_id or 0], text, settings=EXACT)
    twice = byte_logprobs([first, first], [[first.tokenizer.bos_id or 0]] * 2, text, settings=EXACT)
    np.testing.assert_allclose(twice, alone, atol=1e-12)
    prompts = [[m.tokenizer.bos_id or 0] for m in (first, second)]
    both = byte_logprobs([first, second], prompts, text, settings=EXACT)
    for at in range(len(text)):
        head, more = text[:at], text[: at + 1]
        mean = np.mean([m.source.prefix(more) / m.source.prefix(head) for m in (first, second)])
        assert both[at] == pytest.approx(math.log(mean), abs=1e-10)


# -- in the loop -----------------------------------------------------------------------------------


def test_token_healing_has_another_distribution(worked: InducedModel) -> None:
    """First letters of 160 texts behind "ab"; each test fails by chance once in 1000 seeds."""
    prompt = prompt_of(worked, b"ab")
    for strategy, law in ((TokenHealing(), [0.625, 0.375, 0.0]), (Cover(), ABC)):
        texts = [
            end(run(worked, strategy, prompt, seed=seed, max_tokens=1)).text for seed in range(160)
        ]
        counts = np.array([sum(text.startswith(letter) for text in texts) for letter in "abc"])
        assert counts.sum() == 160
        possible = np.array(law) > 0
        assert not counts[~possible].any()
        expected = 160 * np.array(law)[possible]
        statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
        assert statistic < {1: 10.83, 2: 13.82}[int(possible.sum()) - 1], counts
