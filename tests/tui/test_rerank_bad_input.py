"""Every kind of bad input: one line with file and line number, a count, and the rest goes on."""

import json

import pytest
from rerank_toys import JudgeModel
from test_rerank_cli import call, docids, request, write_requests

from steersman.core import text_lines
from steersman.core.text_lines import numbered_lines


@pytest.fixture
def judge(monkeypatch):
    model = JudgeModel()
    monkeypatch.setattr("steersman.core.load", lambda **options: model, raising=False)
    return model


GOOD = [request("g1", [1, 3, 2]), request("g2", [2, 1])]


def with_candidates(*candidates):
    return {"query": {"text": "flea", "qid": "odd"}, "candidates": list(candidates)}


def doc(text, docid="a", **more):
    return {"docid": docid, "doc": text, **more}


# (line, kind, what is said of it, whether the query is ranked all the same)
CASES = {
    "malformed": ("{oops", "malformed_line", "not JSON: ", False),
    "other shape": ({"query": "q"}, "malformed_line", "candidates: missing", False),
    "query twice": (request("g1", [1, 2]), "duplicate_query", "'g1' was used at", False),
    "document twice": (
        with_candidates(doc("worth 1"), doc("worth 2")),
        "duplicate_document",
        "candidates[1]: 'a': this document stands before",
        True,
    ),
    "empty passage": (
        with_candidates(doc(" "), doc("worth 1", "b")),
        "empty_passage",
        "candidates[0]: 'a': empty passage",
        True,
    ),
    "ten megabytes": (
        with_candidates(doc("worth 2 " + "word " * 2_000_000), doc("worth 3", "b")),
        "long_passage",
        "candidates[0]: 'a': more than 1000000 characters",
        True,
    ),
    "one word of ten megabytes": (
        with_candidates(doc("x" * 10_000_000), doc("worth 3", "b")),
        "long_passage",
        "candidates[0]: 'a': more than 1000000 characters",
        True,
    ),
    "nan": (
        '{"query": "q", "candidates": [{"doc": "a", "score": NaN}]}',
        "not_a_number",
        "NaN is not JSON",
        False,
    ),
    "infinity": (
        '{"query": "q", "candidates": [{"doc": "a", "score": 1e999}]}',
        "not_a_number",
        "candidates[0].score: must be within",
        False,
    ),
    "nan as text": (
        with_candidates(doc("x", score="NaN")),
        "not_a_number",
        "candidates[0].score: must be a number",
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 3])
def test_requests(judge, capsys, tmp_path, case, rows):
    line, kind, told, kept = CASES[case]
    path = write_requests(tmp_path, GOOD[0], line, GOOD[1])
    out = tmp_path / "out.jsonl"
    code, stdout, err = call(
        capsys, "rerank", "--requests-file", path, "--output-jsonl-file", out,
        "--batch-size", rows, "--json",
    )  # fmt: skip
    envelope = json.loads(stdout)
    assert code == 7 and envelope["status"] == "partial"
    (error,) = envelope["errors"]
    assert error["message"].startswith(f"{path}:2: ") and told in error["message"]
    assert len(error["message"]) < 400 and "\n" not in error["message"]
    assert envelope["metrics"]["problems"] == {kind: 1}
    assert f"problems: 1 {kind.replace('_', ' ')}" in err
    lines = out.read_text().splitlines()
    assert len(lines) == 2 + kept
    assert docids(lines[0]) == ["d1", "d2", "d0"] and docids(lines[-1]) == ["d0", "d1"]


def test_all_kinds_at_once_are_counted(judge, capsys, tmp_path):
    lines = [line for line, *_ in CASES.values() if isinstance(line, str) or line["query"] == "q"]
    odd = with_candidates(doc("", "a"), doc("", "a"), doc("", "b"))
    path = write_requests(tmp_path, *GOOD, *lines, odd)
    code, out, err = call(capsys, "rerank", "--requests-file", path, "--json")
    assert code == 7
    assert json.loads(out)["metrics"]["problems"] == {
        "empty_passage": 3, "malformed_line": 2, "not_a_number": 2, "duplicate_document": 1,
    }  # fmt: skip
    assert "(and 2 more of this query)" in err
    code, out, err = call(capsys, "rerank", "--requests-file", path, "--validate-only", "--json")
    assert code == 5 and json.loads(out)["metrics"]["problems"]["empty_passage"] == 3


def test_logits_that_are_not_finite(judge, capsys, tmp_path):
    plain = judge.logits
    judge.logits = lambda text: plain(text) * (float("nan") if "query: sick" in text else 1)
    path = write_requests(tmp_path, GOOD[0], request("s", [1, 2], query="sick"), GOOD[1])
    for rows in (1, 3):
        code, out, err = call(capsys, "rerank", "--requests-file", path, "--batch-size", rows)
        assert code == 7 and len(out.splitlines()) == 2
        assert f"{path}:2: query 's': rerank: judge on toy gave logits that are not finite" in err
        assert "1 failed; problems: 1 backend error" in err


def test_a_line_too_long_for_memory_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(text_lines, "MAX_LINE", 2 << 20)
    path = tmp_path / "in"
    path.write_bytes(b"one\n" + b"x" * (5 << 20) + b"\nthree\n" + b"y" * (3 << 20))
    told = []
    with path.open("rb") as file:
        found = list(numbered_lines(file, "in", told.append))
    assert found == [("in:1", "one"), ("in:3", "three")]
    assert [str(e) for e in told] == [
        f"in:{n}: longer than 2 MiB; one line holds one record" for n in (2, 4)
    ]
    assert {e.kind for e in told} == {"long_line"}


def test_runs_and_collections(judge, capsys, tmp_path):
    (tmp_path / "run").write_text(
        "1 Q0 a 1 3 x\n1 Q0 b 2 2 x\n1 Q0 b 3 1 x\n1 Q0 c 4 nan x\n1 Q0 none 5 0.5 x\n"
        "2 Q0 a 1 1 x\n1 Q0 d\n1 Q0 e 6 inf x\n"
    )
    (tmp_path / "queries").write_text("1\tflea\n1\tflea again\n")
    (tmp_path / "docs").write_text("a\tworth 1\nb\t \nb\tworth 9\nbad line\n")
    out = tmp_path / "out.txt"
    code, stdout, err = call(
        capsys, "rerank", "--run", tmp_path / "run", "--queries", tmp_path / "queries",
        "--collection", tmp_path / "docs", "--output-trec-file", out, "--json",
    )  # fmt: skip
    assert code == 7
    assert [line.split()[2] for line in out.read_text().splitlines()] == ["a", "b"]
    assert json.loads(stdout)["metrics"]["problems"] == {
        "not_a_number": 2, "duplicate_id": 2, "malformed_line": 2, "duplicate_document": 1,
        "empty_passage": 1, "unknown_document": 1, "unknown_query": 1,
    }  # fmt: skip
    for where, told in (
        ("run:3", "document 'b' stands at"),
        ("run:4", "score 'nan' must be within"),
        ("run:5", "document 'none' is not in"),
        ("run:6", "query '2' is not in"),
        ("run:7", "3 fields"),
        ("run:8", "score 'inf' must be within"),
        ("queries:2", "id '1' stands twice"),
        ("docs:2", "'b': empty passage"),
        ("docs:3", "id 'b' stands twice"),
        ("docs:4", "1 columns"),
    ):
        assert f"error: {tmp_path}/{where}: {told}" in err


def test_qrels(judge, capsys, tmp_path):
    pytest.importorskip("ir_measures")
    (tmp_path / "run").write_text("1 Q0 a 1 3 x\n1 Q0 b 2 nan x\n2 Q0 b 1 2 x\n")
    (tmp_path / "qrels").write_text("1 0 a 1\n1 0 ghost 1\n1 0 a 2\n2 0 b\n2 0 b 1\n2 0 b x\n")
    (tmp_path / "docs").write_text("a\tx\nb\ty\n")
    code, out, err = call(
        capsys, "eval", tmp_path / "run", tmp_path / "qrels", "-m", "RR",
        "--collection", tmp_path / "docs", "--json",
    )  # fmt: skip
    envelope = json.loads(out)
    assert code == 7 and envelope["metrics"] == {"RR": 1.0}
    assert envelope["validation"]["problems"] == {
        "not_a_number": 2, "judged_twice": 1, "malformed_line": 1, "unknown_document": 1,
    }  # fmt: skip
    assert f"error: {tmp_path}/qrels:2: document 'ghost' is not in {tmp_path}/docs" in err
    assert f"error: {tmp_path}/qrels:3: 'a' is judged 2 here and 1 before for '1'" in err
    assert "problems: 2 not a number" in err


def test_fewer_rows_than_asked_for_are_told(judge, capsys, tmp_path):
    from steersman.core.model import Capability

    judge.capabilities = Capability.LAST_LOGITS | Capability.ROLLBACK
    path = write_requests(tmp_path, *GOOD)
    code, out, err = call(capsys, "rerank", "--requests-file", path, "--batch-size", 4)
    assert code == 0 and len(out.splitlines()) == 2
    assert "takes one row at a time; --batch-size has no effect" in err
