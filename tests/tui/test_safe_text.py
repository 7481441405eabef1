"""The terminal filter: nothing that acts on a terminal passes, ordinary writing does."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.tui.safe_text import is_safe, safe_stream, show, show_line

CONTROLS = [chr(c) for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\t\n"]
BIDI = [chr(c) for c in [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]]
ANY = st.text(st.characters(codec=None))  # surrogates included


def acts_on_terminal(text: str) -> list[str]:
    """Return the characters of ``text`` that a terminal would obey."""
    return [c for c in text if (unicodedata.category(c) == "Cc" and c not in "\t\n") or c in BIDI]


@pytest.mark.parametrize("char", CONTROLS + BIDI, ids=lambda c: f"U+{ord(c):04X}")
def test_every_control_character_is_shown_not_sent(char: str) -> None:
    out = show(f"a{char}b")
    assert char not in out
    assert not acts_on_terminal(out)
    assert out.startswith("a") and out.endswith("b") and len(out) > 2


def test_what_each_looks_like() -> None:
    assert show("\x1b[2J") == "␛[2J"
    assert show("\x9b2J") == "\\x9b2J"
    assert show("a\r\nb") == "a␍\nb"
    assert show("\x7f\x00\x07") == "␡␀␇"
    assert show("\u202eabc\u202c") == "<U+202E>abc<U+202C>"
    assert show("x\ud800y\udfff") == "x<U+D800>y<U+DFFF>"
    assert show("\U000e0041\ufeff\u200b\u2028") == "<U+E0041><U+FEFF><U+200B><U+2028>"
    assert show("a\tb\nc") == "a\tb\nc"
    assert show_line("a\tb\nc\r") == "a␉b␊c␍"


@pytest.mark.parametrize(
    "payload",
    [
        "\x1b]52;c;cm0gLXJmIH4=\x07",  # clipboard
        "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",  # hidden link
        '\x1bP$q"p\x1b\\',  # DCS query
        "\x1b[6n\x1b[c",  # status and attribute queries
        "\x9d52;c;AAAA\x9c",  # the same with C1 introducers
        "ok\rrm -rf",  # overwrite
        "\x1b[1A\x1b[2K",  # erase the line before
    ],
)
def test_known_attacks_whole_and_cut_into_pieces(payload: str) -> None:
    whole = show(payload)
    assert not acts_on_terminal(whole)
    assert "".join(safe_stream(payload)) == whole


@pytest.mark.parametrize(
    "text",
    [
        "naïve café – “quoted” 日本語 한국어",
        "हिन्दी क्‍ष",  # ZWJ inside a conjunct
        "می‌خواهم",  # ZWNJ
        "العربية \u200fنص\u200e",
        "👩‍👩‍👧 ❤️ 🏳️‍🌈 🇫🇷",
        "[bold]not markup[/bold] `code` *md*",
    ],
)
def test_ordinary_writing_is_untouched(text: str) -> None:
    assert show(text) == text
    assert is_safe(text)


@given(ANY, ANY)
def test_stateless_idempotent_and_encodable(a: str, b: str) -> None:
    out = show(a + b)
    assert out == show(a) + show(b)
    assert show(out) == out and is_safe(out)
    assert not acts_on_terminal(out)
    out.encode("utf-8")
    line = show_line(a)
    assert show_line(line) == line and "\n" not in line and "\t" not in line
