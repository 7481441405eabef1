"""Text assembly: incremental UTF-8, stop strings and withdrawal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.core.decode.text import TextAssembler


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


@given(st.text(), st.lists(st.integers(1, 4), max_size=30))
def test_pieces_join_to_the_text(text: str, sizes: list[int]) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assembler = TextAssembler()
    shown = "".join(assembler.append(p) for p in cut(text.encode(), sizes))
    assert text.startswith(shown)
    assert shown + assembler.finish() == text == assembler.shown


@given(st.binary(max_size=40), st.lists(st.integers(1, 4), max_size=30))
def test_broken_utf8_decodes_as_a_whole_would(data: bytes, sizes: list[int]) -> None:
    assembler = TextAssembler()
    for piece in cut(data, sizes):
        assembler.append(piece)
    assembler.finish()
    assert assembler.shown == data.decode("utf-8", "replace")


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=30),
)
def test_the_stop_string_that_is_complete_first_ends_the_text(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    assembler = TextAssembler(stop)
    shown = ""
    for piece in cut(text.encode(), sizes):
        shown += assembler.append(piece)
        if assembler.stopped_by:
            break
    shown += assembler.finish()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert shown == assembler.shown == (text[: min(ends)[1]] if ends else text)


def test_a_forming_stop_string_is_held_back() -> None:
    assembler = TextAssembler(["STOP"])
    assert assembler.append(b"go ST") == "go "
    assert assembler.append(b"AR") == "STAR"
    assert assembler.append(b" STOP now") == " "
    assert assembler.stopped_by == "STOP"
    assert assembler.finish() == ""


@given(st.text(max_size=12), st.lists(st.integers(1, 3), max_size=20), st.data())
def test_keep_withdraws_exactly_what_was_shown(
    text: str, sizes: list[int], data: st.DataObject
) -> None:
    text = text.encode("utf-8", "ignore").decode()
    pieces = cut(text.encode(), sizes)
    assembler = TextAssembler(["zz"])
    for piece in pieces:
        assembler.append(piece)
    if assembler.stopped_by:
        return
    before = assembler.shown
    keep = data.draw(st.integers(0, len(pieces)))
    gone = assembler.keep(keep)
    assert before == assembler.shown + gone
    fresh = TextAssembler(["zz"])
    assert "".join(fresh.append(p) for p in pieces[:keep]) == assembler.shown


@pytest.mark.parametrize("piece", ["😀", "न", "ب"])
def test_split_characters_wait_for_their_last_byte(piece: str) -> None:
    assembler = TextAssembler()
    encoded = piece.encode()
    assert [assembler.append(encoded[i : i + 1]) for i in range(len(encoded))] == [
        *[""] * (len(encoded) - 1),
        piece,
    ]
