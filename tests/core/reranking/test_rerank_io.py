"""Requests and results as JSON lines."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rerank_toys import JudgeModel

from steersman.core.errors import InvalidInput, MissingFile
from steersman.core.reranking import rerank
from steersman.core.reranking.io import (
    dump_line,
    parse_request,
    read_requests,
    result_record,
)
from steersman.core.text_lines import open_text


def lines(*values) -> list[bytes]:
    return [(v if isinstance(v, str) else json.dumps(v)).encode() + b"\n" for v in values]


def request(qid="1", **more):
    return {
        "query": {"text": "flea", "qid": qid},
        "candidates": [{"docid": "d1", "score": 2.0, "doc": "worth 1"}],
        **more,
    }


def test_full_form():
    (found,) = read_requests(lines(request()), "in.jsonl")
    assert (found.qid, found.query, found.source) == ("1", "flea", "in.jsonl:1")
    assert found.candidates[0].docid == "d1" and found.scores() == [2.0]


def test_plain_strings():
    (found,) = read_requests(lines({"query": "flea", "candidates": ["a", "b"]}), "in")
    assert found.qid == "line-1"
    assert [(c.docid, c.text, c.score) for c in found.candidates] == [
        ("1", "a", None),
        ("2", "b", None),
    ]
    assert found.scores() is None


@pytest.mark.parametrize("key", ["text", "contents", "content", "segment", "body", "passage"])
def test_document_objects(key):
    doc = {"title": "Fleas", key: "eat blood"}
    value = {"query": "q", "candidates": [{"docid": 7, "doc": doc}]}
    (found,) = read_requests(lines(value), "in")
    assert found.candidates[0].text == "Title: Fleas Content: eat blood"
    assert found.candidates[0].docid == "7"


def test_blank_lines_and_byte_order_mark():
    data = [b"\xef\xbb\xbf" + lines(request("1"))[0], b"\n", b"  \r\n", *lines(request("2"))]
    assert [r.source for r in read_requests(data, "in")] == ["in:1", "in:4"]


def test_reading_is_lazy():
    def source():
        yield lines(request("1"))[0]
        raise AssertionError("read ahead")

    assert next(iter(read_requests(source(), "in"))).qid == "1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"in:1: not JSON: .* at column 2"),
        ("[]", "in:1: must be an object, got a list"),
        ({"query": "q"}, "in:1: candidates: missing"),
        ({"candidates": []}, "in:1: query: missing"),
        ({"query": " ", "candidates": []}, "in:1: query: must be text that is not empty"),
        ({"query": {"qid": "1"}, "candidates": []}, "in:1: query: must be text"),
        ({"query": {"text": "q", "qid": 1.5}, "candidates": []}, "in:1: query.qid: must be"),
        ({"query": "q", "candidates": {}}, "in:1: candidates: must be a list, got an object"),
        ({"query": "q", "candidates": [3]}, r"in:1: candidates\[0\]: must be an object or text"),
        ({"query": "q", "candidates": [{"docid": "a"}]}, r"in:1: candidates\[0\].doc: missing"),
        ({"query": "q", "candidates": [{"doc": {"url": "x"}}]}, "has none of text, contents"),
        ({"query": "q", "candidates": [{"doc": {"text": 3}}]}, r"doc.text: must be text"),
        ({"query": "q", "candidates": [{"doc": "x", "score": "3"}]}, "score: must be a number"),
        ('{"query": "q", "candidates": [{"doc": "x", "score": NaN}]}', "NaN is not JSON"),
        ('{"query": "q", "candidates": [{"doc": "x", "score": 1e999}]}', "score: must be within"),
        ('{"query": "q", "query": "r", "candidates": []}', "key 'query' stands twice"),
        ('{"query": "\\ud800", "candidates": []}', "in:1: query: lone surrogate at character 0"),
        ('{"query": "q", "candidates": ' + "[" * 100_000, "in:1: "),
        ('{"query": "q", "candidates": [{"doc": "x", "score": ' + "1" * 5000 + "}]}", "in:1: "),
    ],
)
def test_bad_lines_name_file_line_and_key(line, message):
    with pytest.raises(InvalidInput, match=message):
        list(read_requests(lines(line), "in"))


def test_job_goes_on_after_bad_lines():
    told = []
    data = [*lines(request("1"), "{"), b"\xff\n", *lines(request("1"), request("2"))]
    found = list(read_requests(data, "in", report=told.append))
    assert [r.qid for r in found] == ["1", "2"]
    assert [str(e).split(": ")[0] for e in told] == ["in:2", "in:3", "in:4"]
    assert "was used at in:1" in str(told[2])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["query", "text", "qid", "candidates", "docid", "doc", "score"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_value_is_a_request_or_one_clear_error(value):
    try:
        parse_request(value, "in:1", default_qid="x")
    except InvalidInput as error:
        assert str(error).startswith("in:1: ")


def test_unknown_fields_pass_through():
    value = {
        "query": {"text": "q", "qid": 5, "lang": "en"},
        "candidates": [
            {"docid": "a", "score": 3.0, "doc": {"text": "worth 1", "url": "u"}, "note": [1]},
            {"docid": "b", "score": 2.0, "doc": "worth 2"},
        ],
        "source": {"x": None},
    }
    (found,) = read_requests(lines(value), "in")
    texts = [c.text for c in found.candidates]
    ranking = rerank(JudgeModel(), found.query, texts, scores=found.scores())
    record = json.loads(dump_line(result_record(found, ranking)))
    assert record["query"] == value["query"] and record["source"] == {"x": None}
    assert record["candidates"][1] == {
        "docid": "a",
        "score": 2.0,
        "doc": {"text": "worth 1", "url": "u"},
        "note": [1],
        "rank": 2,
        "logit": 1.0,
    }
    assert record["rerank"]["score_kind"] == "slot"
    assert record["rerank"]["logit_kind"] == "logit"
    # What was written can be read again as a request.
    (again,) = read_requests([dump_line(record).encode()], "out")
    assert [c.docid for c in again.candidates] == ["b", "a"]


def test_plain_strings_come_back_in_full_form():
    (found,) = read_requests(lines({"query": "q", "candidates": ["worth 1", "worth 2"]}), "in")
    ranking = rerank(JudgeModel(), "q", ["worth 1", "worth 2"])
    record = result_record(found, ranking)
    assert record["query"] == {"text": "q", "qid": "line-1"}
    assert [c["docid"] for c in record["candidates"]] == ["2", "1"]


def test_files_may_be_packed(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(lines(request())[0]))
    with open_text(path) as file:
        assert [r.qid for r in read_requests(file, "in")] == ["1"]
    with pytest.raises(MissingFile, match="no such file"):
        open_text(tmp_path / "none")
