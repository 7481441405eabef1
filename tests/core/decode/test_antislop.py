"""Antislop: exact distributions, what may and may not stand in a text, and going back in caches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from toys import TableModel, ToyTokenizer, ToyTransformer, reference

from steersman.core import generate
from steersman.core.array import to_numpy
from steersman.core.decode import STRATEGIES, Antislop, Sample
from steersman.core.decode.antislop.redraw import inverted, penalised
from steersman.core.decode.events import Event, Finished, Note, TokenEvent, Withdrawn
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sample import Progress
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Edit, Request, Step, Token
from steersman.core.errors import UsageError
from steersman.core.logits import Chain, Penalties, Temperature, TopK
from steersman.core.model import Capability, Forward, Output
from steersman.core.ops import softmax

GREEDY = Chain((Temperature(t=0),))
NO_EOS: frozenset[int] = frozenset()


def run(
    model: Any,
    strategy: Any,
    *,
    prompt: Sequence[int] = (0,),
    max_tokens: int = 12,
    eos: frozenset[int] | None = None,
    seed: int = 0,
    logprobs: int | None = None,
    sessions: Sessions | None = None,
) -> list[Event]:
    kept = sessions or Sessions(model)
    request = Request(
        prompt=np.array(prompt),
        models=kept.models,
        eos_ids=model.tokenizer.eos_ids if eos is None else eos,
        max_tokens=max_tokens,
        context=model.info.context,
        logprobs=logprobs,
    )
    events = list(decode(strategy, kept.prepare(strategy, name="t"), request, Rng(seed)))
    if sessions is None:
        kept.close()
    return events


def quick(
    model: TableModel, strategy: Any, *, max_tokens: int, seed: int
) -> tuple[str, list[Mapping[str, Any]]]:
    """Return text and notes of a run without a loop and without an end, for many texts."""
    request = Request(
        prompt=np.array([0]),
        models={"target": model},
        eos_ids=NO_EOS,
        max_tokens=max_tokens,
        context=64,
    )
    rng, ids, told = Rng(seed), [], []
    cached: list[int] = []
    state, step = strategy.init(request, rng)
    while True:
        told.append(step.note)
        if step.edit is not None:
            del ids[step.edit.keep :]
            ids += [token.id for token in step.edit.tokens]
        if step.finish is not None:
            text = b"".join(model.tokenizer.token_bytes(i) for i in ids).decode()
            return text, [note for note in told if note]
        ask = step.ask["target"]
        assert ask.keep <= len(cached)
        cached = [*cached[: ask.keep], *np.asarray(ask.tokens)[0].tolist()]
        logits = np.log(np.maximum(model.probs(cached), 1e-30)).astype(np.float32)[None]
        state, step = strategy.step(state, {"target": Output(logits=logits)}, rng)


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def notes(events: list[Event], key: str) -> list[Any]:
    return [e.values[key] for e in events if isinstance(e, Note) and key in e.values]


def letters(probs: Mapping[str, float], **options: Any) -> TableModel:
    """A model that draws each piece independently; "" is the end."""
    pieces = [p.encode() for p in probs if p]
    tokenizer = ToyTokenizer(pieces)
    table = np.zeros(tokenizer.vocab_size)
    for place, (piece, p) in enumerate(probs.items()):
        table[place if piece else tokenizer.vocab_size - 1] = p
    return TableModel(order=0, table=table, tokenizer=tokenizer, **options)


@dataclass(frozen=True, kw_only=True)
class Bursts:
    """Draws like ``Sample`` but shows ``size`` tokens at a time: an edit of several tokens.

    As a draft-and-verify strategy does, it leaves the newest tokens out of the cache.
    """

    size: int = 3
    chain: Chain = field(default_factory=Chain)

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS | Capability.ROLLBACK}

    @property
    def max_rows(self) -> int:
        return 1

    def init(self, request: Request, rng: Rng) -> tuple[Any, Step]:
        state, step = Sample(chain=self.chain).init(request, rng)
        return (state, ()), step

    def step(self, state: Any, out: Mapping[str, Output], rng: Rng) -> tuple[Any, Step]:
        progress, held = state
        progress, step = Sample(chain=self.chain).step(progress, out, rng)
        if step.edit is not None:
            held += step.edit.tokens
        if len(held) < self.size and step.finish is None:
            return (progress, held), replace(step, edit=None)
        # What was computed of the burst goes: the wrapper must not count on more than it was told.
        keep = progress.count - len(held) - (step.finish == "eos")
        text = progress.history
        if step.finish is None:
            start = max(0, len(progress.request.prompt) + keep - 1)
            step = Step(ask={"target": Forward(keep=start, tokens=text[None, start:])})
        return (progress, ()), replace(step, edit=Edit(keep=keep, tokens=held), note={"burst": 1})

    def resume(self, state: Any, tokens: Sequence[Token], rng: Rng) -> tuple[Any, Step]:
        progress, step = Sample(chain=self.chain).resume(state[0], tokens, rng)
        return (progress, ()), step


# -- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (1.0, [0.030303, 0.581818, 0.290909, 0.096970]),
        (0.25, [0.295997, 0.422402, 0.211201, 0.070400]),
        (0.0, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_a_soft_ban_multiplies_and_renormalises(
    lib: Any, strength: float, expected: list[float]
) -> None:
    logits = lib(np.log([[0.5, 0.3, 0.15, 0.05]]))
    got = softmax(penalised(logits, {0: 0.03125**strength}))
    np.testing.assert_allclose(to_numpy(got)[0], expected, atol=1e-6)


def test_a_hard_ban_removes(lib: Any) -> None:
    got = softmax(penalised(lib(np.log([[0.5, 0.3, 0.15, 0.05]])), {0: 0.0, 3: 0.0}))
    np.testing.assert_allclose(to_numpy(got)[0], [0, 2 / 3, 1 / 3, 0], atol=1e-6)


def test_inversion(lib: Any) -> None:
    with np.errstate(divide="ignore"):
        logits = lib(np.log([[0, 0.3, 0.15, 0.05]]))
    got = to_numpy(softmax(inverted(logits)))[0]
    np.testing.assert_allclose(got, [0, 0.090909, 0.363636, 0.545455], atol=1e-5)
    narrow = to_numpy(softmax(inverted(logits, 2)))[0]  # of 2/3 and 1/3
    np.testing.assert_allclose(narrow, [0, 1 / 3, 2 / 3, 0], atol=1e-5)


# -- neutral settings -----------------------------------------------------------------------------


NEUTRAL = [
    {},
    {"phrases": ("a", "b c"), "factor": 1.0},
    {"phrases": ("a", "b"), "regexes": ("c+",), "strength": 0.0},
    {"phrases": ("a",), "ngrams": ("b",), "factors": {"a": 1.0, "b": 1.0}},
    {"phrases": ("never there",)},
]


@pytest.mark.parametrize("options", NEUTRAL)
@pytest.mark.parametrize("inner", [Sample(), Bursts(size=3)])
def test_neutral_settings_are_plain_sampling(options: dict[str, Any], inner: Any) -> None:
    model = TableModel(order=2, seed=4)
    strategy = Antislop(inner=inner, **options)
    for seed in range(12):
        plain = run(model, Sample(), seed=seed, logprobs=2)
        got = run(model, strategy, seed=seed, logprobs=2)
        tokens = [[e for e in events if isinstance(e, TokenEvent)] for events in (plain, got)]
        assert tokens[0] == tokens[1]
        assert (end(plain).reason, end(plain).text) == (end(got).reason, end(got).text)


def test_a_text_without_hits_is_the_plain_one() -> None:
    model = TableModel(order=2, seed=4)
    for seed in range(30):
        plain, got = (run(model, s, seed=seed) for s in (Sample(), Antislop(phrases=("dab",))))
        if "rewind" not in str(got):
            assert end(plain).token_ids == end(got).token_ids


# -- exact distributions --------------------------------------------------------------------------

AB = {"-": 0.6, "+": 0.4}


def chi_square(counts: Counter[str], expected: Mapping[str, float]) -> float:
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    seen = [counts[text] for text in expected]
    p: float = chisquare(seen, [total * p for p in expected.values()]).pvalue
    return p


PAIR: dict[str, Any] = {"phrases": ("-+",)}


@pytest.mark.parametrize(
    ("rule", "inner"),
    [
        (PAIR, Sample()),
        (PAIR, Bursts(size=2)),
        (PAIR, Bursts(size=3)),
        (PAIR | {"variants": False}, Sample()),
        ({"regexes": (r"-\+",)}, Bursts(size=3)),
    ],
)
def test_hard_ban_of_a_pair_by_enumeration(rule: dict[str, Any], inner: Any) -> None:
    """Five tests at an error rate of 1e-3 each, with fixed seeds."""
    expected = {"---": 0.216, "+--": 0.28224, "++-": 0.301056, "+++": 0.200704}
    assert sum(expected.values()) == pytest.approx(1)
    model, strategy = letters(AB), Antislop(inner=inner, **rule)
    counts = Counter(quick(model, strategy, max_tokens=3, seed=seed)[0] for seed in range(800))
    assert chi_square(counts, expected) > 1e-3
    # It is not the model's distribution on the condition that the pair does not occur.
    conditional = {"---": 0.4154, "+--": 0.2769, "++-": 0.1846, "+++": 0.1231}
    assert chi_square(counts, conditional) < 1e-9


def test_soft_ban_decided_by_a_draw() -> None:
    """A pair stays with the probability of its first token after the penalty, renormalised."""
    stay = 0.6 * 0.5 / (0.6 * 0.5 + 0.4)
    expected = {
        "--": 0.36,
        "-+": 0.24 * stay,
        "+-": 0.24 + 0.24 * (1 - stay) * 0.6,
        "++": 0.16 + 0.24 * (1 - stay) * 0.4,
    }
    strategy = Antislop(phrases=("-+",), factor=0.5, acceptance="draw")
    counts = Counter(
        quick(letters(AB), strategy, max_tokens=2, seed=seed)[0] for seed in range(1000)
    )
    assert chi_square(counts, expected) > 1e-3


def test_inversion_draws_the_unlikely() -> None:
    model = letters({"-": 0.5, "a": 0.3, "b": 0.15, "c": 0.05})
    strategy = Antislop(phrases=("-",), invert=True, chain=Chain((TopK(k=4),)))
    counts = Counter(quick(model, strategy, max_tokens=1, seed=seed)[0] for seed in range(800))
    turned = {"a": 1 / 11, "b": 4 / 11, "c": 6 / 11}
    plain = {"a": 0.3, "b": 0.15, "c": 0.05}
    assert chi_square(counts, {key: plain[key] + 0.5 * p for key, p in turned.items()}) > 1e-3


# -- soft rules -----------------------------------------------------------------------------------


def test_soft_ban_keeps_what_is_still_the_likeliest_and_decides_once() -> None:
    model = letters({"-": 0.7, "+": 0.3})
    strategy = Antislop(phrases=("-+",), factor=0.5, variants=False)
    for seed in range(20):
        events = run(model, strategy, max_tokens=12, eos=NO_EOS, seed=seed)
        plain = run(model, Sample(), max_tokens=12, eos=NO_EOS, seed=seed)
        assert not notes(events, "rewind") and not notes(events, "suppressed")
        accepted = notes(events, "accepted")
        assert len(accepted) == end(events).text.count("-+")
        assert len({fact["to"] for fact in accepted}) == len(accepted)
        first = end(plain).text.find("-+")
        # Up to the first hit it is the plain text; afterwards the numbers are others.
        assert end(events).text[: first + 2] == end(plain).text[: first + 2]


def test_soft_ban_of_a_greedy_text() -> None:
    """The factor works before a temperature of 0, which would leave nothing to choose from."""
    model = letters({"a": 0.5, "b": 0.3, "c": 0.2})
    for factor, text in ((0.59, "bbb"), (0.61, "aaa"), (0.0, "bbb")):
        strategy = Antislop(phrases=("a", "aa", "aaa"), factor=factor, chain=GREEDY)
        got = run(model, strategy, max_tokens=3, eos=NO_EOS)
        # "a" alone is a word only at the end: the hit is on the run as a whole.
        assert end(got).text == text if text == "aaa" else end(got).text[0] == "b"


def test_repeated_hits_multiply() -> None:
    """0.5 * 0.8 is still the most; another rule's hit at the same token brings it to 0.32."""
    model = letters({"-": 0.5, "+": 0.35, ".": 0.15})
    strategy = Antislop(phrases=("-",), regexes=("-.",), factor=0.8, chain=GREEDY)
    events = run(model, strategy, max_tokens=1, eos=NO_EOS)
    assert end(events).text == "-" and notes(events, "accepted") == [{"to": 0, "rule": "-"}]
    events = run(model, strategy, max_tokens=2, eos=NO_EOS)
    assert end(events).text[0] == "+" and notes(events, "rewind")[0]["to"] == 0


# -- hard rules -----------------------------------------------------------------------------------


def brute_force(text: str, phrases: Sequence[str]) -> list[str]:
    """Independent of the matcher: every phrase at every place, by slices."""
    found = []
    for phrase in phrases:
        for at in range(len(text) - len(phrase) + 1):
            before, after = text[at - 1 : at], text[at + len(phrase) :][:1]
            cut = (phrase[0].isalpha() and before.isalpha()) or (
                phrase[-1].isalpha() and after.isalpha()
            )
            if text[at : at + len(phrase)].lower() == phrase.lower() and not cut:
                found.append(phrase)
    return found


@pytest.mark.parametrize("inner", [Sample(), Bursts(size=4)])
def test_no_hard_rule_ever_matches(inner: Any) -> None:
    tokenizer = ToyTokenizer([b"a", b"b", b"ab", b" ", b"A", b" b", b".", b"ba "])
    phrases = ("a b", "ab", "b.", "ba ab", ". a")
    suppressed = hits = 0
    strategy = Antislop(
        phrases=phrases, regexes=(r"b\s+b",), ngrams=("abab bab",), inner=inner, span=100
    )
    models = [TableModel(order=1, tokenizer=tokenizer, seed=seed) for seed in range(5)]
    for seed in range(500):
        text, told = quick(models[seed % 5], strategy, max_tokens=10, seed=seed)
        gone = {note["suppressed"]["rule"] for note in told if "suppressed" in note}
        text = text.replace("<bos>", "").replace("<eos>", "").lower()
        assert set(brute_force(text, phrases)) <= gone, text
        assert bool(re.search(r"b\s+b", text)) <= (r"b\s+b" in gone)
        assert bool(re.search(r"\babab\W+bab\b", text)) <= ("abab bab" in gone)
        suppressed += bool(gone)
        hits += any("rewind" in note for note in told)
    assert hits > 250 and suppressed < 150


def test_nothing_else_is_possible() -> None:
    model = letters({"a": 1.0, "b": 0.0})
    events = run(model, Antislop(phrases=("aaa",), chain=GREEDY), max_tokens=3, eos=NO_EOS)
    assert end(events).text == "aaa" and end(events).reason == "length"
    assert notes(events, "suppressed") == [{"to": 0, "rule": "aaa", "why": "mass"}]


def test_without_force_a_greedy_chain_leaves_no_choice() -> None:
    model = letters({"-": 0.6, "+": 0.4})
    strategy = Antislop(phrases=("-",), chain=GREEDY, force=False)
    events = run(model, strategy, max_tokens=4, eos=NO_EOS)
    assert end(events).text == "----" and len(notes(events, "suppressed")) == 4
    forced = run(model, replace(strategy, force=True), max_tokens=4, eos=NO_EOS)
    assert end(forced).text == "++++" and not notes(forced, "suppressed")


def test_the_chain_that_allows_nothing_else_is_obeyed() -> None:
    from steersman.core.logits import LogitBias

    chain = Chain((LogitBias(bias={1: -np.inf, 2: -np.inf, 3: -np.inf}),))
    events = run(letters(AB), Antislop(phrases=("-",), chain=chain), max_tokens=3, eos=NO_EOS)
    assert end(events).text == "---" and len(notes(events, "suppressed")) == 3


def test_retries_are_bounded() -> None:
    """Every beginning leads to the same end, so only giving up helps."""
    pieces = [bytes([i]) for i in range(ord("a"), ord("z"))] + [b"!"]
    tokenizer = ToyTokenizer(pieces)
    table = np.zeros((tokenizer.vocab_size + 1, tokenizer.vocab_size))
    table[:, :25] = 1 / 25
    table[:25] = 0
    table[:25, 25] = 1
    model = TableModel(order=1, table=table, tokenizer=tokenizer)
    strategy = Antislop(regexes=(r"[a-z]!.?",), retries=7)
    events = run(model, strategy, prompt=(25,), max_tokens=40, eos=NO_EOS)
    assert len(notes(events, "rewind")) >= 7
    assert notes(events, "suppressed")[0]["why"] == "retries"
    assert end(events).reason == "length" and len(end(events).token_ids) == 40


def test_tokens_in_all_are_bounded() -> None:
    model = letters({chr(i): 1 / 20 for i in range(ord("a"), ord("u"))})
    strategy = Antislop(regexes=(r"[a-z]{10}(?=.)",), retries=1000)
    events = run(model, strategy, max_tokens=30, eos=NO_EOS)
    assert {fact["why"] for fact in notes(events, "suppressed")} == {"steps"}
    assert len(end(events).token_ids) == 30
    drawn = sum(isinstance(e, TokenEvent) for e in events)
    assert drawn <= 4 * 30 + 30
    assert model.calls["tokens"] <= 2 * (4 * 30 + 30)


# -- where it begins and ends ---------------------------------------------------------------------


class Scripted(TableModel):
    """Says a text; where it has been sent back, what comes next in its list of alternatives."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        pieces = sorted({piece for text in texts for piece in text if piece})
        super().__init__(
            order=0,
            tokenizer=ToyTokenizer([p.encode("utf-8", "surrogateescape") for p in pieces]),
            table=np.full(len(pieces) + 2, 1 / (len(pieces) + 2)),
        )
        self.ids = {piece: i for i, piece in enumerate(pieces)} | {"": len(pieces) + 1}
        self.texts = [[self.ids[p] for p in text] for text in texts]

    def probs(self, history: Sequence[int]) -> np.ndarray:
        said = [int(t) for t in history[1:]]
        p = np.full(self.tokenizer.vocab_size, 1e-12)
        for rank, text in enumerate(self.texts):
            if text[: len(said)] == said and len(text) > len(said):
                p[text[len(said)]] += 0.1**rank
        return p / p.sum()


def said(texts: Sequence[Sequence[str]], strategy: Antislop, **options: Any) -> list[Event]:
    return run(Scripted(texts), replace(strategy, chain=GREEDY), **options)


def test_word_boundaries_wait_for_the_next_character() -> None:
    ban = Antislop(phrases=("cat",))
    events = said([["a ", "cat", "ion", "."]], ban, max_tokens=4)
    assert end(events).text == "a cation." and not notes(events, "rewind")
    events = said([["con", "cat", "."]], ban, max_tokens=3)
    assert end(events).text == "concat." and not notes(events, "rewind")
    events = said([["a ", "cat", "[x]"], ["a ", "dog", "!"]], ban, max_tokens=3)
    assert end(events).text == "a dog!"
    (rewind,) = notes(events, "rewind")
    assert rewind["to"] == 1 and rewind["rule"] == "cat" and rewind["dropped"] == 2


def test_match_first_then_stop() -> None:
    ban = Antislop(phrases=("cat",))
    events = said([["a ", "cat", ""], ["a ", "dog", ""]], ban)
    assert end(events).text == "a dog" and end(events).reason == "eos"
    events = said([["a ", "cat", "x"], ["a ", "dog", "y"]], ban, max_tokens=2)
    assert end(events).text == "a dog" and end(events).reason == "length"
    # An end that is drawn again ends the text; what stands before it is searched once more.
    events = said([["cat", " nap", "."], ["cat", ""], ["dog", ""]], Antislop(phrases=("cat",)))
    assert end(events).text == "dog"


def test_the_prompt_is_not_searched() -> None:
    model = TableModel(order=0, table=letters(AB).table, tokenizer=letters(AB).tokenizer)
    events = run(
        model, Antislop(phrases=("-+",), chain=GREEDY), prompt=(0, 1, 0), max_tokens=2, eos=NO_EOS
    )
    assert not notes(events, "rewind")


def test_a_character_cut_by_tokens() -> None:
    halves = ["\udcf0\udc9f", "\udc99\udc82"]
    events = said([["hi ", *halves, "!"], ["hi ", "you", "!"]], Antislop(phrases=("🙂",)))
    (rewind,) = notes(events, "rewind")
    assert rewind["to"] == 1 and end(events).text.startswith("hi you!")


def test_case_and_letters_that_fold_to_several() -> None:
    ban = Antislop(phrases=("strasse", "i̇x"))
    events = said([["die ", "STRA", "ßE", "."], ["die ", "weg", "."]], ban, max_tokens=4)
    assert notes(events, "rewind")[0]["to"] == 1
    events = said([["İ", "İ", "x", "."], ["y", "."]], ban, max_tokens=4)
    assert not notes(events, "rewind"), "the second letter follows a letter"
    events = said([["İ ", "İ", "x", "."], ["İ ", "y", "."]], ban, max_tokens=3)
    assert notes(events, "rewind")[0]["to"] == 1 and end(events).text.startswith("İ y.")


def test_longest_at_the_earliest_start_and_the_order_of_rules() -> None:
    text = [["x", "-+-", "."], ["x", "*", "."]]
    events = said(text, Antislop(phrases=("-+", "-+-", "+-"), regexes=(r"-\+",)), max_tokens=3)
    assert notes(events, "rewind")[0]["rule"] == "-+-"
    events = said(text, Antislop(phrases=("+-",), regexes=(r"-\+",)), max_tokens=3)
    assert notes(events, "rewind")[0]["rule"] == "+-"  # same token, phrases first


def test_slow_regex_is_switched_off() -> None:
    strategy = Antislop(regexes=(r"(?:x|xx)+[^x]",), regex_timeout=0.001)
    model = letters({"x": 1.0})
    events = run(model, strategy, max_tokens=40, eos=NO_EOS)
    assert end(events).text == "x" * 40
    assert notes(events, "slow") == [[strategy.regexes[0]]]


# -- what a listener sees -------------------------------------------------------------------------


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


# -- caches ---------------------------------------------------------------------------------------


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


# -- composition ----------------------------------------------------------------------------------


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
