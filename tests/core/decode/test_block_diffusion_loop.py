"""Block diffusion in the loop: its cache, limits, figures and mistakes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from block_toys import MaskedModel
from toys import ToySession, ToyTransformer

from steersman.core.array import to_numpy
from steersman.core.decode import Antislop, BlockDiffusion, Sample
from steersman.core.decode.events import TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Token
from steersman.core.errors import BackendError, UsageError
from steersman.core.logits import (
    Chain,
    Mirostat,
    Penalties,
    Temperature,
    TopK,
    TopP,
)
from steersman.core.model import Forward, Output

from .block_diffusion_support import (
    GREEDY,
    HELLO,
    drive,
    end,
    notes,
    request_for,
    run,
    steady,
)

# -- the cache -------------------------------------------------------------------------------------


def test_the_cache_after_every_block_equals_a_fresh_prefill(lib: Any) -> None:
    model = ToyTransformer(lib.xp)
    for options in ({"threshold": 0.1}, {"threshold": 0.1, "credit": {}}, {"small_blocks": 2}):
        strategy = BlockDiffusion(block_length=4, chain=GREEDY, **options)  # type: ignore[arg-type]
        session = model.session(needs=strategy.requires["target"])
        text, commits = list(HELLO), 0
        for state, _, ask, out in drive(strategy, model, session, request_for(model, HELLO, 10)):
            if not ask.causal:
                assert ask.keep == len(text), "passes leave what is committed alone"
                assert strategy.cached(state) == len(text) <= len(state.progress.history)
                continue
            if ask.keep:
                text += ask.tokens[0].tolist()
                commits += 1
            assert session.row_tokens().tolist() == text
            with model.session() as fresh:
                want = fresh.forward(Forward(keep=0, tokens=[text])).logits
            np.testing.assert_array_equal(to_numpy(out.logits), to_numpy(want))
        assert commits == 2


def test_a_turn_after_a_cancelled_block_starts_clean() -> None:
    model = ToyTransformer()
    strategy = BlockDiffusion(block_length=6, chain=GREEDY)
    want = end(run(model, Sample(chain=GREEDY), max_tokens=12)).token_ids
    with Sessions(model) as kept:
        for calls in range(1, 9):
            request = request_for(model, HELLO, 12)
            ready = kept.prepare(strategy, name="t")
            cancel = functools.partial(next, iter([False] * calls), True)
            events = list(decode(strategy, ready, request, Rng(0), cancelled=cancel))
            assert end(events).reason == "cancelled"
            shown = [e.id for e in events if isinstance(e, TokenEvent)]
            assert list(end(events).token_ids) == shown
            again = list(decode(Sample(chain=GREEDY), ready, request, Rng(0)))
            assert end(again).token_ids == want


@pytest.mark.parametrize("cut", range(1, 10))
def test_resuming_equals_starting_with_the_text_as_prompt(cut: int) -> None:
    """Also inside a block, of which the cache holds only what was computed with masks in it."""
    model = ToyTransformer()
    strategy = BlockDiffusion(block_length=5, threshold=0.05, chain=GREEDY)
    request = request_for(model, HELLO, 14)
    session = model.session(needs=strategy.requires["target"])
    for state, step, _, out in drive(strategy, model, session, request):
        state, step = strategy.step(state, {"target": out}, Rng(0))
        if state.progress.count >= cut and not step.finish:
            break
    text = state.progress.history[len(HELLO) :][:cut].tolist()
    state, step = strategy.resume(state, [Token(id=i) for i in text], Rng(0))
    while not step.finish:
        assert step.edit is None or step.edit.keep == state.progress.count - len(step.edit.tokens)
        state, step = strategy.step(state, {"target": session.forward(step.ask["target"])}, Rng(0))
    want = run(model, strategy, prompt=(*HELLO, *text), max_tokens=14 - cut)
    assert tuple(state.progress.history[len(HELLO) :]) == (*text, *end(want).token_ids)


def test_a_strategy_that_goes_back_never_builds_on_an_open_block() -> None:
    """Antislop takes back what a block showed before it was committed."""
    held: list[int] = []

    class Watched(ToySession):
        def forward(self, ask: Forward) -> Output:
            if ask.causal:
                held.extend(t for t in self.row_tokens()[: int(np.max(ask.keep))] if t < 0)
            return super().forward(ask)

    model = ToyTransformer()
    model.session_class = Watched
    inner = BlockDiffusion(block_length=6)
    rewinds = 0
    for seed in range(4):
        text = end(run(model, inner, max_tokens=20, seed=seed)).token_ids
        letters = [chr(token) for token in text if 97 <= token < 123 or 65 <= token < 91]
        strategy = Antislop(inner=inner, phrases=(), regexes=tuple(letters[:6]))
        events = run(model, strategy, max_tokens=20, seed=seed)
        assert len(end(events).token_ids) == 20
        rewinds += sum("rewind" in note for note in notes(events))
    assert rewinds > 3
    assert not held


# -- limits, figures, mistakes ---------------------------------------------------------------------


def test_the_context_shortens_the_last_block() -> None:
    model = ToyTransformer()
    events = run(model, BlockDiffusion(block_length=8), max_tokens=11, context=5 + 11)
    assert len(end(events).token_ids) == 11
    assert notes(events)[-1] == {"block": 1, "passes": 2, "shortened": 3}


def test_every_library_chooses_the_same(lib: Any) -> None:
    strategy = BlockDiffusion(
        block_length=6,
        threshold=0.2,
        credit={},
        chain=Chain((Penalties(repetition=1.2), TopP(p=0.9), Temperature(t=0.7))),
    )
    want = run(ToyTransformer(), strategy, max_tokens=9, logprobs=2)
    got = run(ToyTransformer(lib.xp), strategy, max_tokens=9, logprobs=2)
    assert end(got).token_ids == end(want).token_ids
    pairs = zip(got, want, strict=True)
    for a, b in [(a, b) for a, b in pairs if isinstance(a, TokenEvent)]:
        assert isinstance(b, TokenEvent)
        assert a.raw_logprob == pytest.approx(b.raw_logprob, abs=1e-4)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [t.id for t in a.top] == [t.id for t in b.top]


def test_logprobs_are_those_of_the_pass_that_fixed_the_token() -> None:
    strategy = BlockDiffusion(block_length=3, algorithm="origin", chain=Chain((TopK(k=1),)))
    events = run(MaskedModel(guess=steady(0.8)), strategy, prompt=(0,), max_tokens=3, logprobs=2)
    for token in [e for e in events if isinstance(e, TokenEvent)][1:]:
        assert token.id == 0
        assert token.raw_logprob == pytest.approx(np.log(0.8), abs=1e-6)
        assert token.logprob == pytest.approx(0.0, abs=1e-6)
        assert [t.id for t in token.top] == [0, 1]
        assert token.top[1].raw_logprob == pytest.approx(np.log(0.15), abs=1e-6)


def test_the_trace_tells_what_credit_did() -> None:
    strategy = BlockDiffusion(block_length=4, credit={}, chain=Chain((TopK(k=2),)))
    events = run(MaskedModel(guess=steady(0.8)), strategy, prompt=(0,), max_tokens=4, trace=2)
    traces = [e.trace for e in events if isinstance(e, TokenEvent)]
    for trace in traces[1:]:
        assert trace is not None
        assert [s["name"] for s in trace["stages"]] == ["block_diffusion", "top_k"]
        assert trace["raw"]["top"][0] == [0, pytest.approx(0.8, abs=1e-5)]
        assert trace["stages"][0]["top"][0][1] > 0.8


def test_a_model_that_answers_nonsense_is_named() -> None:
    def broken(before: Sequence[int], block: Sequence[int]) -> np.ndarray:
        return np.full((len(block), 13), np.nan)

    for chain in (Chain(), GREEDY):
        with pytest.raises(BackendError, match="logits: row 0 holds nan"):
            run(
                MaskedModel(guess=broken),
                BlockDiffusion(block_length=3, chain=chain),
                prompt=(0,),
            )


def test_a_stage_with_state_begins_anew_at_every_masked_position() -> None:
    chain = Chain((Mirostat(tau=2.0),))
    events = run(ToyTransformer(), BlockDiffusion(block_length=4, chain=chain), max_tokens=10)
    assert len(end(events).token_ids) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 0}, r"block_diffusion: block_length must be an integer, in 1\.\.512"),
        ({"block_length": 513}, r"block_length must be an integer, in 1\.\.512, got 513"),
        ({"small_blocks": 3}, "small_blocks must divide block_length 32, got 3"),
        ({"algorithm": "random"}, "algorithm must be confidence_threshold, origin"),
        ({"threshold": 2}, r"threshold must be in \[-1, 1\], got 2"),
        ({"near_ties": 1}, r"near_ties must be in \[0, 0.01\], got 1"),
        ({"credit": {"alfa": 1}}, "credit: unknown key 'alfa'"),
        ({"mask": ""}, "mask must be auto, a token or its id, got ''"),
    ],
)
def test_bad_parameters_are_named(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BlockDiffusion(**options)
