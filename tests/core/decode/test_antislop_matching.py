"""Finding what is banned: against a search of the whole text, token by token, and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.core import strict_yaml
from steersman.core.decode.antislop import Antislop, Rule
from steersman.core.decode.antislop.matching import Matcher, fold
from steersman.core.decode.antislop.rules import openings, read_phrases
from steersman.core.decode.antislop.transcript import Transcript
from steersman.core.decode.antislop.words import is_word_char, words
from steersman.core.decode.types import Token
from steersman.core.errors import InvalidInput, MissingFile, ProfileError, UsageError
from steersman.core.profile import load_profile
from steersman.core.profile_build import from_document


class Bytes:
    """Every token is the bytes that it names; made as the text is cut."""

    special_ids = frozenset({0})

    def __init__(self) -> None:
        self.pieces = [b""]

    def token(self, piece: bytes) -> Token:
        self.pieces.append(piece)
        return Token(id=len(self.pieces) - 1)

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]


def watch(pieces: list[bytes], rules: list[Rule], **options: Any) -> set[tuple[int, Rule]]:
    """Return every (token, rule) found while a text grows token by token and ends."""
    tokenizer: Any = Bytes()
    settings = {"stopwords": False, "span": 400, "timeout": 2.0} | options
    matcher = Matcher(rules, **settings)
    found: set[tuple[int, Rule]] = set()
    transcript = Transcript()
    for place, piece in enumerate([*pieces, None]):
        since, final = len(transcript.text), piece is None
        if piece is not None:
            transcript = transcript.append(tokenizer.token(piece), tokenizer)
        while (hit := matcher.find(transcript, since, final=final, allowed=found)[0]) is not None:
            assert hit.token < max(1, place + 1)
            found.add((hit.token, hit.rule))
    return found


def phrase(text: str) -> Rule:
    return Rule(0, text, 0.0)


def everywhere(text: str, rule: Rule) -> list[int]:
    """Return the characters at which ``rule`` begins in a whole text, by comparing slices."""
    wanted = fold(rule.text)
    found = []
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            if fold(text[start:end]) != wanted:
                continue
            before, after = fold(text[:start])[-1:], fold(text[end:])[:1]
            left = before and is_word_char(wanted[0]) and is_word_char(before)
            right = after and is_word_char(wanted[-1]) and is_word_char(after)
            if not left and not right:
                found.append(start)
    return found


ALPHABET = "ab .-ßsİi\u0301é’'🙂"


@settings(max_examples=150, deadline=None)
@given(
    st.text(ALPHABET, max_size=24),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=5, unique=True),
    st.lists(st.integers(1, 5), max_size=30),
)
def test_growing_finds_what_a_search_of_the_whole_text_finds(
    text: str, phrases: list[str], cuts: list[int]
) -> None:
    rules = [phrase(p) for p in phrases]
    data, pieces = text.encode(), []
    for size in cuts:
        pieces.append(data[:size])
        data = data[size:]
    pieces.append(data)
    starts = [len(text[:i].encode()) for i in range(len(text))]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    expected = set()
    # Two spellings that fold alike are one phrase.
    for rule in {fold(r.text): r for r in reversed(rules)}.values():
        for at in everywhere(text, rule):
            expected.add((next(i for i, e in enumerate(ends) if e > starts[at]), rule))
    assert watch(pieces, rules) == expected


def test_word_boundaries() -> None:
    cat = phrase("cat")
    for text, hit in [
        ("cation", False),
        ("concat", False),
        ("cat[x]", True),
        ("CAT", True),
        ("a cat", True),
        ("cat_", True),
        ("cat9", False),
        ("cat\u0301", False),
        ("\u0441at cat's", True),
    ]:
        assert bool(watch([text.encode()], [cat])) == hit, text
        assert bool(watch([bytes([b]) for b in text.encode()], [cat])) == hit, text
    assert watch([b"cat[x]"], [phrase("cat[")])
    assert watch([b"it\xe2\x80\x99s a cat"], [phrase("it's a")])


def test_cost_does_not_depend_on_what_was_searched_before() -> None:
    """A search that has seen all but the end looks at no more than the end."""
    looked: list[str] = []

    class Spy(str):
        def __getitem__(self, key: Any) -> str:
            looked.append(str.__getitem__(self, key))
            return looked[-1]

    matcher = Matcher([phrase("abcd")], stopwords=False, span=10, timeout=1.0)
    transcript = Transcript(text=Spy("x" * 5000 + "abcd."), marks=((5005, b""),))
    hit, _ = matcher.find(transcript, 5004)
    assert hit is None  # it follows a letter
    assert 0 < max(map(len, looked)) < 20


def test_regexes() -> None:
    rule = Rule(1, r"^not .{1,9}? but$", 0.0)
    assert watch([b"x\nNOT this\n", b" but", b"\nthat"], [rule]) == {(0, rule)}
    assert not watch([b"x not this but\n"], [rule])
    wide = Rule(1, r"a.{6}b", 0.0)
    assert watch([bytes([c]) for c in b"..a123456b."], [wide], span=9) == {(2, wide)}
    assert not watch([bytes([c]) for c in b"..a123456b."], [wide], span=5)
    # A match that the next character would undo is none.
    word = Rule(1, r"\bcat\b", 0.0)
    assert not watch([b"cat", b"ion"], [word]) and watch([b"cat"], [word])


def test_ngrams() -> None:
    rule = Rule(2, "voice barely whisper", 0.0)
    text = [b"Her ", b"voice", b" was 2", b" barely", b" a whis", b"per", b"ed"]
    assert not watch(text, [rule])
    assert watch([*text[:-1], b"."], [rule]) == {(1, rule)}
    assert watch(text[:-1], [rule]) == {(1, rule)}
    assert not watch([*text[:4], b" loud", *text[4:6]], [rule])
    assert not watch([b"voice was barely whisper"], [rule], stopwords=True)
    assert watch([b"voice BARELY whisper"], [rule], stopwords=True)
    # "couldn't" counts as "could", but only once it is known how the word ends.
    could = Rule(2, "could help", 0.0)
    assert watch([b"She couldn", b"'", b"t help", b" it"], [could]) == {(0, could)}


def test_words() -> None:
    text = "She couldn’t re-read the 2nd page; it's Zoë's."
    found = [w for w, _, _ in words(text, stopwords=False, final=True)]
    assert found == ["could", "re", "read", "page", "zoë"]
    cut = [w for w, _, _ in words(text, 1, stopwords=True, final=False)]
    assert cut[0] == "could"


def test_openings() -> None:
    from toys import ToyTokenizer

    pieces = [b" tap", b" t", b" ", b"tap", b"ta", b"t", b"T", b"TAP", b"e", b"a", b"A", b"P", b"E"]
    tokenizer: Any = ToyTokenizer(pieces)
    names = {tokenizer.token_name(t) for t in openings("tape", tokenizer)}
    assert names == {" tap", " t", " ", "tap", "ta", "t", "T", "TAP"}


# -- rules from outside ---------------------------------------------------------------------------


def written(folder: Path, text: str | bytes, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_phrases_from_files(tmp_path: Path) -> None:
    lines = written(tmp_path, "# a list\na testament to\r\n\n  #hashtag \n")
    assert read_phrases(lines) == (("a testament to", None), ("#hashtag", None))
    plain = written(tmp_path, '["a ", ["b"]]', "a.json")
    assert read_phrases(plain) == (("a ", None), ("b", None))
    factors = written(tmp_path, '[["a", 0.03], ["b", 1], ["c"]]', "b.json")
    assert read_phrases(factors) == (("a", 0.03), ("b", 1.0), ("c", None))
    counts = written(tmp_path, '[["a", 200], ["b", 1]]', "c.json")
    assert read_phrases(counts) == (("a", None), ("b", None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"good\n\xff", r"list.txt:2: not UTF-8"),
        ("x" * 300, r"list.txt:1: at most 256 characters, got 300"),
        ("[1]", r'item 1: expected "phrase"'),
        ('["a", ["b", true]]', r"item 2: expected"),
        ('[["b", -1]]', r"item 1: the number must be 0 or more"),
        ('[["b", 1e999]]', r"item 1: the number must be 0 or more"),
        ('[["b", NaN]]', r"list.txt: "),
        ('["a", " "]', r"item 2: empty"),
        ('["a",\n]', r"list.txt: not JSON"),
        ("[" * 100_000, r"list.txt: "),
        ("\n".join("abcdefghij" for _ in range(100_002)), r":100001: at most 100000 phrases"),
        (b"x" * (9 << 20), r"larger than 8 MiB"),
    ],
    ids=range(12),
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_phrases(written(tmp_path, text))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no such file"):
        read_phrases(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match="not a file"):
        read_phrases(tmp_path)


def test_a_list_beside_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").mkdir()
    file = written(tmp_path / "lists", "one phrase\nanother\n", "mine.txt")
    path = tmp_path / "p.yaml"
    path.write_text("strategy: {antislop: {phrases: [third], phrases_file: lists/mine.txt}}\n")
    profile = load_profile(path)
    assert [rule.text for rule in profile.strategy.rules] == ["third", "one phrase", "another"]
    # From anywhere, and in its own written form.
    monkeypatch.chdir("/")
    again = from_document(strict_yaml.parse(profile.to_yaml(), source="copy"), name="p")
    assert again.strategy == profile.strategy and again.fingerprint == profile.fingerprint
    # What the file says is part of what the profile is; where it lies is not.
    other = tmp_path / "other"
    other.mkdir()
    (other / "lists").mkdir()
    (other / "p.yaml").write_text(path.read_text())
    (other / "lists" / "mine.txt").write_text(file.read_text())
    before = profile.fingerprint
    assert load_profile(other / "p.yaml").fingerprint == before
    file.write_text("one phrase\n")
    assert load_profile(path).fingerprint != before
    file.unlink()
    message = r"p.yaml:1: strategy.antislop.phrases_file: .*mine.txt: no such file"
    with pytest.raises(ProfileError, match=message):
        load_profile(path)


def test_own_factors_and_strength() -> None:
    strategy = Antislop(
        phrases=("a", "b", "c"), factor=0.5, factors={"b": 0.25, "c": 1.0}, strength=2.0
    )
    assert [(r.text, r.factor) for r in strategy.rules] == [("a", 0.25), ("b", 0.0625)]
    assert Antislop(phrases=("a",), strength=0.0).rules == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phrases: [a, '']", r"phrases: .*item 2: expected some text"),
        ("phrases: a", r"phrases: expected a list"),
        ("regexes: ['(']", r"regexes: .*item 1: '\(': missing \)"),
        ("regexes: ['a*']", r"regexes: .*item 1: 'a\*': matches the empty text"),
        ("ngrams: [of the]", r"ngrams: .*item 1: 'of the': holds stopwords only"),
        ("{phrases: [tapestry], factors: {tapestri: 0.1}}", r"did you mean 'tapestry'"),
        ("{phrases: [a], factors: {a: 2}}", r"factors.*must be in \[0, 1\], got 2"),
        ("factor: -1", r"factor: factor must be in \[0, 1\], got -1"),
        ("span: 0", r"span: span must be an integer, in 1..4000"),
        ("retries: 0", r"retries: retries must be"),
        ("acceptance: never", r"acceptance: expected one of 'argmax', 'draw'"),
        ("inner: {beam: {}}", r"inner: inner BeamSearch cannot be sent back"),
    ],
)
def test_mistakes_in_a_profile(text: str, message: str) -> None:
    inside = text if text.startswith("{") else "{" + text + "}"
    with pytest.raises(ProfileError, match=r"x.yaml:1: strategy.antislop\.?.*" + message):
        from_document(
            strict_yaml.parse(f"strategy: {{antislop: {inside}}}", source="x.yaml"), name="x"
        )


def test_lists_of_the_wrong_kind() -> None:
    with pytest.raises(UsageError, match="phrases must be a list of texts, got 'abc'"):
        Antislop(phrases="abc")  # type: ignore[arg-type]


def test_real_lists(data_dir: Path) -> None:
    folder = data_dir / "slop_lists"
    if not folder.is_dir():
        pytest.skip("the lists are not here")
    for name in ("slop_phrase_prob_adjustments.json", "slop_phrases_2025-04-07.json"):
        file = folder / "antislop-sampler" / name
        strategy = Antislop(phrases_file=str(file))
        assert len(strategy.rules) >= len({json.dumps(x[0]) for x in json.loads(file.read_text())})
