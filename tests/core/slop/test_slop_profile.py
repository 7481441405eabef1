"""What texts over-use: counts, ranks, quotas, and reading what they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steersman.core.errors import InvalidInput, MissingFile
from steersman.core.slop import Human, Quotas, count_texts, human_of_texts, read_human, slop_profile
from steersman.core.slop.texts import read_texts

SLOPPY = [
    f"A testament to the {thing}, the tapestry of {thing} shimmered in the moonlight."
    for thing in ("river", "forest", "city", "ocean", "garden")
]
PLAIN = [
    f"We went to the {thing} and saw the {thing} in the rain, then drove home tired."
    for thing in ("river", "forest", "city", "ocean", "garden")
]


def test_counts_by_hand() -> None:
    counts = count_texts(["The old sailor's boat, the old boat!", "Don't row 300 boats."])
    assert counts.texts == 2
    assert counts.words == {"sailor": 1, "boat": 2, "boats": 1}  # "old" and "row" are too short
    assert counts.ngrams[2][("old", "sailor")] == 1
    assert counts.ngrams[2][("old", "boat")] == 1
    assert counts.ngrams[3][("boat", "old", "boat")] == 1  # "the" between them is a stopword
    assert counts.spread["boat"] == 1
    assert counts.per_100k(("old", "boat")) == pytest.approx(1e5 / counts.chars)


def test_ranking_formula() -> None:
    table = {"tapestry": 1e-5, "moonlight": 1e-4, "river": 0.5}
    human = Human(source="table", word_frequency=lambda word: table.get(word, 0.0))
    counts = count_texts(SLOPPY)
    found = slop_profile(SLOPPY, counts, human, min_texts=2)
    words = {entry.text: entry for entry in found.words}
    rate = 5 / counts.words_total
    assert words["tapestry"].ratio == pytest.approx(rate / 1e-5)
    assert words["tapestry"].score == pytest.approx(rate / 1e-5 * rate**0.75 / 1e-5**0.75)
    assert words["shimmered"].kind == "rare word"
    assert words["shimmered"].ratio is None
    assert "river" not in words  # people use it more often
    known = [entry.text for entry in found.words if entry.kind == "word"]
    assert known == ["tapestry", "moonlight"]


def test_against_human_texts() -> None:
    found = slop_profile(SLOPPY, count_texts(SLOPPY), human_of_texts(PLAIN, source="plain"))
    assert {"testament", "tapestry", "shimmered", "moonlight"} == {e.text for e in found.words}
    assert "shimmered moonlight" in {e.text for e in found.ngrams}
    same = slop_profile(PLAIN, count_texts(PLAIN), human_of_texts(PLAIN, source="plain"))
    assert same.words == ()


def test_phrases_are_exact_wordings() -> None:
    texts = ["He took a deep breath again. Breath by breath."] * 3 + ["She took the deep breath."]
    human = Human(source="none", word_frequency=lambda word: 1.0)
    found = slop_profile(texts, count_texts(texts), human)
    phrases = {entry.text: entry for entry in found.phrases}
    assert phrases["took a deep breath"].count == 3
    assert phrases["took a deep breath"].texts == 4
    assert not any("." in text for text in phrases)  # "breath. Breath by breath" crosses sentences
    allowed = {"took a DEEP breath"}
    found = slop_profile(texts, count_texts(texts), human, allowed=allowed)
    assert "took a deep breath" not in {entry.text for entry in found.phrases}


def test_quotas() -> None:
    human = human_of_texts(PLAIN, source="plain")
    none = Quotas(words=0, rare_words=2, known_bigrams=0, new_bigrams=1, known_trigrams=0,
                  new_trigrams=0, phrases=0)  # fmt: skip
    found = slop_profile(SLOPPY, count_texts(SLOPPY), human, quotas=none)
    assert len(found.words) == 2
    assert len(found.ngrams) == 1
    assert found.phrases == ()


def test_published_profile(data_dir: Path) -> None:
    pytest.importorskip("wordfreq")
    human = read_human(data_dir / "slop_lists" / "slop-forensics" / "human_slop_profile.json")
    # 16,488 occurrences in 177,477 texts of 2,913.89 characters.
    assert human.ngrams["first", "time"] == pytest.approx(16488e5 / (177477 * 2913.89))
    assert human.word_frequency("the") > 0.01


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "expected one named profile"),
        ("{", "not a JSON file"),
        ('{"a": {"avg_length": 1}}', "num_texts_analyzed: expected a number"),
        (
            '{"a": {"num_texts_analyzed": 1, "avg_length": 1, "top_bigrams": [3]}}',
            "top_bigrams: expected {ngram",
        ),
    ],
)
def test_bad_human_file(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "human.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=said):
        read_human(path)
    with pytest.raises(MissingFile):
        read_human(tmp_path / "none.json")


def test_reading_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one"}, {"text": "", "error": {"code": "x"}}, "two"]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_texts(path)) == ["one", "two"]
    path.write_text('{"text": 3}\n')
    with pytest.raises(InvalidInput, match=r"a.jsonl:1: text: expected"):
        list(read_texts(path))
    path.write_text('{"text": "x"}\n{')
    with pytest.raises(InvalidInput, match=r"a.jsonl:2: not valid JSON"):
        list(read_texts(path))
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"one\ntwo\n\n\nthree" + b"\n\n\xff\n")
    texts = read_texts(plain)
    assert next(texts) == "one\ntwo"
    with pytest.raises(InvalidInput, match=r"a.txt:7: not UTF-8"):
        list(texts)
    with pytest.raises(MissingFile):
        list(read_texts(tmp_path / "none.txt"))
