"""Byte-level strategies in the loop: distributions, caches, and what goes on after a cover."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from bpe_toys import BpeTokenizer, ByteSource, InducedModel
from toys import TableModel

from steersman.core.decode import Antislop, BeamSearch, BestOfN, Sample
from steersman.core.decode.byte_level import (
    ByteLevel,
    Cover,
    TokenHealing,
)
from steersman.core.decode.events import TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request, Token
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, MinP, Penalties, Temperature, TopK

from .byte_level_support import end, prompt_of, random_model, run

# -- in the loop -----------------------------------------------------------------------------------


def chi_square(counts: Counter[str], law: dict[str, float], total: int) -> tuple[float, int]:
    """Return the statistic over outcomes expected at least 5 times, the rest pooled."""
    large = {k: p for k, p in law.items() if p * total >= 5}
    rest = 1 - sum(large.values())
    value = sum((counts[k] - p * total) ** 2 / (p * total) for k, p in large.items())
    if rest * total >= 5:
        other = total - sum(counts[k] for k in large)
        value += (other - rest * total) ** 2 / (rest * total)
    return value, len(large) - (rest * total < 5)


def laws_of(model: InducedModel, data: bytes, size: int) -> dict[str, float]:
    """Return the distribution of the next ``size`` bytes, shorter where the text ends."""
    whole, found = model.source.prefix(data), Counter[str]()
    for text, p in model.source.texts.items():
        if text.startswith(data):
            found[text[len(data) : len(data) + size].decode()] += p / whole  # type: ignore[assignment]
    return dict(found)


@pytest.mark.parametrize("name", ["byte_level", "cover"])
def test_bytes_and_covers_have_the_source_s_distribution(name: str) -> None:
    """Chi-square of the next 3 bytes; each of the two would fail by chance once in 1000 seeds."""
    from scipy.stats import chi2

    model, data, total = random_model(7), b"ab", 250
    strategy = ByteLevel(negligible=0) if name == "byte_level" else Cover(negligible=0)
    counts: Counter[str] = Counter()
    for seed in range(total):
        text = end(run(model, strategy, prompt_of(model, data), seed=seed)).text
        counts[text[:3]] += 1
    value, degrees = chi_square(counts, laws_of(model, data, 3), total)
    assert degrees >= 5
    assert value < chi2.ppf(0.999, degrees)


def test_temperature_zero_takes_the_likeliest_byte() -> None:
    model = random_model(5)
    text = end(run(model, ByteLevel(temperature=0), prompt_of(model, b"a"), max_tokens=4)).text
    so_far = b"a"
    for byte in text.encode():
        chances = {b: model.source.prefix(so_far + bytes([b])) for b in model.source.letters}
        assert chances[byte] == pytest.approx(max(chances.values()))
        so_far += bytes([byte])


def test_tokens_carry_bytes_and_their_logprobs() -> None:
    model = random_model(7)
    events = run(model, ByteLevel(negligible=0), prompt_of(model, b"ab"), logprobs=2, seed=4)
    so_far = b"ab"
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    assert tokens
    for token in tokens:
        assert len(token.bytes) == 1 and model.tokenizer.pieces[token.id] == token.bytes
        more = so_far + token.bytes
        exact = math.log(model.source.prefix(more) / model.source.prefix(so_far))
        assert token.raw_logprob == pytest.approx(exact, abs=1e-9)
        assert token.logprob == pytest.approx(exact, abs=1e-5)
        assert len(token.top) == 2 and token.top[0].raw_logprob >= token.top[1].raw_logprob
        so_far = more


def test_the_overlapping_token_shows_only_what_is_new() -> None:
    tokenizer = BpeTokenizer(b"abc", [(b"b", b"c"), (b"a", b"bc")])
    source = ByteSource(b"abc", 7, 0.0, np.random.default_rng(0), iid=[0.05, 0.05, 0.9])
    model = InducedModel(tokenizer, source)
    greedy = Chain((Temperature(t=0),))
    strategy = Cover(chain=greedy, inner=Sample(chain=greedy))
    events = run(model, strategy, prompt_of(model, b"cab"), max_tokens=2, logprobs=0)
    first = next(e for e in events if isinstance(e, TokenEvent))
    assert (model.tokenizer.pieces[first.id], first.bytes) == (b"abc", b"c")
    # P(c, abc) against P(c, a, b): 0.9 of their sum.
    assert first.raw_logprob == pytest.approx(math.log(0.9), abs=1e-6)
    assert end(events).text == "cc"


@pytest.mark.parametrize("strategy", [ByteLevel(), Cover(), TokenHealing()])
def test_going_on_from_a_text_equals_having_written_it(strategy: Any) -> None:
    """``resume`` after some tokens: the same law of what follows as in one go."""
    model = random_model(7)
    with Sessions(model) as sessions:
        request = Request(
            prompt=np.array(prompt_of(model, b"ab")),
            models=sessions.models,
            eos_ids=frozenset(),
            max_tokens=4,
            context=64,
        )
        session = sessions.prepare(strategy, name="t")["target"]
        rng = Rng(11)
        state, step = strategy.init(request, rng)
        shown: list[Token] = []
        history = [(list(shown), state)]
        while step.finish is None:
            out = {"target": session.forward(step.ask["target"])}
            state, step = strategy.step(state, out, rng)
            if step.edit is not None:
                shown[step.edit.keep :] = step.edit.tokens
                history.append((list(shown), state))
        for kept, _ in history[:-1]:
            again = list(kept)
            later, step = strategy.resume(state, again, rng)
            assert step.edit is None
            while step.finish is None:
                out = {"target": session.forward(step.ask["target"])}
                later, step = strategy.step(later, out, rng)
                if step.edit is not None:
                    again[step.edit.keep :] = step.edit.tokens
            assert [(t.id, t.piece) for t in again] == [(t.id, t.piece) for t in shown]


@pytest.mark.parametrize("strategy", [ByteLevel(), Cover()])
def test_the_cache_holds_what_a_fresh_prefill_would(strategy: Any) -> None:
    """After all its forks and rollbacks each row answers like a new one."""
    model = TableModel(order=3, tokenizer=None, seed=3)
    for seed in range(5):
        with Sessions(model) as sessions:
            request = Request(
                prompt=np.array([0, 4, 1]),
                models=sessions.models,
                eos_ids=frozenset(),
                max_tokens=6,
                context=64,
            )
            opened = sessions.prepare(strategy, name="t")
            list(decode(strategy, opened, request, Rng(seed)))
            session: Any = opened["target"]
            for row, tokens in enumerate(session.rows):
                assert session.row_tokens(row).tolist() == tokens


# -- what is refused -------------------------------------------------------------------------------


def test_other_strategies_go_on_after_the_cover() -> None:
    """Any strategy may be inside; none may be around, as the prompt's own tokens change."""
    model = random_model(7)
    inners = (BeamSearch(beams=2), BestOfN(n=2), Antislop(phrases=("ca", "bb")), Cover())
    for inner in inners:
        for seed in range(3):
            text = end(run(model, Cover(inner=inner), prompt_of(model, b"ab"), seed=seed)).text
            assert set(text.encode()) <= set(b"abc")
    with pytest.raises(UsageError, match="cannot be sent back"):
        Antislop(phrases=("ca",), inner=Cover())


def test_an_ensemble_in_the_loop() -> None:
    """Greedy bytes of two models are the likeliest under their mean."""
    first, second = random_model(3), random_model(5)
    strategy = ByteLevel(weights=(0.5, 0.5), temperature=0, negligible=0)
    events = run(first, strategy, prompt_of(first, b"a"), models={"second": second})
    so_far = b"a"
    for byte in end(events).text.encode():
        means = {
            b: np.mean(
                [
                    m.source.prefix(so_far + bytes([b])) / m.source.prefix(so_far)
                    for m in (first, second)
                ]
            )
            for b in b"abc"
        }
        assert means[byte] == pytest.approx(max(means.values()))
        so_far += bytes([byte])


def test_the_chain_shapes_bytes_and_covers() -> None:
    model = random_model(7)
    one = ByteLevel(chain=Chain((TopK(k=1),)))
    texts = {end(run(model, one, prompt_of(model, b"ab"), seed=s)).text for s in range(5)}
    assert len(texts) == 1
    assert texts == {end(run(model, ByteLevel(temperature=0), prompt_of(model, b"ab"))).text}
    chain = Chain((MinP(p=1.0), Penalties(repetition=1.1)))
    covered = Cover(chain=chain, inner=Sample(chain=chain))
    texts = {end(run(model, covered, prompt_of(model, b"ab"), seed=s)).text for s in range(5)}
    assert len(texts) == 1
