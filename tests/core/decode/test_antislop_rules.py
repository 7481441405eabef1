"""Antislop: what may and may not stand in a text, under soft and hard rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToyTokenizer

from steersman.core.decode import Antislop, Sample
from steersman.core.decode.events import Event, TokenEvent
from steersman.core.logits import Chain

from .antislop_support import (
    AB,
    GREEDY,
    NO_EOS,
    Bursts,
    brute_force,
    end,
    letters,
    notes,
    quick,
    run,
)

# -- soft rules ------------------------------------------------------------------------------------


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


# -- hard rules ------------------------------------------------------------------------------------


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


# -- where it begins and ends ----------------------------------------------------------------------


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
