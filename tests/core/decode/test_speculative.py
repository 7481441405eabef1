"""Prompt lookup and STAND: the same texts as plain sampling, sooner."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToyTransformer, small_tokenizer

from steersman.core.array import to_numpy
from steersman.core.decode import Sample
from steersman.core.decode.events import Event, Note, TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.speculative import memory as memories
from steersman.core.decode.speculative.ngram import NgramTable
from steersman.core.decode.speculative.prompt_lookup import PromptLookup, copied, find_match
from steersman.core.decode.speculative.stand import STAND
from steersman.core.decode.speculative.tree import ask_again
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, MinP, Mirostat, Penalties, Temperature, TopP
from steersman.core.model import Capability

from .speculative_support import NEVER, end, request_of, wrong_table

CHAINS = {
    "none": Chain(),
    "greedy": Chain((Temperature(t=0),)),
    "greedy-penalty": Chain((Penalties(repetition=1.5, last_n=-1), Temperature(t=0))),
    "top-p": Chain((TopP(p=0.8), Temperature(t=0.7))),
    "penalty": Chain((Penalties(repetition=1.4, presence=0.3, last_n=8), MinP(p=0.02))),
    "mirostat": Chain((Mirostat(tau=2.0),)),
    "by-definition": Chain((TopP(p=0.8), Temperature(t=0.7)), fused=False),
}


def run(
    model: Any,
    strategy: Any,
    *,
    prompt: tuple[int, ...] = (0, 1, 2),
    max_tokens: int,
    eos: frozenset[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Event]:
    with Sessions(model) as sessions:
        request = request_of(model, prompt, max_tokens, **options)
        request = replace(request, eos_ids=model.tokenizer.eos_ids if eos is None else eos)
        return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def tokens_of(events: list[Event]) -> list[TokenEvent]:
    return [event for event in events if isinstance(event, TokenEvent)]


def strategies(chain: Chain, **options: Any) -> list[Any]:
    return [
        PromptLookup(chain=chain, shortest=1, **options),
        STAND(chain=chain, **options),
        STAND(chain=chain, branches=1, share="request", **options),
        STAND(chain=chain, branches=10, nodes=40, depth=4, **options),
    ]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_the_text_is_that_of_plain_sampling(name: str, adaptive: bool) -> None:
    model, plain = (TableModel(order=2, seed=4, sharpness=2.5) for _ in range(2))
    memories.remember(model, CHAINS[name], wrong_table(13))
    for seed in range(3):
        want = run(plain, Sample(chain=CHAINS[name]), max_tokens=40, seed=seed)
        for strategy in strategies(CHAINS[name], adaptive=adaptive):
            found = run(model, strategy, max_tokens=40, seed=seed)
            assert end(found).token_ids == end(want).token_ids
            assert end(found).reason == end(want).reason


@pytest.mark.parametrize("row", [0, 3])
def test_logprobs_and_alternatives_are_those_of_plain_sampling(row: int) -> None:
    chain = CHAINS["penalty"]
    model = ToyTransformer()
    prompt = tuple(b"a rose is a rose is a rose")
    want = run(model, Sample(chain=chain), prompt=prompt, max_tokens=20, logprobs=2, row=row)
    for strategy in strategies(chain, adaptive=False):
        found = run(model, strategy, prompt=prompt, max_tokens=20, logprobs=2, row=row)
        for a, b in zip(tokens_of(found), tokens_of(want), strict=True):
            assert (a.id, [t.id for t in a.top]) == (b.id, [t.id for t in b.top])
            assert a.raw_logprob == pytest.approx(b.raw_logprob, abs=1e-5)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert end(found).token_ids == end(want).token_ids


def test_drafts_save_calls_and_say_so() -> None:
    model = TableModel(order=2, seed=1, sharpness=12)  # all but certain of what comes next
    for strategy in strategies(Chain(), adaptive=False):
        events = run(model, strategy, max_tokens=60, eos=NEVER)
        calls = end(events).timings.calls["target"]
        notes = [e.values for e in events if isinstance(e, Note)]
        assert calls < 45
        # Every call confirms one token more than it accepts, but for one that hits the limit.
        assert 59 <= calls + sum(n["accepted"] for n in notes) <= 60
        assert all(0 <= n["accepted"] <= n["drafted"] for n in notes)
        assert all(len(n["rejected"]) == min(n["drafted"] - n["accepted"], 32) for n in notes)


@pytest.mark.parametrize("length", range(1, 9))
def test_limits_are_kept_inside_an_accepted_path(length: int) -> None:
    model = TableModel(order=2, seed=1, sharpness=12)
    for strategy in strategies(Chain(), adaptive=False):
        for _ in range(2):  # the second time the table is warm
            found = end(run(model, strategy, max_tokens=length, eos=NEVER))
            assert (len(found.token_ids), found.reason) == (length, "length")
        # The context ends where the text must.
        with Sessions(model, context=3 + length) as sessions:
            request = request_of(model, (0, 1, 2), length, context=3 + length)
            ready = sessions.prepare(strategy, name="t")
            assert end(list(decode(strategy, ready, request, Rng(0)))).token_ids == found.token_ids


def test_an_end_token_inside_an_accepted_path_ends_the_text() -> None:
    model = TableModel(order=2, seed=1, sharpness=12)
    text = end(run(model, Sample(), max_tokens=30, eos=NEVER)).token_ids
    for stop in set(text):
        want = text[: text.index(stop)]
        for strategy in strategies(Chain(), adaptive=False):
            for _ in range(2):
                found = end(run(model, strategy, max_tokens=30, eos=frozenset({stop})))
                assert (found.token_ids, found.reason) == (want, "eos")


# -- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_the_cache_after_every_round_equals_a_fresh_start(rule: Any) -> None:
    model, prompt = ToyTransformer(tokenizer=small_tokenizer()), (1, 2, 3, 1, 2, 3, 1)
    memories.remember(model, Chain(), wrong_table(13))
    for strategy in (PromptLookup(adaptive=False, shortest=1), STAND(adaptive=False, verify=rule)):
        request, rng = request_of(model, prompt, 24), Rng(3)
        with Sessions(model) as sessions:
            session = sessions.prepare(strategy, name="t")["target"]
            state, step = strategy.init(request, rng)
            text, drafted = list(prompt), 0
            while step.ask:
                ask = step.ask["target"]
                out = session.forward(ask)
                width = np.asarray(ask.tokens).shape[1]
                drafted += width - 1 if text != list(prompt) else 0
                with model.session() as fresh:
                    want = to_numpy(
                        fresh.forward(ask_again(request.prompt, 0, np.array(text))).logits
                    )
                root = to_numpy(out.logits)
                root = root[0, 0] if root.ndim == 3 else root[0]
                np.testing.assert_allclose(root, want[0], atol=1e-4)
                state, step = strategy.step(state, {"target": out}, rng)
                assert step.edit is not None
                text = text[: len(prompt) + step.edit.keep] + [t.id for t in step.edit.tokens]
        assert drafted > 5


@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_resuming_anywhere_goes_on_like_a_fresh_text(rule: Any) -> None:
    model, prompt = ToyTransformer(tokenizer=small_tokenizer()), (1, 2, 3, 1, 2, 3, 1)
    memories.remember(model, Chain(), wrong_table(13))
    for strategy in (PromptLookup(adaptive=False, shortest=1), STAND(adaptive=False, verify=rule)):
        request, rng = request_of(model, prompt, 40), Rng(5)
        with Sessions(model) as sessions:
            session = sessions.prepare(strategy, name="t")["target"]
            state, step = strategy.init(request, rng)
            tokens: list[Any] = []
            for turn in range(12):
                out = session.forward(step.ask["target"])
                state, step = strategy.step(state, {"target": out}, rng)
                assert step.edit is not None
                tokens = [*tokens[: step.edit.keep], *step.edit.tokens]
                if turn % 3 == 2:
                    # Back by a few tokens, and another one instead; the call asked for is not made.
                    keep = max(0, len(tokens) - 2 - turn // 3)
                    tokens = [*tokens[:keep], tokens[0]]
                    state, step = strategy.resume(state, tokens, rng)
                    assert step.edit is None
                    out = session.forward(step.ask["target"])
                    text = np.array([*prompt, *(t.id for t in tokens)])
                    with model.session() as fresh:
                        want = fresh.forward(ask_again(text, 0, text))
                    np.testing.assert_allclose(
                        to_numpy(out.logits), to_numpy(want.logits), atol=1e-4
                    )
                    state, step = strategy.step(state, {"target": out}, rng)
                    assert step.edit is not None
                    assert step.edit.keep == len(tokens)
                    tokens = [*tokens, *step.edit.tokens]


def test_a_chain_of_drafts_needs_no_trees() -> None:
    for strategy in (PromptLookup(), STAND(branches=1)):
        assert Capability.TREE not in strategy.requires["target"]
        assert strategy.max_rows == 1
        model = TableModel(order=2, without=Capability.TREE | Capability.ROWS | Capability.FORK)
        assert end(run(model, strategy, max_tokens=20, eos=NEVER)).reason == "length"
        assert model.calls["tree"] == 0
    assert Capability.TREE in STAND().requires["target"]


# -- what is remembered ----------------------------------------------------------------------------


def test_the_second_text_of_a_prompt_comes_in_fewer_calls_than_the_first() -> None:
    model = TableModel(order=3, seed=1, sharpness=2.5)
    shared = STAND(adaptive=False, prompt=False)
    calls = []
    for _ in range(2):
        found = end(run(model, shared, max_tokens=60, eos=NEVER, seed=9))
        calls.append(found.timings.calls["target"])
    assert calls[1] < 0.5 * calls[0]
    alone = STAND(adaptive=False, prompt=False, share="request")
    again = end(run(model, alone, max_tokens=60, eos=NEVER, seed=9))
    assert again.timings.calls["target"] == calls[0]
    memories.forget(model)
    again = end(run(model, shared, max_tokens=60, eos=NEVER, seed=9))
    assert again.timings.calls["target"] == calls[0]


def test_tables_belong_to_a_model_and_a_chain() -> None:
    model, other = TableModel(), TableModel()
    warm, cold = Chain((Temperature(t=0.7),)), Chain((Temperature(t=0.2),))
    table = memories.memory_of(model, warm, 1000).table
    assert memories.memory_of(model, Chain((Temperature(t=0.7),)), 1000).table is table
    assert memories.memory_of(model, cold, 1000).table is not table
    assert memories.memory_of(other, warm, 1000).table is not table
    for t in range(1, 8):  # only the last few chains of a model are remembered
        memories.memory_of(model, Chain((Temperature(t=float(t)),)), 1000)
    assert memories.memory_of(model, warm, 1000).table is not table
    made = memories.made_with(model, warm)
    assert made != memories.made_with(model, cold)
    assert set(made) == {"model", "tokenizer", "chain"}


def test_a_saved_table_goes_on_where_it_was(tmp_path: Path) -> None:
    model, chain = TableModel(order=3, seed=1, sharpness=2.5), Chain()
    strategy = STAND(adaptive=False, prompt=False)
    cold = end(run(model, strategy, max_tokens=60, eos=NEVER, seed=9)).timings.calls
    made = memories.made_with(model, chain)
    memories.memory_of(model, chain, 1000).table.save(tmp_path / "t.npz", made)
    memories.forget(model)
    memories.remember(model, chain, NgramTable.load(tmp_path / "t.npz", made))
    again = end(run(model, strategy, max_tokens=60, eos=NEVER, seed=9))
    assert again.timings.calls["target"] < 0.5 * cold["target"]


def test_threads_share_a_table() -> None:
    model = TableModel(order=2, seed=1, sharpness=2.5)
    want = [end(run(model, Sample(), max_tokens=30, eos=NEVER, seed=s)).token_ids for s in range(8)]
    found: dict[int, tuple[int, ...]] = {}
    strategy = STAND(adaptive=False, entries=1000)

    def work(seed: int) -> None:
        for _ in range(3):
            found[seed] = end(run(model, strategy, max_tokens=30, eos=NEVER, seed=seed)).token_ids

    threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[s] for s in range(8)] == want


# -- what is copied --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ([1, 2, 3, 9, 1, 2, 3], (3, 3)),
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], (3, 3)),  # the longest match, not the last one
        ([2, 3, 9, 2, 3, 8, 7, 2, 3], (5, 2)),  # the last one among equals
        ([5, 5, 5, 5], (3, 3)),
        ([1, 2, 3], None),
        ([3, 1, 3], None),  # one token agrees, two are asked for
        ([1], None),
        ([], None),
    ],
)
def test_matches_by_hand(text: list[int], found: Any) -> None:
    assert find_match(np.array(text, np.int64), 2, 8) == found


def test_matches_equal_the_definition() -> None:
    random = np.random.default_rng(3)
    for _ in range(300):
        text = random.integers(0, 3, size=int(random.integers(1, 14)))
        best = None
        for start in range(1, len(text)):
            length = 0
            while length < min(5, start) and text[start - 1 - length] == text[-1 - length]:
                length += 1
            if length >= 2 and (best is None or length >= best[1]):
                best = (start, length)
        assert find_match(text, 2, 5) == best


def test_a_copy_that_runs_past_the_end_repeats_the_period() -> None:
    assert copied(np.array([7, 1, 2, 1, 2]), 3, 5).tolist() == [1, 2, 1, 2, 1]
    assert copied(np.array([7, 1, 2, 3]), 1, 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PromptLookup(length=0), r"prompt_lookup: length must be in 1\.\.63, got 0"),
        (lambda: PromptLookup(shortest=0), r"prompt_lookup: shortest must be"),
        (lambda: PromptLookup(shortest=4, longest=3), r"prompt_lookup: longest must be in 4"),
        (lambda: STAND(nodes=64), r"stand: nodes must be an integer, in 1\.\.63, got 64"),
        (lambda: STAND(branches=11), r"stand: branches must be"),
        (lambda: STAND(entries=1), r"stand: entries must be"),
        (lambda: STAND(verify="luck"), r"stand: verify must be match or rejection, got 'luck'"),
        (lambda: STAND(share="all"), r"stand: share must be model or request, got 'all'"),
    ],
)
def test_bad_parameters_are_named(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
