"""TREC runs, queries and collections; scores that no evaluator can take for ties."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.core.errors import InvalidInput, UsageError
from steersman.core.reranking import strictly_falling
from steersman.core.reranking.io import Candidate, Request
from steersman.core.reranking.ranking import slot_scores
from steersman.core.reranking.trec import (
    check_trec_names,
    read_qrels,
    read_run,
    read_texts,
    run_requests,
    write_run,
)

RUN = "1 Q0 b 2 1.5 x\n1 Q0 a 1 2.5 x\n2 Q0 a 1 1.0 x\n"


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_run_goes_by_score_then_rank(tmp_path):
    run = read_run(write(tmp_path, "run", RUN + "2 Q0 c 3 1.0 x\n2 Q0 b 2 1.0 x\n"))
    assert {q: [h.docid for h in hits] for q, hits in run.items()} == {
        "1": ["a", "b"],
        "2": ["a", "b", "c"],
    }
    assert run["1"][1].source.endswith("run:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 Q0 a 1 2.5", "run:1: 5 fields, expected 6"),
        ("1 Q0 a first 2.5 x", "run:1: rank 'first' must be a whole number"),
        ("1 Q0 a 1 high x", "score 'high' a number"),
        ("1 Q0 a 1 nan x", "run:1: score 'nan' must be within"),
        ("1 Q0 a 1 1e39 x", "run:1: score '1e39' must be within"),
    ],
)
def test_bad_run_lines(tmp_path, line, message):
    with pytest.raises(InvalidInput, match=message):
        read_run(write(tmp_path, "run", line + "\n"))
    told = []
    run = read_run(write(tmp_path, "run", line + "\n" + RUN), report=told.append)
    assert len(told) == 1 and list(run) == ["1", "2"]


def test_a_document_twice_in_a_query(tmp_path):
    with pytest.raises(InvalidInput, match=r"run:4: document 'a' stands at .*run:2"):
        read_run(write(tmp_path, "run", RUN + "1 Q0 a 3 0.5 x\n"))


def test_queries_and_collections(tmp_path):
    tsv = read_texts(write(tmp_path, "q.tsv", "1\tflea life\n2\tlaw\n"))
    assert tsv == {"1": "flea life", "2": "law"}
    titled = read_texts(write(tmp_path, "c.tsv", "1\tFleas\teat blood\n2\t\tno title\n"))
    assert titled == {"1": "Title: Fleas Content: eat blood", "2": "no title"}
    beir = write(
        tmp_path, "c.jsonl", '{"_id": "1", "title": "T", "text": "x"}\n{"_id": 2, "text": "y"}\n'
    )
    assert read_texts(beir) == {"1": "Title: T Content: x", "2": "y"}
    assert read_texts(beir, only={"2"}) == {"2": "y"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.tsv", "1 no tab\n", "c.tsv:1: 1 columns, expected id<TAB>text"),
        ("c.tsv", "1\tx\n1\ty\n", "c.tsv:2: id '1' stands twice"),
        ("c.jsonl", '{"text": "x"}\n', "c.jsonl:1: _id: must be"),
        ("c.jsonl", '{"_id": "1"}\n', "c.jsonl:1: has none of text"),
        ("c.jsonl", '{"_id": "1", "text": "x"}\n1\tx\n', "c.jsonl:2: not JSON"),
    ],
)
def test_bad_text_lines(tmp_path, name, text, message):
    with pytest.raises(InvalidInput, match=message):
        read_texts(write(tmp_path, name, text))


def test_joining_reports_what_is_missing(tmp_path):
    run = read_run(write(tmp_path, "run", RUN + "3 Q0 a 1 1 x\n"))
    told = []
    found = list(
        run_requests(
            run,
            {"1": "one", "2": "two"},
            {"a": "text of a"},
            queries_name="q.tsv",
            collection_name="c.tsv",
            report=told.append,
        )
    )
    assert [(r.qid, [c.docid for c in r.candidates]) for r in found] == [("1", ["a"]), ("2", ["a"])]
    assert [str(e).rpartition("/")[2] for e in told] == [
        "run:1: document 'b' is not in c.tsv",
        "run:4: query '3' is not in q.tsv",
    ]


# -- scores ------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e30, 1e30), max_size=40))
def test_scores_fall_strictly_in_single_precision(values):
    values = sorted(values, reverse=True)
    fallen = strictly_falling(values)
    single = np.asarray(fallen, np.float32)
    assert (single[1:] < single[:-1]).all()
    # Never raised, and untouched where the input falls by itself.
    assert all(f <= np.float32(v) or f == v for f, v in zip(fallen, values))
    if (np.diff(np.asarray(values, np.float32)) < 0).all():
        assert fallen == values


def test_scores_that_differ_in_double_precision_only_are_taken_apart():
    a, b = 12.3456789012, 12.3456789011
    assert np.float32(a) == np.float32(b)
    fallen = strictly_falling([a, b])
    assert fallen[0] == a and np.float32(fallen[1]) < np.float32(a)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
def test_scores_must_be_finite(bad):
    with pytest.raises(UsageError):
        strictly_falling([bad])


def test_rising_scores_are_no_slots():
    assert slot_scores([0.1, 0.2, 0.3], 3) == [3.0, 2.0, 1.0]
    assert slot_scores(None, 2) == [2.0, 1.0]
    assert slot_scores([5.0, 5.0], 2)[0] == 5.0


def test_written_run_reads_back(tmp_path):
    out = io.StringIO()
    dropped = write_run(out, [("q1", ["a", "b", "a", "c"], [3.0, 3.0, 3.0, 1.0])], tag="t")
    assert dropped == 1
    text = out.getvalue()
    assert [line.split()[:4] for line in text.splitlines()] == [
        ["q1", "Q0", "a", "1"],
        ["q1", "Q0", "b", "2"],
        ["q1", "Q0", "c", "3"],
    ]
    run = read_run(write(tmp_path, "run", text))
    assert [h.docid for h in run["q1"]] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a b", "a\u00a0b", "a\tb", ""])
def test_ids_that_would_break_a_run(name):
    request = Request(
        qid="1", query="q", candidates=(Candidate(docid=name, text="x"),), source="in:3"
    )
    with pytest.raises(InvalidInput, match="in:3: id .* has a blank"):
        check_trec_names(request)


def test_qrels(tmp_path):
    qrels = read_qrels(write(tmp_path, "qrels", "1 0 a 2\n1 0 b 0\n1 0 a 2\n2 0 a -1\n"))
    assert qrels == {"1": {"a": 2, "b": 0}, "2": {"a": -1}}
    for text, message in [
        ("1 0 a\n", "3 fields, expected 4"),
        ("1 0 a high\n", "must be a whole number"),
        ("1 0 a 1\n1 0 a 2\n", "qrels:2: 'a' is judged 2 here and 1 before"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            read_qrels(write(tmp_path, "qrels", text))
