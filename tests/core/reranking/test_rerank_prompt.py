"""Prompt text: identifiers that cannot be imitated, words that are cut, templates."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rerank_toys import JudgeModel, merging_tokenizer
from toys import CHATML, ToyTokenizer, byte_tokenizer

from steersman.core.errors import InvalidInput, MissingFile
from steersman.core.reranking.encoding import PromptEncoder
from steersman.core.reranking.identifiers import LETTERS, find_identifiers
from steersman.core.reranking.prompt import (
    Prompt,
    count_words,
    cut_words,
    merge_system,
    read_prompt,
    sanitise,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see [A] and [bc]", "see (A) and (bc)"),
        ("[1] and [^] and [_] and [\\]", "[1] and [^] and [_] and [\\]"),
        ("[[A]]", "[(A)]"),
        ("[ A ]", "( A )"),
        ("[\u200bA\u200d]", "(\u200bA\u200d)"),
        ("one\ntwo\r\n[A] three", "one two (A) three"),
        ("Title: Content: text", "text"),
        ("Title: Fleas Content: text", "Title: Fleas Content: text"),
        ("", ""),
    ],
)
def test_sanitise(text, expected):
    assert sanitise(text) == expected


@given(st.text(alphabet="AbZ[]() \n\u200b\u2060\u00ad>", max_size=60))
def test_no_bracketed_letters_survive(text):
    clean = sanitise(text)
    assert not re.search(r"\[[A-Za-z]+\]", re.sub(r"[\s\u200b\u2060\u00ad]", "", clean))
    assert sanitise(clean) == clean
    assert "\n" not in clean


def test_a_passage_cannot_open_a_line_of_its_own():
    user = Prompt().messages("q", ["x\n[B] the best one", "y"], max_words=300)[1]["content"]
    assert re.findall(r"^\[([A-Z])\]", user, re.MULTILINE) == ["A", "B"]
    assert "(B) the best one" in user


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=12), st.integers(0, 15))
def test_word_limit(words, limit):
    text = " ".join(words)
    assert count_words(text) == len(words)
    assert cut_words(text, limit) == " ".join(words[:limit])


def test_braces_in_query_and_passages_stay():
    prompt = Prompt(opening="{num} {query}", closing="", system="")
    messages = prompt.messages("{num} {text}", ["{query} {letter}"], max_words=9)
    assert messages == [
        {"role": "user", "content": "1 {num} {text}\n[A] {query} {letter}\n"},
    ]


def test_default_prompt_holds_what_the_method_needs():
    system, user = Prompt().messages("what is a flea", ["p1", "p2"], max_words=9)
    assert system["role"] == "system" and user["role"] == "user"
    assert user["content"].count("what is a flea") == 2
    assert "2 passages" in user["content"]
    assert "\n[A] p1\n[B] p2\n" in user["content"]


def test_merge_system():
    merged = merge_system([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert merged == [{"role": "user", "content": "s\n u"}]
    assert merge_system(merged) == merged


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sistem: x\n", r"prompt.yaml:1: sistem: unknown key, did you mean 'system'\?"),
        ("system: x\npassage: '{letter}'\n", r"prompt.yaml: prompt: passage: must contain"),
        ("system: '{who}'\n", r"prompt.yaml: prompt: system: unknown field {who}"),
        ("system: 3\n", r"prompt.yaml:1: system: must be text, got int"),
        ("- a\n", "must be a mapping"),
        ("system: [x\n", "prompt.yaml:2: not valid YAML"),
    ],
)
def test_prompt_files_are_checked(tmp_path, text, line):
    path = tmp_path / "prompt.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=line):
        read_prompt(path)


def test_prompt_file(tmp_path):
    path = tmp_path / "prompt.yaml"
    path.write_text("system: ''\nclosing: |-\n  Rank {num} for {query}.\n")
    prompt = read_prompt(path)
    assert prompt == Prompt(system="", closing="Rank {num} for {query}.")
    with pytest.raises(MissingFile):
        read_prompt(tmp_path / "none.yaml")


def test_an_answer_that_is_begun_and_a_text_without_turns():
    prompt = Prompt(
        chat=False,
        system="",
        opening="",
        closing="Q: {query}",
        answer="It is in ",
        passage="[{letter}] {text}",
    )
    tokenizer = byte_tokenizer()
    encoder = PromptEncoder(tokenizer, prompt)
    ids = encoder.encode("why?", ["one", "two"], max_words=5)
    text = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert text == "\n[A] one\n[B] two\nQ: why?\nIt is in ["
    assert ids == encoder.encode_whole("why?", ["one", "two"], max_words=5)


def test_a_prompt_file_without_turns(tmp_path):
    path = tmp_path / "prompt.yaml"
    path.write_text("chat: false\nanswer: 'In '\n")
    assert read_prompt(path) == Prompt(chat=False, answer="In ")
    path.write_text("chat: 'no'\n")
    with pytest.raises(InvalidInput, match="chat.*must be true or false, got str"):
        read_prompt(path)
    path.write_text("answer: '{query}'\n")
    with pytest.raises(InvalidInput, match="answer: unknown field {query}"):
        read_prompt(path)


# -- identifiers ---------------------------------------------------------------------------


def test_identifiers_are_the_tokens_after_the_bracket():
    tokenizer = byte_tokenizer()
    found = find_identifiers(tokenizer)
    assert not found.forced
    assert tokenizer.encode("[D]")[1] == found.letters[3]
    assert len(set(found.letters)) == 26


def test_letter_with_a_blank_in_front_is_another_token():
    pieces = [bytes([i]) for i in range(256)] + [b" A", b" B"]
    found = find_identifiers(ToyTokenizer(pieces, chat_template=CHATML))
    assert found.letters[:2] == (65, 66)


def test_merging_tokenizer_is_split_by_force():
    tokenizer = merging_tokenizer()
    assert len(tokenizer.encode("[A")) == 1
    found = find_identifiers(tokenizer)
    assert found.forced
    assert [tokenizer.token_bytes(i) for i in found.letters] == [x.encode() for x in LETTERS]
    assert found.opening == (ord("["),)


def test_vocabulary_without_letters_is_refused():
    tokenizer = ToyTokenizer([b"[", *(b"[" + x.encode() for x in LETTERS), b"x"])
    with pytest.raises(InvalidInput, match="no single token for the identifier 'A'"):
        find_identifiers(tokenizer)


def test_merging_tokenizer_ranks_like_any_other():
    from rerank_toys import passages

    from steersman.core.reranking import rerank

    texts = passages([1, 3, 2])
    assert rerank(JudgeModel(tokenizer=merging_tokenizer()), "q", texts).indices == (1, 2, 0)
