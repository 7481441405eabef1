"""Byte-level probabilities with other tokenizers and other bytes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bpe_toys import prompts_of
from toys import TableModel, ToyTokenizer, byte_tokenizer, small_tokenizer

from steersman.core.decode.byte_level import (
    ByteLevel,
    Cover,
    Settings,
    begin_covers,
)
from steersman.core.decode.byte_level.strategy import second_prompt
from steersman.core.decode.events import TokenEvent
from steersman.core.errors import CapabilityError, UsageError
from steersman.core.logits import Chain, Penalties

from .byte_level_support import EXACT, prompt_of, random_model, run, search

# -- other tokenizers and other bytes --------------------------------------------------------------


def smiling() -> TableModel:
    """A model over letters, "é" whole and a smile in two halves."""
    return TableModel(order=1, seed=1)


def test_a_prompt_that_ends_inside_a_character() -> None:
    model = smiling()
    tokenizer = model.tokenizer
    half = tokenizer.pieces.index(b"\xf0\x9f")
    law, _ = search(model, [0, 1, half]).law()
    assert law.bytes[0x99] == pytest.approx(1)  # nothing else can follow
    for seed in range(5):
        events = run(model, ByteLevel(), [0, 1, half], max_tokens=2, seed=seed)
        drawn = b"".join(e.bytes for e in events if isinstance(e, TokenEvent))
        assert drawn[:1] == b"\x99"


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


# -- what is refused -------------------------------------------------------------------------------


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


def test_a_second_model_must_be_there() -> None:
    model = random_model(3)
    with pytest.raises(CapabilityError, match="needs a model for role 'second'"):
        run(model, ByteLevel(weights=(0.5, 0.5)), prompt_of(model, b"a"))
