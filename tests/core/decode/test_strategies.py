"""Beam search, best-of-n, contrastive search and DoLa against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToyTransformer, enumerate_texts, reference

from steersman.core.array import to_numpy
from steersman.core.decode import (
    STRATEGIES,
    BeamSearch,
    BestOfN,
    ContrastiveSearch,
    DoLa,
    Sample,
)
from steersman.core.decode.dola import contrast_layers
from steersman.core.decode.events import Event, Finished, Note, TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, Mirostat, Penalties, Temperature, TopK

GREEDY = Sample(chain=Chain((Temperature(t=0),)))
PROMPT = (0, 1, 2)


def run(
    model: Any,
    strategy: Any,
    *,
    prompt: tuple[int, ...] = PROMPT,
    max_tokens: int = 8,
    eos: frozenset[int] | None = None,
    seed: int = 0,
    row: int = 0,
    logprobs: int | None = None,
) -> list[Event]:
    with Sessions(every_role(model, strategy)) as sessions:
        target = sessions.target
        request = Request(
            prompt=np.array(prompt),
            models=sessions.models,
            eos_ids=target.tokenizer.eos_ids if eos is None else eos,
            max_tokens=max_tokens,
            context=target.info.context,
            logprobs=logprobs,
            row=row,
        )
        return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def every_role(model: Any, *strategies: Any) -> dict[str, Any]:
    """Return ``model`` in every role of the strategies; a dict says itself who plays what."""
    if isinstance(model, dict):
        return model
    return dict.fromkeys(["target", *(role for s in strategies for role in s.requires)], model)


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


# -- beam search ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beam_finds_the_best_text_of_all(seed: int, length_penalty: float) -> None:
    model = TableModel(order=2, seed=seed)
    best, best_score = (), -np.inf
    for text, chance in enumerate_texts(model, PROMPT, 2):
        score = np.log(chance) / len(text) ** length_penalty
        if score > best_score:
            best, best_score = text, score
    found = end(run(model, BeamSearch(beams=128, length_penalty=length_penalty), max_tokens=2))
    assert found.token_ids == tuple(t for t in best if t not in model.tokenizer.eos_ids)


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy(seed: int) -> None:
    model = TableModel(order=2, seed=seed)
    assert end(run(model, BeamSearch(beams=1))).token_ids == end(run(model, GREEDY)).token_ids


@pytest.mark.parametrize("seed", range(4))
def test_beams_never_find_a_less_likely_text_than_greedy_at_full_length(seed: int) -> None:
    model = TableModel(order=2, seed=seed)
    none: frozenset[int] = frozenset()
    greedy = end(run(model, GREEDY, eos=none)).token_ids
    # 13 beams hold every one-token text, so the greedy one is always among the survivors here.
    beam = end(run(model, BeamSearch(beams=13), eos=none)).token_ids
    assert model.probability(beam, PROMPT) >= model.probability(greedy, PROMPT) * (1 - 1e-6)


def test_beam_reports_logprobs_of_its_tokens() -> None:
    model = TableModel(order=2, seed=2)
    events = run(model, BeamSearch(beams=3), logprobs=0)
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    text = list(PROMPT)
    for token in tokens:
        exact = np.log(model.probs(text)[token.id])
        assert token.raw_logprob == pytest.approx(exact, abs=1e-5)
        assert token.logprob == pytest.approx(exact, abs=1e-4)
        text.append(token.id)
    assert tuple(t.id for t in tokens) == end(events).token_ids


def test_early_stopping_ends_no_later() -> None:
    for seed in range(6):
        model, other = TableModel(order=2, seed=seed), TableModel(order=2, seed=seed)
        run(model, BeamSearch(beams=2, early_stopping=True), max_tokens=30)
        run(other, BeamSearch(beams=2), max_tokens=30)
        assert model.calls["forward"] <= other.calls["forward"]


# -- best of n -----------------------------------------------------------------------------------


def test_best_of_one_is_sampling() -> None:
    model = TableModel(order=2)
    for seed in range(5):
        one = end(run(model, BestOfN(n=1), seed=seed))
        assert one.token_ids == end(run(model, Sample(), seed=seed)).token_ids


def test_the_candidates_are_the_rows_texts_and_the_best_wins() -> None:
    model = TableModel(order=2)
    for seed in range(5):
        events = run(model, BestOfN(n=5), seed=seed)
        (note,) = [e.values["best_of_n"] for e in events if isinstance(e, Note)]
        for row in range(5):
            alone = run(model, Sample(), seed=seed, row=row)
            tokens, history = list(end(alone).token_ids), list(PROMPT)
            if end(alone).reason == "eos":
                # Which of the end tokens it was is not told; here there is only one.
                (eos,) = model.tokenizer.eos_ids
                tokens.append(eos)
            logprobs = []
            for token in tokens:
                logprobs.append(np.log(model.probs(history)[token]))
                history.append(token)
            assert note["scores"][row] == pytest.approx(np.mean(logprobs), abs=1e-5)
            if row == note["chosen"]:
                assert end(events).token_ids == end(alone).token_ids
        assert note["chosen"] == int(np.argmax(note["scores"]))


def test_best_of_n_computes_the_prompt_once() -> None:
    model = TableModel(order=2)
    run(model, BestOfN(n=4), max_tokens=3, eos=frozenset())
    assert model.calls["tokens"] == len(PROMPT) + 4 * 2


# -- contrastive search --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [ContrastiveSearch(alpha=0), ContrastiveSearch(k=1)])
def test_contrastive_without_penalty_or_choice_is_greedy(strategy: ContrastiveSearch) -> None:
    model = ToyTransformer()
    prompt = tuple(b"a story about the sea")
    assert (
        end(run(model, strategy, prompt=prompt)).token_ids
        == end(run(model, GREEDY, prompt=prompt)).token_ids
    )


def test_contrastive_equals_its_definition(lib: Any) -> None:
    model, alpha, k = ToyTransformer(lib.xp), 0.6, 4
    prompt = tuple(b"the sea the sea")
    got = end(run(model, ContrastiveSearch(alpha=alpha, k=k), prompt=prompt, max_tokens=5))
    oracle = ToyTransformer()  # numpy, float64
    text = list(prompt)
    for token in got.token_ids:
        probs = np.exp(logits_of(oracle, text))
        probs /= probs.sum()
        before = unit(oracle, text)
        scores = {}
        for v in np.argsort(-probs, kind="stable")[:k]:
            similar = (before @ unit(oracle, [*text, int(v)])[-1]).max()
            scores[int(v)] = (1 - alpha) * probs[v] - alpha * similar
        assert scores[token] == pytest.approx(max(scores.values()), abs=1e-5)
        text.append(token)


def logits_of(model: ToyTransformer, text: list[int]) -> np.ndarray:
    return reference(model, text)[0][-1]


def unit(model: ToyTransformer, text: list[int]) -> np.ndarray:
    hidden = reference(model, text)[1][-1]
    normed = np.asarray(model.norm(hidden), np.float64)
    return normed / np.linalg.norm(normed, axis=-1, keepdims=True)


# -- DoLa ----------------------------------------------------------------------------------------


def test_contrast_layers_equals_its_definition(lib: Any) -> None:
    rng = np.random.default_rng(0)
    last, early = rng.normal(size=40) * 3, rng.normal(size=(3, 40)) * 3

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(last), log_softmax(early)
    mix = np.log((np.exp(p) + np.exp(q)) / 2)
    js = [
        0.5 * (np.exp(p) * (p - m)).sum() + 0.5 * (np.exp(e) * (e - m)).sum()
        for e, m in zip(q, mix, strict=True)
    ]
    expected = p - q[int(np.argmax(js))]
    got = to_numpy(contrast_layers(lib(last), lib(early), 0.0))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    kept = to_numpy(contrast_layers(lib(last), lib(early), 0.1))
    plausible = np.exp(p) >= 0.1 * np.exp(p).max()
    np.testing.assert_allclose(kept[plausible], expected[plausible], atol=1e-4)
    assert (kept[~plausible] == -np.inf).all()


def test_dola_that_trusts_only_the_best_token_is_greedy() -> None:
    model = ToyTransformer(layers=4)
    prompt = tuple(b"far away")
    strategy = DoLa(relative_top=1.0, chain=Chain((Temperature(t=0),)))
    assert (
        end(run(model, strategy, prompt=prompt)).token_ids
        == end(run(model, GREEDY, prompt=prompt)).token_ids
    )


def test_dola_equals_its_definition_on_a_model() -> None:
    model = ToyTransformer(layers=4)
    prompt = tuple(b"far away")
    strategy = DoLa(layers=(0, 2), chain=Chain((Temperature(t=0),)))
    got = end(run(model, strategy, prompt=prompt, max_tokens=5))
    text = list(prompt)
    for token in got.token_ids:
        logits, hidden, _ = reference(model, text)
        early = np.stack([np.asarray(model.head(hidden[i][-1])) for i in (0, 2)])
        scores = contrast_layers(logits[-1], early.astype(np.float64), 0.1)
        assert token == int(np.argmax(scores))
        text.append(token)


def test_dola_candidate_layers() -> None:
    assert DoLa(layers="low").candidates(30) == tuple(range(2, 15, 2))
    assert DoLa(layers="high").candidates(30) == tuple(range(15, 30, 2))
    assert DoLa(layers="low").candidates(2) == (0,)
    with pytest.raises(UsageError, match=r"layer 30 outside 0\.\.29"):
        DoLa(layers=(30,)).candidates(30)


# -- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy(name: str) -> None:
    """Builds from defaults, is deterministic per seed, respects limits, and cites a source."""
    model = ToyTransformer(layers=4)
    prompt = tuple(b"what every strategy must do")
    strategy = STRATEGIES[name]()
    first, again = (run(model, strategy, prompt=prompt, seed=3, max_tokens=6) for _ in range(2))
    assert end(first).token_ids == end(again).token_ids
    assert len(end(first).token_ids) <= 6
    assert end(run(model, strategy, prompt=prompt, max_tokens=0)).token_ids == ()
    assert end(run(model, strategy, prompt=prompt[:1], max_tokens=2)).reason in ("eos", "length")
    # Models that offer what is required of their role and nothing more.
    exact = {r: ToyTransformer(layers=4, without=~n) for r, n in strategy.requires.items()}
    assert end(run(exact, strategy, prompt=prompt, seed=3, max_tokens=6)).token_ids == (
        end(first).token_ids
    )
    if name != "sample":
        assert "arXiv:" in (strategy.__doc__ or "")


# Their chains act on bytes, or on the prompt's last token too.
OTHER_UNITS = ("byte_level", "cover", "token_healing")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_its_chain(name: str) -> None:
    model = ToyTransformer(layers=4)
    prompt = tuple(b"a chain")
    chain = Chain((Penalties(repetition=1.5), TopK(k=1)))
    # With one candidate left, every strategy that only chooses among candidates is the same.
    # Wider blocks are guessed under full attention, another distribution.
    options = {"block_diffusion": {"block_length": 1}}
    texts = {
        end(run(model, STRATEGIES[n](chain=chain, **options.get(n, {})), prompt=prompt)).token_ids
        for n in (name, "sample")
        if name not in ("dola", *OTHER_UNITS)
    }
    assert len(texts) <= 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_takes_a_stage_with_state(name: str) -> None:
    strategy = STRATEGIES[name](chain=Chain((Mirostat(tau=3.0),)))
    assert end(run(ToyTransformer(layers=4), strategy, prompt=tuple(b"state"))).token_ids


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BeamSearch(beams=0), r"beam: beams must be in 1\.\.128, got 0"),
        (lambda: BestOfN(n=0), r"best_of_n: n must be"),
        (lambda: BestOfN(by="luck"), r"best_of_n: by must be"),  # type: ignore[arg-type]
        (lambda: ContrastiveSearch(alpha=1.5), r"contrastive: alpha must be in \[0, 1\]"),
        (lambda: DoLa(layers="middle"), r"dola: layers must be low"),  # type: ignore[arg-type]
        (lambda: DoLa(relative_top=-1), r"dola: relative_top must be"),
    ],
)
def test_bad_parameters_are_named(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
