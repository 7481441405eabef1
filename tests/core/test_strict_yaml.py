"""Strict YAML: plain data with line numbers, and one clear line for everything else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from steersman.core import strict_yaml
from steersman.core.errors import InvalidInput, MissingFile, ProfileError

BILLION_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")
)


def test_values_and_lines() -> None:
    text = (
        "# comment\n"
        "a: 1\n"
        "b:\n"
        "  - x\n"
        "  - {c: 1e-3, d: '1e-3'}\n"
        "e: [1.5, .inf, true, off, null, ~, 0x10, 010, 1_000, 1:30, 2001-01-01]\n"
        "no: 'yes'\n"
    )
    document = strict_yaml.parse(text, source="f.yaml")
    assert document.data == {
        "a": 1,
        "b": ["x", {"c": 0.001, "d": "1e-3"}],
        # Base 60, octal with a plain 0, and dates are what no one means.
        "e": [1.5, float("inf"), True, False, None, None, 16, 10, 1000, "1:30", "2001-01-01"],
        "no": "yes",
    }
    assert document.line(("b", 1, "d")) == 5
    assert document.line(("e", 3)) == 6
    assert document.line(("b", 1, "nowhere", "deeper")) == 5
    with pytest.raises(ProfileError, match=r"^f\.yaml:5: b\.1\.c: wrong$"):
        document.error(("b", 1, "c"), "wrong")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION_LAUGHS, r"f:1: anchors \(&a\) are not allowed"),
        ("a: *x", r"f:1: aliases \(\*x\) are not allowed"),
        ("a: 1\nb: 2\na: 3", r"f:3: a: given twice \(first on line 1\)"),
        ("x:\n  a: 1\n  a: 2", r"f:3: x\.a: given twice"),
        ("a: !!python/object/apply:os.system [ls]", r"f:1: tags \(.*os.system\) are not allowed"),
        ("a: !!str 1", r"f:1: tags"),
        ("a: 1\n---\nb: 2", r"f:2: a second document"),
        ("[" * 100_000, r"f:1: nested deeper than 12"),
        ("{a: " * 100_000, r"f:1: nested deeper than 12"),
        ("- " * 50_000, r"f:1: nested deeper than 12"),
        ("[" + "x," * 30_000 + "]", r"f:1: more than 20000 values"),
        ("a" * (1 << 20) + "b", r"f: larger than"),
        ("a: .nan", r"f:1: \.nan: not a number"),
        ("a: [", r"f:2?1?: not valid YAML"),
        ("a: b: c", r"f:1: not valid YAML"),
        ("? [a]\n: 1", r"f:1: a key must be plain text"),
        ("<<: {a: 1}", r"f:1: merge keys"),
        ("a: \x1b[2J", r"f: not valid YAML"),
        ("a: \x00", r"f: not valid YAML"),
        ('a: "\\ud800"', r"not valid YAML"),
    ],
)
def test_refusals_are_one_line_and_quick(text: str, message: str) -> None:
    begin = time.process_time()
    with pytest.raises(ProfileError, match=message) as caught:
        strict_yaml.parse(text, source="f")
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 30  # a bomb would take years, not seconds


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(MissingFile, match=r"x\.yaml: no such file"):
        strict_yaml.read(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")  # with a byte-order mark
    assert strict_yaml.read(path).data == {"a": 1}
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(InvalidInput, match=r"x\.yaml:2: not UTF-8"):
        strict_yaml.read(path, error_type=InvalidInput)
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ProfileError, match="larger than"):
        strict_yaml.read(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        strict_yaml.read(tmp_path)
    path.write_bytes(b"")
    assert strict_yaml.read(path).data is None


def test_one_setting() -> None:
    def one(text: str) -> object:
        return strict_yaml.parse_scalar(text, source="-o")

    assert one("0.5") == 0.5 and one("1e-3") == 0.001 and one("4") == 4
    assert one("true") is True and one("off") is False
    assert one("[a, b]") == ["a", "b"] and one("{5: -.inf}") == {"5": float("-inf")}
    assert one("'0.5'") == "0.5"
    assert one("[a") == "[a" and one("a: b: c") == "a: b: c" and one("*x") == "*x"


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["Cc"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abcxyz_-", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_PLAIN)
def test_what_yaml_writes_is_read_back(value: object) -> None:
    class NoAliases(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    # allow_unicode=False escapes what YAML would refuse raw.
    text = yaml.dump(value, Dumper=NoAliases)
    assert strict_yaml.parse(text, source="f").data == value
