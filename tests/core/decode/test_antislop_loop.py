"""Antislop in the loop: what a listener sees, going back in caches, and other strategies inside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToyTransformer, reference

from steersman.core import generate
from steersman.core.array import to_numpy
from steersman.core.decode import STRATEGIES, Antislop, Sample
from steersman.core.decode.events import TokenEvent, Withdrawn
from steersman.core.decode.rng import Rng
from steersman.core.decode.sample import Progress
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request, Token
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, Penalties, Temperature, TopK
from steersman.core.model import Forward, Output

from .antislop_support import (
    GREEDY,
    NO_EOS,
    Bursts,
    brute_force,
    end,
    letters,
    notes,
    run,
)

# -- what a listener sees --------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Sample(), Bursts(size=3)])
def test_held_back_text_is_never_withdrawn(inner: Any) -> None:
    model = letters({"a": 0.3, "b": 0.2, " ": 0.3, ".": 0.1, "ab": 0.1})
    strategy = Antislop(phrases=("a b", "ab a", "b.a"), inner=inner)
    withdrawn = 0
    for seed in range(40):
        open_, held = (
            run(model, replace(strategy, hold_back=h), max_tokens=25, seed=seed, eos=NO_EOS)
            for h in (False, True)
        )
        assert not any(isinstance(e, Withdrawn) for e in held)
        withdrawn += any(isinstance(e, Withdrawn) for e in open_)
        assert end(open_).token_ids == end(held).token_ids
        assert end(open_).text == end(held).text
        text, tokens = "", []
        for event in held:
            if isinstance(event, TokenEvent):
                text += event.text
                tokens.append(event.id)
        assert text + end(held).tail == end(held).text and tuple(tokens) == end(held).token_ids
    assert withdrawn > 5


def test_held_back_text_comes_before_the_end() -> None:
    events = run(letters({"x": 1.0}), Antislop(phrases=("abcd",), hold_back=True), eos=NO_EOS)
    first = next(i for i, e in enumerate(events) if isinstance(e, TokenEvent))
    assert first < len(events) - 12 + 5


def test_logprobs_of_a_token_drawn_again() -> None:
    model = letters({"-": 0.5, "a": 0.3, "b": 0.2})
    strategy = Antislop(phrases=("-",), factor=0.0, chain=Chain((TopK(k=2),)))
    events = run(model, strategy, max_tokens=1, eos=NO_EOS, logprobs=2, seed=1)
    assert notes(events, "rewind")
    (token,) = [e for e in events if isinstance(e, TokenEvent)]
    assert token.raw_logprob == pytest.approx(np.log(0.3), abs=1e-5)
    assert token.logprob == pytest.approx(0.0, abs=1e-6)  # of "-" and "a" only "a" is left
    assert [a.id for a in token.top] == [0, 1]


@pytest.mark.parametrize(("chain", "place"), [(Chain((TopK(k=2),)), 1), (GREEDY, 0)])
def test_a_trace_tells_what_the_ban_did(chain: Chain, place: int) -> None:
    model = letters({"-": 0.5, "a": 0.3, "b": 0.2})
    strategy = Antislop(phrases=("-",), chain=chain, variants=False)
    for seed in range(5):
        state, _ = strategy.init(
            Request(
                prompt=np.array([0]),
                models={"target": model},
                eos_ids=NO_EOS,
                max_tokens=1,
                context=9,
                trace=3,
            ),
            Rng(seed),
        )
        out = {"target": Output(logits=np.log(model.table[None] + 1e-30).astype(np.float32))}
        state, step = strategy.step(state, out, Rng(seed))
        if step.edit is None:
            state, step = strategy.step(state, out, Rng(seed))
            assert step.edit is not None
            (token,) = step.edit.tokens
            assert token.trace is not None
            ban = token.trace["stages"][place]
            assert ban["name"] == "antislop" and token.id == 1
            assert ban["removed"] == pytest.approx([0.5, 0.625][place], abs=1e-5)


def test_a_listener_can_follow_every_edit() -> None:
    model = TableModel(order=2, seed=1)
    for seed in range(20):
        ids: list[int] = []
        events = run(model, Antislop(phrases=("a b", "b.", "c"), inner=Bursts()), seed=seed)
        for event in events:
            if isinstance(event, Withdrawn):
                del ids[event.keep :]
            elif isinstance(event, TokenEvent):
                assert event.index == len(ids)
                ids.append(event.id)
        assert tuple(ids) == end(events).token_ids
        assert len(notes(events, "burst")) >= len(ids) // 3


# -- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Sample(), Bursts(size=3)])
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_the_cache_is_that_of_a_fresh_start(inner: Any, factor: float) -> None:
    model = ToyTransformer(layers=2)
    prompt = tuple(b"once upon")
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 40, "eos": NO_EOS, "seed": 2}
    # What ends the text must go at least once, and with a factor some hits must stay.
    strategy = Antislop(regexes=("[a-z].{2}",), factor=factor, acceptance="draw", inner=inner)
    with Sessions(model) as sessions:
        events = run(model, strategy, sessions=sessions, **options)
        assert notes(events, "rewind") or notes(events, "accepted")
        session = sessions.prepare(strategy, name="t")["target"]
        text = [*prompt, *end(events).token_ids]
        keep = min(session.common_prefix(np.array(text)), len(text) - 1)
        assert keep >= len(text) - 4
        ask = Forward(keep=keep, tokens=np.array([text[keep:]]))
        got = to_numpy(session.forward(ask).logits)[0]
    np.testing.assert_allclose(got, reference(model, text)[0][-1], atol=1e-4)


def test_every_token_has_the_probability_of_its_place() -> None:
    """Whatever went before: each raw log-probability is that of the final text."""
    model = TableModel(order=2, seed=7)
    for seed in range(15):
        strategy = Antislop(phrases=("a", "b"), ngrams=("c d",), factor=0.2, inner=Bursts())
        events = run(model, strategy, seed=seed, logprobs=0)
        tokens: list[TokenEvent] = []
        for event in events:
            if isinstance(event, Withdrawn):
                del tokens[event.keep :]
            elif isinstance(event, TokenEvent):
                tokens.append(event)
        history = [0]
        for token in tokens:
            exact = np.log(model.probs(history)[token.id])
            assert token.raw_logprob == pytest.approx(exact, abs=1e-5)
            history.append(token.id)


def test_penalties_see_the_text_that_stands() -> None:
    """The chain works on the history before the position, not on what was taken back."""
    model = letters({"a": 0.4, ".": 0.35, "-": 0.25})
    chain = Chain((Penalties(presence=1.0), Temperature(t=0)))
    events = run(
        model, Antislop(phrases=("a.",), chain=chain), prompt=(4,), max_tokens=2, eos=NO_EOS
    )
    # "a" then "." is a hit; without "a" the likeliest is ".", and after it "a" again.
    assert end(events).text == ".a"


# -- composition -----------------------------------------------------------------------------------


def test_antislop_around_antislop() -> None:
    model = TableModel(order=1, seed=5)
    both = Antislop(phrases=("a", "b "), inner=Antislop(phrases=("c", "d")))
    for seed in range(20):
        events = run(model, both, seed=seed, max_tokens=15)
        gone = {fact["rule"] for fact in notes(events, "suppressed")}
        found = set(brute_force(end(events).text, ("a", "b ", "c", "d")))
        # The outer one draws anew without asking the inner one; everything after is seen by both.
        assert found & {"a", "b "} <= gone


def test_strategies_that_cannot_resume_are_refused() -> None:
    """Also those whose cache is not simply the text's tokens."""
    for other in ("beam", "soft_thinking", "byte_level", "token_healing"):
        with pytest.raises(UsageError, match="antislop: inner .* cannot be sent back .*: sample"):
            Antislop(inner=STRATEGIES[other]())


@pytest.mark.parametrize("name", ["prompt_lookup", "stand", "speculative", "spectr"])
def test_around_speculation_a_greedy_text_is_the_same(name: str) -> None:
    rules: dict[str, Any] = {"regexes": ("[b-z .]{2}", "[^a-z]{3}"), "phrases": ("e", "th", "a b")}
    for model, prompt in (
        (TableModel(order=2, seed=3), (0, 1, 2)),
        (ToyTransformer(layers=2), tuple(b"the sea the sea")),
    ):
        texts, rewinds = [], 0
        for inner in (Sample(), STRATEGIES[name]()):
            strategy = Antislop(chain=GREEDY, inner=inner, **rules)
            with Sessions({role: model for role in strategy.requires}) as sessions:
                events = run(
                    model, strategy, prompt=prompt, max_tokens=30, eos=NO_EOS, sessions=sessions
                )
            texts.append(end(events).token_ids)
            rewinds += len(notes(events, "rewind"))
        assert texts[0] == texts[1] and rewinds > 4


def test_the_chain_is_shared() -> None:
    chain = Chain((TopK(k=3),))
    assert Antislop(chain=chain).inner.chain == chain
    assert Antislop(inner=Sample(chain=chain)).chain == chain


def test_resuming_forgets_what_went() -> None:
    model = TableModel(order=1, seed=5)
    with Sessions(model) as sessions:
        request = Request(
            prompt=np.array([0]), models=sessions.models, eos_ids=NO_EOS, max_tokens=9, context=64
        )
        strategy = Antislop(phrases=("a",))
        state, _ = strategy.init(request, Rng(0))
        state, step = strategy.resume(state, [Token(id=1), Token(id=2)], Rng(0))
        assert step.edit is None and len(state.text) == 2 == state.shown
        assert isinstance(state.inner, Progress) and state.inner.count == 2


@pytest.mark.weights
def test_on_real_weights(engine_model: Any) -> None:
    from steersman.core.profile import load_profile

    profile = load_profile("greedy").override({"strategy": "antislop"})
    options: dict[str, Any] = {"max_tokens": 10, "logprobs": 3, "seed": 1}
    plain = generate(engine_model, "The capital of France is", profile=profile, **options)
    assert " Paris" in plain.text
    banned = profile.override({"antislop.phrases": ["Paris"]})
    with Sessions(engine_model) as sessions:
        found = generate(
            engine_model, "The capital of France is", profile=banned, session=sessions, **options
        )
        assert "paris" not in found.text.lower()
        # The cache that went back answers like a fresh one.
        prompt = "The capital of France is" + found.text
        here, afresh = (
            generate(engine_model, prompt, profile="greedy", session=s, max_tokens=1, logprobs=5)
            for s in (sessions, None)
        )
    tolerance = 1e-4 if engine_model.info.batch_invariant else 1e-3
    expected = {a.id: a.raw_logprob for a in afresh.tokens[0].top}
    assert {a.id: a.raw_logprob for a in here.tokens[0].top} == pytest.approx(
        expected, abs=tolerance
    )
    assert here.timings.cached_tokens > 5
