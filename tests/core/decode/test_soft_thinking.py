"""Soft thinking against its definition: the noise, the mixture, and the way into the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from toy_tokenizer import ToyTokenizer
from toy_transformer import toy_info
from toys import ToyTransformer

from steersman.core.array import to_numpy
from steersman.core.decode import Sample, SoftThinking
from steersman.core.decode.events import Event, Finished, Note, TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.soft_thinking import DRAW_NOISE, perturbed, thought_candidates
from steersman.core.decode.types import Request, Token
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, Temperature
from steersman.core.model import Capability, Forward, Model, Output, Session
from steersman.core.ops import gumbel, gumbel_softmax, softmax

P = np.array([0.6, 0.3, 0.1])
ALPHA = 1e-4  # false alarms of each chi-square test below; seeds are fixed


# -- the formulas ----------------------------------------------------------------------------------


def test_gumbel_argmax_is_a_draw_from_p() -> None:
    uniforms = np.random.default_rng(0).random((1_000_000, 3))
    chosen = np.argmax(perturbed(P, gumbel(uniforms)), axis=-1)
    counts = np.bincount(chosen, minlength=3)
    np.testing.assert_allclose(counts / 1e6, P, atol=2e-3)
    assert chisquare(counts, 1e6 * P).pvalue > ALPHA
    # The clamp of the released code is a bias that the same test finds at once.
    chosen = np.argmax(perturbed(P, gumbel(uniforms), as_code=True), axis=-1)
    biased = np.bincount(chosen, minlength=3)
    np.testing.assert_allclose(biased / 1e6, [0.6086, 0.3002, 0.0912], atol=2e-3)
    assert chisquare(biased, 1e6 * P).pvalue < 1e-20
    noise = gumbel(uniforms)
    assert np.mean(noise < -1.5) == pytest.approx(0.0113, abs=3e-4)
    assert np.mean(noise > 3) == pytest.approx(0.0486, abs=6e-4)


def test_worked_example(lib: Any) -> None:
    scores = perturbed(lib(P), lib([0.10, -0.30, 1.0]))
    np.testing.assert_allclose(to_numpy(scores), [-0.410826, -1.503973, -1.302585], atol=2e-6)
    for tau, weights in (
        (0.5, (0.781019, 0.087734, 0.131247)),
        (0.1, (0.999848, 0.000018, 0.000134)),
    ):
        np.testing.assert_allclose(to_numpy(gumbel_softmax(scores, tau)), weights, atol=2e-6)
    np.testing.assert_allclose(to_numpy(gumbel_softmax(scores, 0)), [1, 0, 0])


@pytest.mark.parametrize(("tau", "mean"), [(1, 0.694), (0.5, 0.824), (0.25, 0.908), (0.1, 0.962)])
def test_a_small_tau_is_a_discrete_draw(tau: float, mean: float) -> None:
    uniforms = np.random.default_rng(1).random((200_000, 3))
    scores = perturbed(P, gumbel(uniforms))
    weights = gumbel_softmax(scores, tau)
    assert weights.max(axis=-1).mean() == pytest.approx(mean, abs=2e-3)
    np.testing.assert_allclose(gumbel_softmax(scores, 1e-6), gumbel_softmax(scores, 0), atol=1e-2)


def test_without_noise_the_weights_are_p(lib: Any) -> None:
    scores = perturbed(lib(P), lib([5.0, -2.0, 9.0]), factor=0)
    np.testing.assert_allclose(to_numpy(gumbel_softmax(scores, 1)), P, rtol=1e-6)


def test_extreme_uniforms_stay_finite(lib: Any) -> None:
    noise = to_numpy(gumbel(lib([0.0, 0.5, 1 - 1e-9])))
    assert np.isfinite(noise).all() and noise[0] < noise[1] < noise[2]


def test_truncation_is_top_k_then_top_p_then_min_p(lib: Any) -> None:
    rng = np.random.default_rng(2)
    for seed in range(5):
        logits = rng.normal(size=50).astype(np.float32) * 2
        tau, k, top_p, min_p = 0.7, 8 + seed, 0.9, 0.1
        p = np.exp(logits.astype(np.float64) / tau)
        order = np.argsort(-p, kind="stable")[:k]
        p = p[order] / p[order].sum()
        size = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        p[size:] = 0
        p /= p.sum()
        p[p < min_p * p.max()] = 0
        ids, probs = thought_candidates(
            lib(logits[None]), temperature=tau, k=k, top_p=top_p, min_p=min_p
        )
        assert to_numpy(ids)[0].tolist() == order.tolist()
        np.testing.assert_allclose(to_numpy(probs)[0], p / p.sum(), atol=1e-5)


def test_temperature_zero_is_one_hot(lib: Any) -> None:
    ids, probs = thought_candidates(lib([[1.0, 4.0, 2.0]]), temperature=0, k=3, top_p=1)
    assert to_numpy(ids).tolist() == [[1]] and to_numpy(probs).tolist() == [[1.0]]


# -- a model whose answer to a mixture is the mixture of its answers ------------------------------

PIECES = [b"a", b"b", b"c", b"<t>", b"</t>", b"x", b"y"]
A, B, C, OPEN, CLOSE, X, Y, _, EOS = range(9)


class MixtureModel(Model):
    """Next-token probabilities that depend on the last embedding alone, linearly.

    ``E`` is the identity, so a soft token is a distribution over rows of ``table``.
    """

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        self.xp = np
        self.tokenizer = ToyTokenizer(PIECES)
        size = self.tokenizer.vocab_size
        self.capabilities = Capability.LAST_LOGITS | Capability.ROLLBACK | Capability.EMBEDS
        self.info = toy_info("mix", "float64", self.tokenizer, 256, layers=0, width=size, heads=0)
        self.table = np.full((size, size), 1e-12)
        for row, chances in table.items():
            for token, chance in chances.items():
                self.table[row, token] = chance
        self.asked: list[str] = []
        self.mixtures: list[np.ndarray] = []

    def session(self, *, max_rows: int = 1, needs: Any = Capability.NONE, context: Any = None):
        return MixtureSession(self, max_rows=max_rows, needs=needs, context=256)

    def embed(self, tokens: Any) -> Any:
        return np.eye(self.info.width, dtype=np.float32)[np.asarray(tokens)]

    @property
    def embedding(self) -> Any:
        return self.embed(np.arange(self.info.width))

    def norm(self, hidden: Any) -> Any:
        raise NotImplementedError

    def head(self, hidden: Any) -> Any:
        raise NotImplementedError


class MixtureSession(Session):
    model: MixtureModel

    def _run(self, plan: Any) -> Output:
        model = self.model
        model.asked.append("tokens" if plan.embeds is None else "embeds")
        if plan.embeds is None:
            last = model.embed(plan.tokens[0, -1])
        else:
            last = plan.embeds[0, -1]
            model.mixtures.append(last)
        return Output(logits=np.log(last.astype(np.float64) @ model.table)[None].astype(np.float32))


def run(
    model: Model,
    strategy: Any,
    prompt: tuple[int, ...],
    *,
    sessions: Sessions | None = None,
    max_tokens: int = 8,
    seed: int = 0,
    logprobs: int | None = None,
) -> list[Event]:
    sessions = Sessions(model) if sessions is None else sessions
    request = Request(
        prompt=np.array(prompt),
        models=sessions.models,
        eos_ids=model.tokenizer.eos_ids,
        max_tokens=max_tokens,
        context=model.info.context,
        logprobs=logprobs,
    )
    return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def ids(events: list[Event]) -> tuple[int, ...]:
    assert isinstance(events[-1], Finished)
    return events[-1].token_ids


def notes(events: list[Event], key: str) -> list[Any]:
    return [e.values[key] for e in events if isinstance(e, Note) and key in e.values]


WANDER = {A: 0.6, B: 0.3, C: 0.1}
ANSWERS = {X: 0.5, Y: 0.5}
THINKS: dict[str, Any] = {"begin": "<t>", "end": "</t>", "temperature": 1.0, "top_p": 1.0}


def test_the_shown_token_of_a_thought_is_a_draw_from_p() -> None:
    model = MixtureModel({OPEN: WANDER})
    logits = np.log(model.table[OPEN]).astype(np.float32)
    for tau in (0.0, 0.5, 2.0):
        strategy = SoftThinking(**THINKS, tau_g=tau)
        seen = []
        for seed in range(2000):
            uniforms = Rng(seed).uniforms(0, 1, strategy.top_k, draw=DRAW_NOISE)
            seen.append(int(strategy.thought(logits, uniforms)[0][0]))
        assert chisquare(np.bincount(seen, minlength=3), 2000 * P).pvalue > ALPHA
        for seed in range(5):  # and this is what the loop shows
            assert ids(run(model, strategy, (OPEN,), max_tokens=1, seed=seed)) == (seen[seed],)


def test_a_thought_lies_in_the_convex_hull_and_reaches_the_model() -> None:
    model = MixtureModel({t: WANDER for t in (OPEN, A, B, C)})
    events = run(model, SoftThinking(**THINKS), (OPEN,), max_tokens=6)
    assert model.asked == ["tokens", *["embeds"] * 5]
    for mixture, note in zip(model.mixtures, notes(events, "thought"), strict=False):
        assert (mixture >= 0).all() and mixture.sum() == pytest.approx(1, abs=1e-6)
        expected = np.zeros_like(mixture)
        expected[note["ids"]] = note["weights"]
        np.testing.assert_allclose(mixture, expected, atol=1e-3)  # notes are rounded
        assert note["weights"] == sorted(note["weights"], reverse=True)


def test_plain_soft_thinking_feeds_p_itself() -> None:
    model = MixtureModel({OPEN: WANDER, A: WANDER, B: {C: 1.0}, C: {A: 1.0}})
    strategy = SoftThinking(**THINKS, tau_g=1.0, noise_factor=0.0)
    events = run(model, strategy, (OPEN,), max_tokens=3)
    np.testing.assert_allclose(model.mixtures[0][:3], P, atol=1e-5)
    # 0.6 of A's row, 0.3 of B's, 0.1 of C's: the mixture is carried through.
    np.testing.assert_allclose(model.mixtures[1][:3], [0.46, 0.18, 0.36], atol=1e-5)
    assert ids(events)[:2] == (A, A)


def test_thinking_ends_and_the_answer_uses_its_own_settings() -> None:
    """The switch must reach the draw: no answer token comes from the thoughts' settings."""
    table = {OPEN: WANDER, A: {CLOSE: 1.0}, B: {CLOSE: 1.0}, C: {CLOSE: 1.0}}
    model = MixtureModel(table | {CLOSE: {X: 0.9, Y: 0.1}, X: {X: 0.9, Y: 0.1}, Y: {Y: 1.0}})
    strategy = SoftThinking(**THINKS, chain=Chain((Temperature(t=0),)))
    for seed in range(20):
        model.asked.clear()
        events = run(model, strategy, (OPEN,), max_tokens=5, seed=seed)
        assert ids(events)[1:] == (CLOSE, X, X, X)
        # Prompt, one soft thought, then the end as the token it is, then answer tokens.
        assert model.asked == ["tokens", "embeds", "tokens", "tokens", "tokens"]
        assert notes(events, "thinking") == [{"thoughts": 2, "ended": "model"}]
    # And the other way round: cold thoughts, a warm answer.
    cold = SoftThinking(**{**THINKS, "temperature": 0.0})
    model = MixtureModel({OPEN: WANDER, A: {CLOSE: 1.0}, CLOSE: {X: 0.7, Y: 0.3}})
    answers = [ids(run(model, cold, (OPEN,), max_tokens=3, seed=s)) for s in range(200)]
    assert {a[:2] for a in answers} == {(A, CLOSE)}
    counts = np.bincount([a[2] for a in answers], minlength=7)[[X, Y]]
    assert chisquare(counts, [140, 60]).pvalue > ALPHA


def test_the_end_is_one_hot_even_where_others_had_weight() -> None:
    model = MixtureModel({OPEN: {CLOSE: 0.5, A: 0.5}, CLOSE: {X: 1.0}, A: {Y: 1.0}})
    strategy = SoftThinking(**THINKS, tau_g=2.0)
    ended = 0
    for seed in range(30):
        found = ids(run(model, strategy, (OPEN,), max_tokens=2, seed=seed))
        if found[0] == CLOSE:
            ended += 1
            assert found == (CLOSE, X)
    assert ended > 5


def test_the_limit_writes_the_end() -> None:
    model = MixtureModel({t: WANDER for t in (OPEN, A, B, C)} | {CLOSE: ANSWERS})
    events = run(model, SoftThinking(**THINKS, max_thoughts=3), (OPEN,), max_tokens=5, logprobs=2)
    found = ids(events)
    assert found[3] == CLOSE and found[4] in (X, Y)
    assert notes(events, "thinking") == [{"thoughts": 3, "ended": "limit"}]
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    assert all(t.raw_logprob is not None and len(t.top) == 2 for t in tokens)
    assert tokens[3].logprob == 0  # written, not drawn
    none = run(model, SoftThinking(**THINKS, max_thoughts=0), (OPEN,), max_tokens=2)
    assert ids(none)[0] == CLOSE


@pytest.mark.parametrize(("on_eos", "expected"), [("answer", (CLOSE, X)), ("stop", ())])
def test_an_end_of_text_inside_thoughts(on_eos: Any, expected: tuple[int, ...]) -> None:
    model = MixtureModel({OPEN: {EOS: 1.0}, CLOSE: {X: 1.0}, X: {EOS: 1.0}})
    events = run(model, SoftThinking(**THINKS, on_eos=on_eos), (OPEN,))
    assert ids(events) == expected and events[-1].reason == "eos"  # type: ignore[union-attr]


def test_certain_thoughts_stop_by_entropy() -> None:
    model = MixtureModel({OPEN: WANDER, A: {A: 1.0}, B: {A: 1.0}, C: {A: 1.0}, CLOSE: {X: 1.0}})
    strategy = SoftThinking(**THINKS, cold_entropy=0.1, cold_steps=4)
    events = run(model, strategy, (OPEN,), max_tokens=8)
    # The first thought is uncertain, the next three are not; the fourth in a row is not thought.
    assert ids(events)[1:6] == (A, A, A, CLOSE, X)
    assert notes(events, "thinking") == [{"thoughts": 4, "ended": "cold"}]
    plain = run(model, SoftThinking(**THINKS), (OPEN,), max_tokens=8)
    assert ids(plain)[1:] == (A,) * 7


def test_where_thinking_begins() -> None:
    table = {t: WANDER for t in (OPEN, A, B, C)} | {X: {OPEN: 1.0}, CLOSE: {OPEN: 1.0}}
    model = MixtureModel(table)

    def soft(prompt: tuple[int, ...], **options: Any) -> int:
        return len(notes(run(model, SoftThinking(**{**THINKS, **options}), prompt), "thought"))

    assert soft((OPEN, A)) == 8  # the prompt ends inside a section
    assert soft((OPEN, A, CLOSE)) == 7  # it is closed; but the model opens another
    assert soft((X,)) == 7  # the model's text begins with it
    assert soft((A,)) == 0
    assert soft((A,), open=True) == 7  # the strategy writes it
    assert soft((OPEN, A), open=True) == 8  # nothing to write
    assert soft((A,), begin="") == 8


def test_a_marker_of_several_tokens_is_recognised_in_the_text() -> None:
    model = MixtureModel({A: {B: 1.0}, B: {C: 1.0}, C: {A: 1.0}, X: {A: 1.0}})
    events = run(model, SoftThinking(begin="x", end="bc"), (X,), max_tokens=8)
    assert notes(events, "thinking") == [{"thoughts": 3, "ended": "model"}]


def test_top_k_of_one_feeds_tokens_and_is_greedy() -> None:
    model = ToyTransformer()
    prompt = tuple(b"so it goes")
    found = run(model, SoftThinking(begin="", top_k=1), prompt)
    assert ids(found) == ids(run(model, Sample(chain=Chain((Temperature(t=0),))), prompt))


def test_tau_zero_is_a_sampled_text(lib: Any) -> None:
    """With one-hot thoughts, every thought is a draw from the discrete distribution."""
    model = ToyTransformer(lib.xp)
    prompt = tuple(b"so it goes")
    strategy = SoftThinking(begin="", tau_g=0.0)
    events = run(model, strategy, prompt, max_tokens=4, seed=7)
    history = list(prompt)
    for token in ids(events):
        with model.session() as session:
            logits = session.forward(Forward(keep=0, tokens=np.array([history]))).logits
        uniforms = Rng(7).uniforms(0, len(history), strategy.top_k, draw=DRAW_NOISE)
        assert strategy.thought(logits[0, :], uniforms)[0][0] == token
        history.append(token)
    sharp = run(model, SoftThinking(begin="", tau_g=1e-4), prompt, max_tokens=4, seed=7)
    assert ids(sharp) == ids(events)


def test_one_hot_weights_equal_the_token(lib: Any) -> None:
    model = ToyTransformer(lib.xp)
    one = model.embed(np.array([70, 101]))
    weights = model.xp.asarray(np.array([[1.0, 0.0]], np.float32))
    with model.session(needs=Capability.EMBEDS) as session:
        session.forward(Forward(keep=0, tokens=np.array([[65, 66]])))
        soft = session.forward(Forward(keep=2, embeds=(weights @ one)[None, ...])).logits
        hard = session.forward(Forward(keep=2, tokens=np.array([[70]]))).logits
    np.testing.assert_allclose(to_numpy(soft), to_numpy(hard), atol=1e-5)


def test_a_following_turn_starts_before_the_first_soft_position() -> None:
    model = ToyTransformer()
    prompt = tuple(b"<t>well")
    thinker = SoftThinking(begin="<t>", max_thoughts=4)
    with Sessions(model) as kept, Sessions(model) as fresh:
        first = run(model, thinker, prompt, sessions=kept, max_tokens=20)
        assert (kept.prepare(thinker, name="t")["target"].row_tokens() == -1).sum() == 4
        longer = (*prompt, *ids(first), *b" and then")
        events = run(model, Sample(), longer, sessions=kept)
        assert events[-1].timings.cached_tokens == len(prompt)  # type: ignore[union-attr]
        assert ids(events) == ids(run(model, Sample(), longer, sessions=fresh))


def test_going_back_into_the_thoughts_leaves_the_cache_of_a_fresh_start() -> None:
    """Rewind from the answer to the second thought; then everything is drawn again as it was."""
    model = ToyTransformer()
    prompt = np.array(tuple(b"<t>well"))
    strategy = SoftThinking(begin="<t>", max_thoughts=4)
    request = Request(
        prompt=prompt,
        models={"target": model},
        eos_ids=frozenset(),
        max_tokens=20,
        context=256,
    )
    rng = Rng(3)

    def follow(session: Session, state: Any, step: Any, steps: int) -> tuple[Any, list[int]]:
        found: list[int] = []
        for _ in range(steps):
            out = session.forward(step.ask["target"])
            state, step = strategy.step(state, {"target": out}, rng)
            found += [t.id for t in step.edit.tokens]
        return (state, step), found

    with model.session(needs=Capability.EMBEDS) as session:
        (state, step), text = follow(session, *strategy.init(request, rng), 16)
        back = [Token(id=t) for t in text[:2]]
        state, step = strategy.resume(state, back, rng)
        assert (state.mode, state.thoughts) == ("thinking", 2)
        resumed = session.forward(step.ask["target"]).logits
    # The same by hand on a fresh cache: the first thought soft, the second as the token it shows.
    with model.session(needs=Capability.EMBEDS) as session:
        (state, step), _ = follow(session, *strategy.init(request, rng), 1)
        session.forward(step.ask["target"])
        fresh = session.forward(Forward(keep=len(prompt) + 1, tokens=np.array([[text[1]]]))).logits
    np.testing.assert_array_equal(to_numpy(resumed), to_numpy(fresh))
    state, _ = strategy.resume(state, [Token(id=t) for t in text], rng)
    assert state.mode == "answer" and text[4:12] == list(b"</think>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_g": -1}, r"soft_thinking: tau_g must be in \[0, 1000\], got -1"),
        ({"top_k": 0}, r"soft_thinking: top_k must be an integer, in 1..1024"),
        ({"top_p": 0}, r"soft_thinking: top_p must be in \(0, 1\]"),
        ({"max_thoughts": -1}, r"soft_thinking: max_thoughts must be an integer"),
    ],
)
def test_bad_parameters_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SoftThinking(**options)


# -- real weights --------------------------------------------------------------------------------


@pytest.mark.weights
def test_one_hot_thoughts_equal_tokens_on_every_engine(engine_model: Model) -> None:
    prompt = np.asarray(engine_model.tokenizer.encode("The capital of France is"))
    token = engine_model.tokenizer.encode(" Paris")[0]
    with engine_model.session(needs=Capability.EMBEDS) as session:
        session.forward(Forward(keep=0, tokens=prompt[None]))
        soft = session.forward(
            Forward(keep=len(prompt), embeds=engine_model.embed(np.array([token]))[None, ...])
        ).logits
        soft = to_numpy(soft).copy()
        hard = to_numpy(session.forward(Forward(keep=len(prompt), tokens=[[token]])).logits)
    tolerance = 0.0 if engine_model.info.backend == "llamacpp" else 1e-3
    assert np.abs(soft - hard).max() <= tolerance


@pytest.mark.weights
def test_soft_thoughts_on_every_engine(engine_model: Model) -> None:
    """Thoughts, forced end, answer; then a following turn equals a fresh start."""
    from steersman.core import generate, open_session

    options: dict[str, Any] = {"profile": "soft-thinking", "seed": 1, "max_tokens": 14}
    options["overrides"] = {"soft_thinking.max_thoughts": 2}
    chat = [{"role": "user", "content": "Name a colour."}]
    with open_session(engine_model) as kept:
        first = generate(engine_model, chat, session=kept, **options)
        assert "<think>" in first.text and "</think>" in first.text
        held = kept.prepare(SoftThinking(), name="t")["target"].row_tokens()
        assert 1 <= (held < 0).sum() <= 2
        chat += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Why?"}]
        again = {"profile": "greedy", "max_tokens": 2}
        second = generate(engine_model, chat, session=kept, **again)
        assert second.timings.cached_tokens >= len(first.prompt_token_ids)
        assert second.token_ids == generate(engine_model, chat, **again).token_ids


def test_softmax_of_scores_is_what_the_docs_say(lib: Any) -> None:
    scores = lib([[0.3, -1.0, 0.5, -np.inf]])
    np.testing.assert_allclose(
        to_numpy(gumbel_softmax(scores, 0.5)), to_numpy(softmax(scores / 0.5)), atol=1e-7
    )
