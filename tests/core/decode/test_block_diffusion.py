"""Block diffusion on toys: exact distributions, bounds, caches, and the equalities it promises."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from block_toys import MASK, MaskedModel
from scipy import stats
from toys import ToySession, ToyTransformer

from steersman.core.array import to_numpy
from steersman.core.decode import Antislop, BlockDiffusion, Sample
from steersman.core.decode.block_diffusion.strategy import _State
from steersman.core.decode.events import Event, Finished, Note, TokenEvent, Withdrawn
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request, Step, Token
from steersman.core.errors import BackendError, UsageError
from steersman.core.logits import (
    Chain,
    LogitBias,
    Mirostat,
    Penalties,
    Processor,
    Temperature,
    TopK,
    TopP,
)
from steersman.core.model import Forward, Output

GREEDY = Chain((Temperature(t=0),))
ALGORITHMS = ("confidence_threshold", "origin", "entropy", "topk_margin")
HELLO = tuple(b"hello")
NONE: frozenset[int] = frozenset()


def request_for(model: Any, prompt: Sequence[int], max_tokens: int, **options: Any) -> Request:
    options = {"eos_ids": NONE, "context": model.info.context, **options}
    return Request(
        prompt=np.array(prompt), models={"target": model}, max_tokens=max_tokens, **options
    )


def run(
    model: Any,
    strategy: Any,
    *,
    prompt: Sequence[int] = HELLO,
    max_tokens: int = 8,
    seed: int = 0,
    **options: Any,
) -> list[Event]:
    with Sessions(model) as sessions:
        request = request_for(model, prompt, max_tokens, **options)
        return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def notes(events: list[Event]) -> list[Any]:
    return [e.values for e in events if isinstance(e, Note)]


def drive(
    strategy: BlockDiffusion, model: Any, session: Any, request: Request, seed: int = 0
) -> Iterator[tuple[_State, Step, Forward, Output]]:
    """Yield every call of one text: the state and step that asked, the call, and the answer."""
    state, step = strategy.init(request, Rng(seed))
    while step.ask:
        ask = step.ask["target"]
        out = session.forward(ask)
        yield state, step, ask, out
        state, step = strategy.step(state, {"target": out}, Rng(seed))
        if step.finish:
            return


# -- equal to sampling where it should be ----------------------------------------------------------


@pytest.mark.parametrize(
    "chain", [Chain(), GREEDY, Chain((Penalties(repetition=1.3), TopP(p=0.9)))]
)
def test_blocks_of_one_token_are_sampling(chain: Chain) -> None:
    model = ToyTransformer(layers=2)
    for seed in range(3):
        texts, calls = set(), []
        for strategy in (BlockDiffusion(block_length=1, chain=chain), Sample(chain=chain)):
            model.calls.clear()
            found = run(model, strategy, seed=seed, max_tokens=12, logprobs=2)
            shown = [(e.id, e.raw_logprob, e.logprob) for e in found if isinstance(e, TokenEvent)]
            texts.add(tuple(shown))
            calls.append(dict(model.calls))
        assert len(texts) == 1
        assert calls[0] == calls[1]


def test_blocks_of_one_token_need_nothing_but_logits() -> None:
    needs = BlockDiffusion(block_length=1).requires["target"]
    assert needs == Sample().requires["target"]
    assert needs in BlockDiffusion().requires["target"]


def test_samples_follow_the_models_joint_distribution() -> None:
    """Exact conditionals, one per pass, in an order that ignores what was drawn: exact texts."""
    model = MaskedModel(seed=3, sharpness=2.0)
    strategy = BlockDiffusion(block_length=3, algorithm="entropy")
    prompt, count = (0, 1), 600
    counts: dict[tuple[int, ...], int] = {}
    session = model.session(needs=strategy.requires["target"])
    for seed in range(count):
        *_, (state, _, _, out) = drive(
            strategy, model, session, request_for(model, prompt, 3), seed=seed
        )
        state, step = strategy.step(state, {"target": out}, Rng(seed))
        assert step.finish == "length"
        text = tuple(state.progress.history[len(prompt) :].tolist())
        counts[text] = counts.get(text, 0) + 1
    texts = all_texts(model, prompt, 3)
    assert set(counts) <= set(texts)
    expected, observed, rest = [], [], 0.0
    for text, p in texts.items():
        if p * count >= 5:
            expected.append(p * count)
            observed.append(counts.get(text, 0))
        else:
            rest += p * count
    expected.append(rest)
    observed.append(count - sum(observed))
    assert len(expected) > 15
    # Fixed seeds: a sound implementation fails once in ten thousand choices of them.
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4


def all_texts(
    model: MaskedModel, prompt: Sequence[int], length: int
) -> dict[tuple[int, ...], float]:
    """Return every text of ``length`` tokens and its probability; an end token ends none here."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        texts = {
            (*text, token): chance * float(p)
            for text, chance in texts.items()
            for token, p in enumerate(model.probs([*prompt, *text]))
            if p > 0
        }
    return texts


# -- a model that knows ------------------------------------------------------------------------


def knowing(length: int = 11, **options: Any) -> MaskedModel:
    """0, 1, 2 ... 10, then the end: everything is certain, in blocks too."""
    table = np.zeros((14, 13))
    order = [*range(length), 12, 0]
    for token, after in itertools.pairwise(order):
        table[token, after] = 1.0
    table[[i for i in range(14) if table[i].sum() == 0], 0] = 1.0
    return MaskedModel(table=table, **options)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("length", "parts"), [(1, 1), (2, 1), (4, 2), (6, 3), (8, 1), (32, 4)])
@pytest.mark.parametrize("shift", [True, False])
def test_a_model_that_knows_is_believed(
    algorithm: Any, length: int, parts: int, shift: bool
) -> None:
    model = knowing(shift=shift)
    for chain in (Chain(), GREEDY):
        strategy = BlockDiffusion(
            block_length=length,
            small_blocks=parts,
            algorithm=algorithm,
            label_shift=shift,
            chain=chain,
        )
        events = run(model, strategy, prompt=(0, 1), max_tokens=40, eos_ids=frozenset({12}))
        assert end(events).token_ids == tuple(range(2, 11))
        assert end(events).reason == "eos"
        cut = run(model, strategy, prompt=(0, 1), max_tokens=5, eos_ids=frozenset({12}))
        assert end(cut).token_ids == (2, 3, 4, 5, 6)
        assert end(cut).reason == "length"


def test_certain_blocks_take_one_pass_each() -> None:
    events = run(knowing(), BlockDiffusion(block_length=4), prompt=(0,), max_tokens=10)
    assert end(events).token_ids == tuple(range(1, 11))
    assert notes(events) == [
        {"block": 0, "passes": 1},
        {"block": 1, "passes": 1},
        {"block": 2, "passes": 1, "shortened": 2},
    ]
    # Passes, and two commits: nothing follows the last block.
    assert end(events).timings.calls == {"target": 5}


def test_an_end_token_ends_the_text_without_further_passes() -> None:
    model = knowing(length=3)  # 0 1 2 end
    strategy = BlockDiffusion(block_length=8, algorithm="origin", chain=GREEDY)
    events = run(model, strategy, prompt=(0,), max_tokens=30, eos_ids=frozenset({12}))
    assert end(events).token_ids == (1, 2)
    assert end(events).reason == "eos"
    # 2 and the end are fixed in two passes; the five positions after it never are.
    assert notes(events) == [{"block": 0, "passes": 2}]
    first = run(model, strategy, prompt=(0, 1, 2), max_tokens=30, eos_ids=frozenset({12}))
    assert end(first).token_ids == () and end(first).reason == "eos"
    assert notes(first) == [{"block": 0, "passes": 0}]


# -- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [Chain(), GREEDY])
def test_every_pass_fixes_something_and_touches_nothing_fixed(chain: Chain) -> None:
    model = MaskedModel(seed=1)
    for options in (
        {"threshold": 0.4},
        {"threshold": 0.4, "credit": {}},
        {"threshold": 0.4, "credit": "tuning_free", "small_blocks": 2},
        {"algorithm": "topk_margin", "small_blocks": 3},
        {"threshold": 0.5, "near_ties": 1e-5, "tempered": False},
    ):
        strategy = BlockDiffusion(block_length=6, chain=chain, **options)  # type: ignore[arg-type]
        model.asked.clear()
        events = run(model, strategy, prompt=(0, 1), max_tokens=15, seed=4)
        text = end(events).token_ids
        assert len(text) == 15 and MASK not in text
        for note in notes(events):
            length = note.get("shortened", 6)
            assert 1 <= note["passes"] <= length - 1
        assert sum(n["passes"] for n in notes(events)) == len(model.asked)
        begins = iter((0, 6, 12))
        before: tuple[int, ...] = ()
        for block in model.asked:
            if all(t == MASK for t in block[1:]):
                start = next(begins)
            else:
                assert sum(t == MASK for t in block) < sum(t == MASK for t in before)
                kept = [(a, b) for a, b in zip(before, block) if a != MASK]
                assert all(a == b for a, b in kept)
            before = block
            final = text[start : start + len(block)]
            assert all(t in (MASK, f) for t, f in zip(block, final, strict=True))


def test_small_blocks_are_finished_from_left_to_right() -> None:
    model = MaskedModel(seed=2)
    strategy = BlockDiffusion(block_length=6, small_blocks=3, threshold=-1, chain=GREEDY)
    events = run(model, strategy, prompt=(0, 1), max_tokens=6)
    assert notes(events) == [{"block": 0, "passes": 3}]
    assert [[t == MASK for t in block] for block in model.asked] == [
        [False, True, True, True, True, True],
        [False, False, True, True, True, True],
        [False, False, False, False, True, True],
    ]


@pytest.mark.parametrize("chain", [Chain(), GREEDY])
def test_a_threshold_of_one_is_one_per_pass_and_below_zero_all_at_once(chain: Chain) -> None:
    model = ToyTransformer()
    texts = {
        end(run(model, BlockDiffusion(block_length=6, chain=chain, **options), max_tokens=12))
        .token_ids
        for options in ({"threshold": 1.0}, {"algorithm": "origin"})
    }  # fmt: skip
    assert len(texts) == 1
    slow = run(model, BlockDiffusion(block_length=6, chain=chain, threshold=1.0), max_tokens=12)
    assert [n["passes"] for n in notes(slow)] == [5, 5]
    fast = run(model, BlockDiffusion(block_length=6, chain=chain, threshold=-0.1), max_tokens=12)
    assert [n["passes"] for n in notes(fast)] == [1, 1]


def test_shown_tokens_stand_and_appear_as_soon_as_they_do() -> None:
    """The prefix of a block that is fixed is shown before the block is finished."""
    vocab = 13

    def guess(before: Sequence[int], block: Sequence[int]) -> np.ndarray:
        sure = {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.7}  # fixed in the order 2, 3, 4, 1
        probs = np.full((len(block), vocab), 1e-9)
        for j in range(len(block)):
            probs[j] = (1 - sure.get(j, 0.5)) / vocab
            probs[j, j] += sure.get(j, 0.5)
        return probs

    strategy = BlockDiffusion(block_length=5, algorithm="origin", chain=GREEDY)
    events = run(MaskedModel(guess=guess), strategy, prompt=(0,), max_tokens=5)
    assert not [e for e in events if isinstance(e, Withdrawn)]
    assert end(events).token_ids[1:] == (1, 2, 3, 4)
    model, steps = MaskedModel(guess=guess), []
    session = model.session(needs=strategy.requires["target"])
    request = request_for(model, (0,), 10)
    for _, step, _, _ in drive(strategy, model, session, request):
        steps.append(0 if step.edit is None else len(step.edit.tokens))
    # The head's token; passes that fix 2, 3 and 4; the pass that fixes 1 shows all four.
    assert steps[:6] == [0, 1, 0, 0, 0, 4]
    mirrored = BlockDiffusion(block_length=5, small_blocks=5, chain=GREEDY)
    model = MaskedModel(guess=guess)
    session = model.session(needs=strategy.requires["target"])
    steps = [
        0 if step.edit is None else len(step.edit.tokens)
        for _, step, _, _ in drive(mirrored, model, session, request_for(model, (0,), 10))
    ]
    assert steps[:6] == [0, 1, 1, 1, 1, 1]


# -- credit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [Chain(), GREEDY, Chain((Penalties(repetition=1.2), TopK(k=3)))])
def test_credit_without_weight_is_no_credit_at_every_step(chain: Chain) -> None:
    for seed in range(4):
        asked, plain = MaskedModel(seed=seed), MaskedModel(seed=seed)
        options: dict[str, Any] = {"block_length": 6, "threshold": 0.5, "chain": chain}
        for model, credit in ((asked, {"alpha": 0.0}), (plain, False)):
            run(model, BlockDiffusion(credit=credit, **options), prompt=(0,), max_tokens=18)
        assert asked.asked == plain.asked


def steady(p: float) -> Any:
    """Return a guess that gives every position the same distribution, pass after pass."""

    def guess(before: Sequence[int], block: Sequence[int]) -> np.ndarray:
        probs = np.zeros((len(block), 13))
        probs[:, :3] = p, (1 - p) * 0.75, (1 - p) * 0.25
        return probs

    return guess


def test_a_steady_block_is_committed_at_the_third_pass() -> None:
    """p = .8 never passes .9 by itself; with credit it has .902833 after three passes."""
    rule = {"alpha": 0.7, "beta": 0.8, "gamma": 0.2}
    options: dict[str, Any] = {"block_length": 8, "threshold": 0.9, "chain": GREEDY}
    model = MaskedModel(guess=steady(0.8))
    plain = run(model, BlockDiffusion(**options), prompt=(0,), max_tokens=16)
    assert [n["passes"] for n in notes(plain)] == [7, 7]
    credit = run(model, BlockDiffusion(credit=rule, **options), prompt=(0,), max_tokens=16)
    assert [n["passes"] for n in notes(credit)] == [3, 3], "each block begins without credit"
    assert end(credit).token_ids[1:8] == (0,) * 7
    # The smallest p that ever gets there is .727103; 40 positions leave time to.
    for p, reaches in ((0.7272, True), (0.7270, False)):
        strategy = BlockDiffusion(block_length=64, threshold=0.9, credit=rule, chain=GREEDY)
        events = run(MaskedModel(guess=steady(p)), strategy, prompt=(0,), max_tokens=64)
        assert (notes(events)[0]["passes"] < 63) == reaches


def test_credit_is_kept_within_a_block_only_and_forgotten_once_fixed() -> None:
    model = ToyTransformer()
    strategy = BlockDiffusion(block_length=6, algorithm="origin", credit={})
    session = model.session(needs=strategy.requires["target"])
    sizes = []
    for state, _, ask, _ in drive(strategy, model, session, request_for(model, HELLO, 18)):
        if ask.causal or state.block is None:
            continue
        held = state.block.credits.held
        sizes.append(len(held))
        assert all(1 <= len(row) <= state.block.passes for row in held.values())
        fresh = state.block.passes == 0
        assert fresh == (not held)
    assert sizes == [0, 5, 4, 3, 2] * 3


def test_tuning_free_credit_takes_a_first_plain_step() -> None:
    for seed in range(4):
        first = []
        for credit in ("tuning_free", False):
            model = MaskedModel(seed=seed)
            strategy = BlockDiffusion(block_length=6, threshold=0.4, credit=credit, chain=GREEDY)
            run(model, strategy, prompt=(0,), max_tokens=6)
            first.append(model.asked[:2])
        assert first[0] == first[1]


def test_forbidden_tokens_earn_no_credit() -> None:
    """Token 0 leads everywhere; a bias or a processor forbids it before credit is given."""

    def forbid(history: Any, logits: Any) -> Any:
        logits = np.array(logits)
        logits[..., 0] = -np.inf
        return logits

    for stage in (LogitBias(bias={0: -np.inf}), Processor(function=forbid, convention="llamacpp")):
        strategy = BlockDiffusion(block_length=6, credit={}, chain=Chain((stage, Temperature(t=0))))
        model = MaskedModel(guess=steady(0.8))
        session = model.session(needs=strategy.requires["target"])
        seen = set()
        for state, _, _, _ in drive(strategy, model, session, request_for(model, (1,), 12)):
            if state.block is not None:
                seen |= {v for row in state.block.credits.held.values() for v in row}
        assert seen == {1}


def test_stages_see_what_is_fixed_to_the_left() -> None:
    histories: list[list[int]] = []

    def watch(history: Any, logits: Any) -> Any:
        histories.append([int(t) for t in np.asarray(history).reshape(-1)])
        return logits

    chain = Chain((Processor(function=watch, convention="llamacpp"), Temperature(t=0)))
    strategy = BlockDiffusion(block_length=4, algorithm="origin", chain=chain)
    events = run(knowing(), strategy, prompt=(0,), max_tokens=4)
    assert end(events).token_ids == (1, 2, 3, 4)
    # The head's turn; three masked positions behind 1; then those that are left.
    assert histories == [[0], [0, 1], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_confidence_before_or_after_the_temperature() -> None:
    """At a low temperature every draw looks sure; the model's own confidence does not change."""
    options: dict[str, Any] = {"block_length": 8, "threshold": 0.9}
    chain = Chain((Temperature(t=0.2),))
    passes = []
    for tempered in (True, False):
        strategy = BlockDiffusion(tempered=tempered, chain=chain, **options)
        events = run(MaskedModel(guess=steady(0.8)), strategy, prompt=(0,), max_tokens=8)
        passes.append(notes(events)[0]["passes"])
    assert passes == [1, 7]


# -- the cache -----------------------------------------------------------------------------------


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


# -- limits, figures, mistakes -------------------------------------------------------------------


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
