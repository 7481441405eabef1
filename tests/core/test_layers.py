"""How a choice of layers is written, checked and named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.core import load
from steersman.core.errors import UsageError
from steersman.core.layers import (
    check_period,
    choose_layers,
    kept_facts,
    layers_text,
    read_layers,
)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (3, (0, 1, 2)),
        ("3", (0, 1, 2)),
        ("3-3", (3,)),
        ("0-2, 5,7-8", (0, 1, 2, 5, 7, 8)),
        ([0, 4], (0, 4)),
        ((1, 2, 9), (1, 2, 9)),
        (10, None),
        ("0-9", None),
        (None, None),
    ],
)
def test_choices(choice: Any, expected: tuple[int, ...] | None) -> None:
    assert choose_layers(choice, 10, model="m") == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("", "write a number"),
        ("a-b", "write a number"),
        ("1,,2", "write a number"),
        ("-3", "write a number"),
        (1.5, "write a number"),
        (True, "write a number"),
        ([], "write a number"),
        ([0, "1"], "write a number"),
        ("9" * 40, "write a number"),
        (0, "at least 1"),
        (-1, "at least 1"),
        ("3-1", "'3-1' is not a rising range"),
        ("0-99999", "not a rising range"),
        ("1,1", "1 stands after 1"),
        ("0-3,2", "2 stands after 3"),
        ([4, 2], "2 stands after 4"),
        (11, "the first 11: m has 10 layers, numbered 0..9"),
        ("9-10", "9-10: m has 10 layers"),
        ([-1, 3], "m has 10 layers"),
    ],
)
def test_bad_choices_are_one_line(choice: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_layers(choice, 10, model="m")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_the_short_form_reads_back(layers: set[int]) -> None:
    assert read_layers(layers_text(sorted(layers))) == tuple(sorted(layers))


def test_names_and_fingerprints_tell_the_layers() -> None:
    whole: Any = kept_facts("m", "abc", {"a": "b"}, None)
    assert whole == {"name": "m", "fingerprint": "abc", "extra": {"a": "b"}}
    some: Any = kept_facts("m", "abc", {"a": "b"}, (0, 1, 5))
    assert some["name"] == "m layers 0-1,5" and some["extra"] == {"a": "b", "layers": "0-1,5"}
    others = {kept_facts("m", f, {}, k)["fingerprint"] for f in "ab" for k in ((0,), (0, 1))}
    assert len(others) == 4 and "abc" not in others


def test_kinds_that_follow_from_the_number_are_kept() -> None:
    check_period((0, 1, 2, 9, 10), 3, where="f", why="w")
    check_period(None, 3, where="f", why="w")
    with pytest.raises(UsageError, match=r"f: w by their number, every 3; layer 4 .* number 2"):
        check_period((0, 1, 4), 3, where="f", why="w")


def test_load_refuses_before_it_looks_for_the_model() -> None:
    with pytest.raises(UsageError, match="rising range"):
        load("no-such-model", layers="4-2")
