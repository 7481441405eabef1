"""Byte-level probabilities against brute force on texts of bounded length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bpe_toys import BpeTokenizer, ByteSource, InducedModel, prompts_of, random_bpe
from toys import TableModel, ToyTokenizer, byte_tokenizer, small_tokenizer

from steersman.core.array import to_numpy
from steersman.core.decode import Antislop, BeamSearch, BestOfN, Sample
from steersman.core.decode.byte_level import (
    ByteLevel,
    Cover,
    Covers,
    Settings,
    TokenHealing,
    begin_covers,
    byte_logprobs,
)
from steersman.core.decode.byte_level.law import mixture, sharpened
from steersman.core.decode.byte_level.score import evaluated, needs_of
from steersman.core.decode.byte_level.strategy import second_prompt
from steersman.core.decode.events import Event, Finished, TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request, Token
from steersman.core.errors import CapabilityError, UsageError
from steersman.core.logits import Chain, MinP, Penalties, Temperature, TopK
from steersman.core.model import Model

EXACT = Settings(negligible=0.0)
ABC = [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def worked() -> InducedModel:
    """The worked example: bytes at random, merges b+c and a+bc."""
    tokenizer = BpeTokenizer(b"abc", [(b"b", b"c"), (b"a", b"bc")])
    return InducedModel(tokenizer, ByteSource(b"abc", 7, 0.0, np.random.default_rng(0), iid=ABC))


def random_model(seed: int, length: int = 6) -> InducedModel:
    rng = np.random.default_rng(seed)
    letters = b"abc" if seed % 2 else b"ab"
    return InducedModel(random_bpe(rng, letters), ByteSource(letters, length, 0.1, rng))


def prompt_of(model: InducedModel, data: bytes) -> list[int]:
    assert model.tokenizer.bos_id is not None
    return [model.tokenizer.bos_id, *model.tokenizer.encode(data.decode())]


def search(model: Model, ids: Any, settings: Settings = EXACT) -> Covers:
    with model.session(max_rows=settings.rows, needs=needs_of(settings)) as session:
        return evaluated(begin_covers(model.tokenizer, ids, settings), session)


def spelled(model: InducedModel, covers: Covers) -> dict[tuple[bytes, ...], float]:
    pieces = model.tokenizer.pieces
    return {
        tuple(pieces[t] for t in tokens): math.exp(value)
        for tokens, value in covers.covers().items()
        if value > -100
    }


# -- the worked example ------------------------------------------------------------------------


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


# -- brute force -------------------------------------------------------------------------------


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


# -- mixing and sharpening ---------------------------------------------------------------------


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


# -- in the loop -------------------------------------------------------------------------------


def run(model: Any, strategy: Any, prompt: Any, **options: Any) -> list[Event]:
    others = options.pop("models", {})
    seed = options.pop("seed", 0)
    with Sessions({"target": model, **others}) as sessions:
        request = Request(
            prompt=np.array(prompt),
            models=sessions.models,
            eos_ids=model.tokenizer.eos_ids,
            max_tokens=options.pop("max_tokens", 3),
            context=model.info.context,
            **options,
        )
        return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


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


def test_token_healing_has_another_distribution(worked: InducedModel) -> None:
    # It never writes c behind ab, which is there one time in five.
    for seed in range(40):
        strategy = TokenHealing()
        assert not end(run(worked, strategy, prompt_of(worked, b"ab"), seed=seed)).text.startswith(
            "c"
        )


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


# -- other tokenizers and other bytes ----------------------------------------------------------


def smiling() -> TableModel:
    """A model over letters, "é" whole and a smile in two halves."""
    return TableModel(order=1, seed=1)


def test_a_prompt_that_ends_inside_a_character() -> None:
    model = smiling()
    tokenizer = model.tokenizer
    half = tokenizer.pieces.index(b"\xf0\x9f")
    law, _ = search(model, [0, 1, half]).law()
    assert law.bytes[0x99] == pytest.approx(1)  # nothing else can follow
    text = end(run(model, ByteLevel(), [0, 1, half], max_tokens=2)).text
    assert text[:1] in ("", "\ufffd") or len(text) <= 1


def test_no_byte_that_is_no_text_is_ever_drawn() -> None:
    model = smiling()
    for seed in range(30):
        data = b""
        for event in run(model, ByteLevel(), [0, 1], max_tokens=7, seed=seed):
            if isinstance(event, TokenEvent):
                data += event.bytes
        text = data.decode("utf-8", "ignore").encode()
        assert data.startswith(text) and len(data) - len(text) < 4


def test_control_tokens_are_boundaries() -> None:
    """Nothing is covered across a control token, and one may be drawn in the middle of a text."""
    model = TableModel(order=1, seed=2)
    bos = model.tokenizer.bos_id
    covers = begin_covers(model.tokenizer, [0, bos, 4], EXACT)
    assert covers.history.tolist() == [0, bos] and covers.start and covers.tail == b"ab"
    drawn = [
        event
        for seed in range(20)
        for event in run(model, ByteLevel(), [0, bos, 4], max_tokens=6, seed=seed)
        if isinstance(event, TokenEvent)
    ]
    assert any(e.id == bos and e.bytes == b"" for e in drawn)


class TwoBreaks(ToyTokenizer):
    """Writes two line breaks as one token only at the end of a text, as GPT-2's rules do."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        pair = self.pieces.index(b"\n\n")
        ids: list[int] = []
        for part in _split(text):
            ids += [pair] if part == "\n\n" else super().encode(part)
        return ids


def _split(text: str) -> Iterator[str]:
    body = text.rstrip("\n")
    breaks = len(text) - len(body)
    if body:
        yield from body
    yield from ["\n\n"] * (breaks // 2) + ["\n"] * (breaks % 2)


def test_a_tokenizer_that_looks_ahead() -> None:
    """Two breaks are one token at the end, two before a letter: both ways are covers."""
    tokenizer = TwoBreaks([b"a", b"b", b"\n", b"\n\n"])
    one, two = tokenizer.pieces.index(b"\n"), tokenizer.pieces.index(b"\n\n")
    assert tokenizer.encode("a\n\n") == [0, two] and tokenizer.encode("a\n\nb") == [0, one, one, 1]
    model = TableModel(order=2, tokenizer=tokenizer, seed=4)
    covers = search(model, [0, two])
    law, covers = covers.law()
    assert set(covers.covers()) >= {(two,), (one, one)}
    # A letter can follow two single breaks only; an end can follow the double one only.
    begun = model.probability([one, one], [0])
    single = begun * model.probs([0, one, one])[0]
    found = law.bytes[ord("a")] / law.bytes[ord("b")]
    assert found == pytest.approx(single / (begun * model.probs([0, one, one])[1]), rel=1e-5)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ByteLevel(temperature=-1), r"byte_level: temperature must be in \[0, 10\]"),
        (lambda: ByteLevel(top_p=0), r"byte_level: top_p must be in \(0, 1\]"),
        (lambda: ByteLevel(weights=()), r"byte_level: weights must be 1 to 4 positive"),
        (lambda: ByteLevel(weights=(1, -1)), r"byte_level: weights must be"),
        (lambda: ByteLevel(negligible=0.5), r"byte_level: negligible must be in"),
        (lambda: Cover(rows=0), r"cover: rows must be in 1\.\.64, got 0"),
        (lambda: Cover(validity="loose"), r"cover: validity must be exact or fast"),  # type: ignore[arg-type]
    ],
)
def test_bad_parameters_are_named(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


def test_stages_that_speak_of_tokens_are_refused() -> None:
    model = random_model(3)
    with pytest.raises(UsageError, match="byte_level: stage penalties speaks of tokens"):
        run(model, ByteLevel(chain=Chain((Penalties(repetition=1.5),))), prompt_of(model, b"a"))


def test_what_was_learnt_before_changes_no_text() -> None:
    """Answers of the tokenizer are remembered; laws must not depend on which."""
    texts = []
    for warm in (False, True):
        model = random_model(7)
        settings = Settings(negligible=0.05, checks=2)
        if warm:
            for data in prompts_of(model.source, 3):
                search(model, prompt_of(model, data)).law()
        texts.append(
            [
                search(model, prompt_of(model, d), settings).law()[0].bytes.tolist()
                for d in prompts_of(model.source, 2)
            ]
        )
    assert texts[0] == texts[1]


def test_another_vocabulary_s_prompt() -> None:
    """Control tokens go by name, the rest by bytes; what ends inside a character stays bytes."""
    ours, theirs = byte_tokenizer(), small_tokenizer()
    ids = ours.encode("<|im_start|>ab<eos>a \n", special=True)
    there, more = second_prompt(np.array(ids), ours, theirs)
    names = [theirs.token_name(i) for i in there]
    assert names == ["ab", "<eos>", "a", " ", "\n"] and more == b""
    there, more = second_prompt(np.array([*ours.encode("a"), 0xF0, 0x9F]), ours, theirs)
    assert there.tolist() == theirs.encode("a") and more == b"\xf0\x9f"


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


def test_a_second_model_must_be_there() -> None:
    model = random_model(3)
    with pytest.raises(CapabilityError, match="needs a model for role 'second'"):
        run(model, ByteLevel(weights=(0.5, 0.5)), prompt_of(model, b"a"))


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
