"""``steersman rerank`` and ``steersman eval`` from the outside."""

import io
import json
import sys
from dataclasses import replace

import pytest
from rerank_toys import JudgeModel

from steersman.core.reranking.reader import WindowReader
from steersman.core.reranking.trec import read_run
from steersman.tui.cli import main


@pytest.fixture
def judge(monkeypatch):
    """The model that every ``load`` returns; holds the arguments it was opened with."""
    model = JudgeModel()
    model.opened = []

    def load(**options):
        model.opened.append(options)
        return model

    monkeypatch.setattr("steersman.core.load", load, raising=False)
    return model


def call(capsys, *args):
    try:
        code = main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def request(qid, values, query="flea"):
    return {
        "query": {"text": query, "qid": qid},
        "candidates": [
            {"docid": f"d{i}", "score": 9.0 - i, "doc": f"worth {v}"} for i, v in enumerate(values)
        ],
    }


def write_requests(tmp_path, *rows, name="in.jsonl"):
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def docids(line):
    return [c["docid"] for c in json.loads(line)["candidates"]]


@pytest.fixture
def trec(tmp_path):
    """A run, queries and a collection."""
    (tmp_path / "run").write_text(
        "".join(f"{q} Q0 d{i} {i + 1} {9.5 - i} bm25\n" for q in (1, 2) for i in range(4))
    )
    (tmp_path / "queries.tsv").write_text("1\tflea\n2\tlaw\n")
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": f"worth {v}"}) + "\n" for i, v in
                enumerate([1, 3, 0, 2]))
    )  # fmt: skip
    return [
        "--run", tmp_path / "run",
        "--queries", tmp_path / "queries.tsv",
        "--collection", tmp_path / "docs.jsonl",
    ]  # fmt: skip


def test_requests_to_jsonl(judge, capsys, tmp_path):
    path = write_requests(tmp_path, request(1, [1, 3, 2]), request(2, [2, 1]))
    out = tmp_path / "out.jsonl"
    code, stdout, err = call(
        capsys, "rerank", "--requests-file", path, "--output-jsonl-file", out, "-c", 4096
    )
    assert (code, stdout) == (0, "") and "2 queries ranked" in err
    assert [docids(line) for line in out.read_text().splitlines()] == [
        ["d1", "d2", "d0"],
        ["d0", "d1"],
    ]
    first = json.loads(out.read_text().splitlines()[0])["candidates"][0]
    assert first == {"docid": "d1", "score": 9.0, "doc": "worth 3", "rank": 1, "logit": 3.0}
    assert judge.opened[0]["context"] == 4096


def test_trec_in_and_out(judge, capsys, tmp_path, trec):
    out = tmp_path / "out.txt"
    code, _, _ = call(capsys, "rerank", *trec, "--output-trec-file", out, "--tag", "first")
    assert code == 0
    assert out.read_text().splitlines()[0] == "1 Q0 d1 1 9.5 first"
    assert [h.docid for h in read_run(out)["2"]] == ["d1", "d3", "d0", "d2"]
    assert not (tmp_path / "out.txt.records.jsonl").exists()


def test_cut_offs(judge, capsys, tmp_path, trec):
    out = tmp_path / "out.txt"
    code, _, _ = call(
        capsys, "rerank", *trec, "--output-trec-file", out,
        "--top-k-candidates", 3, "--top-k-rerank", 2,
    )  # fmt: skip
    assert code == 0
    assert [h.docid for h in read_run(out)["1"]] == ["d1", "d0"]


def test_first_stage_weight(judge, capsys, tmp_path):
    path = write_requests(tmp_path, request(1, [1, 3, 0, 2]))
    _, alone, _ = call(capsys, "rerank", path)
    _, mixed, _ = call(capsys, "rerank", path, "--first-stage-weight", 1)
    best, _, given_first, _ = docids(alone)
    assert docids(mixed)[:2] == [best, given_first]
    out = tmp_path / "out.jsonl"
    args = ["rerank", path, "--output-jsonl-file", out]
    assert call(capsys, *args, "--first-stage-weight", 1)[0] == 0
    assert docids(out.read_text()) == docids(mixed)
    code, _, err = call(capsys, *args, "--resume")
    assert code == 5 and "first_stage_weight was 1.0 and is now None" in err
    code, _, err = call(capsys, "rerank", path, "--first-stage-weight", -1)
    assert code == 2 and "--first-stage-weight" in err


def test_stdin_streams_to_stdout(judge, capsys, monkeypatch):
    data = '{"query": "q", "candidates": ["worth 1", "worth 2"]}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    code, out, _ = call(capsys, "rerank", "--stdin")
    assert code == 0 and docids(out) == ["2", "1"]


def test_one_request_as_text_and_envelope(judge, capsys):
    text = json.dumps(request("x", [1, 2]), indent=1)
    code, out, _ = call(capsys, "rerank", "--input-json", text, "--json")
    envelope = json.loads(out)
    assert code == 0 and envelope["status"] == "ok" and envelope["command"] == "rerank"
    assert docids(json.dumps(envelope["result"][0])) == ["d1", "d0"]
    assert envelope["metrics"]["windows"] == 1
    assert envelope["resolved"]["settings"]["window"] == 20
    assert envelope["resolved"]["model"]["name"] == "judge"


def test_generate_counts_malformed_answers(judge, capsys):
    judge.answer = lambda letters: f"[{letters[0]}]"
    text = json.dumps(request("x", [1, 2]))
    code, out, err = call(capsys, "rerank", "--input-json", text, "--json", "--method", "generate")
    envelope = json.loads(out)
    assert code == 0 and envelope["metrics"]["malformed_answers"] == 1
    assert envelope["result"][0]["rerank"]["method"] == "generate"
    assert "1 answers were no permutation" in err


# -- problems ----------------------------------------------------------------------------------


def test_bad_lines_are_named_and_the_job_goes_on(judge, capsys, tmp_path):
    path = write_requests(tmp_path, request(1, [1, 2]), "{oops", request(2, [1, 2]))
    code, out, err = call(capsys, "rerank", "--requests-file", path)
    assert code == 7 and len(out.splitlines()) == 2
    assert f"error: {path}:2: not JSON" in err


def test_a_query_that_does_not_fit_fails_alone(judge, capsys, tmp_path):
    room = len(WindowReader(judge).encode("flea", ["w 1", "w 2"], max_words=1)) + 20
    judge.info = replace(judge.info, context=room)
    path = write_requests(tmp_path, request(1, [1] * 30), request(2, [1, 2]))
    code, out, err = call(capsys, "rerank", "--requests-file", path, "--max-words", 1)
    assert code == 7 and len(out.splitlines()) == 1
    assert f"{path}:1: query '1': rerank: 20 passages need" in err


def test_nothing_usable(judge, capsys, tmp_path):
    path = write_requests(tmp_path, "{oops")
    assert call(capsys, "rerank", "--requests-file", path)[0] == 5


def test_many_problems_are_counted_and_not_all_shown(judge, capsys, tmp_path):
    path = write_requests(tmp_path, *["{"] * 50, request(1, [1, 2]))
    code, out, err = call(capsys, "rerank", "--requests-file", path, "--json")
    envelope = json.loads(out)
    assert code == 7 and len(envelope["errors"]) == 20
    assert envelope["metrics"]["input_problems"] == 50
    assert "30 more problems are not shown" in err


def test_control_characters_in_a_file_do_not_reach_the_terminal(judge, capsys, tmp_path):
    path = write_requests(tmp_path, '{"query": "q", "candidates": "\\u001b]52;c;x\\u0007"}')
    row = request("\x1b[2J", [1, 2], query="\x1b]0;x\x07")
    row["candidates"].append({"docid": "\x9b2J", "doc": 3})
    bad = write_requests(tmp_path, row, name="bad.jsonl")
    for file in (path, bad):
        _, out, err = call(capsys, "rerank", "--requests-file", file)
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in out + err)
    good = write_requests(tmp_path, request("\x1b[2J", [1, 2], query="\x1b]0;x\x07"), name="g")
    code, out, err = call(capsys, "rerank", "--requests-file", good)
    assert code == 0 and json.loads(out)["query"]["qid"] == "\x1b[2J"
    assert not any(ord(c) < 32 and c != "\n" for c in out + err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give one of --requests-file"),
        (["--stdin", "--input-json", "{}"], "got --input-json and --stdin"),
        (["--run", "r"], "needs --queries and --collection"),
        (["--stdin", "--queries", "q"], "go with --run"),
        (["--stdin", "--resume"], "--resume: needs --output-jsonl-file"),
        (["--stdin", "--window-size", "27"], "27 is not in 2..26"),
        (["--stdin", "--window-size", "5", "--stride", "6"], "more would skip passages"),
        (["--stdin", "--method", "generate", "--permutations", "2"], "go with --method first"),
        (["--stdin", "--tag", "a b"], "must be one word"),
    ],
)
def test_bad_arguments_are_told_before_the_model_is_loaded(judge, capsys, args, message):
    code, _, err = call(capsys, "rerank", *args)
    assert code == 2 and message in err and judge.opened == []


def test_missing_files(judge, capsys, tmp_path):
    code, _, err = call(capsys, "rerank", "--requests-file", tmp_path / "none")
    assert code == 4 and "none: no such file" in err and judge.opened == []


def test_input_is_never_overwritten(judge, capsys, tmp_path):
    path = write_requests(tmp_path, request(1, [1, 2]))
    before = path.read_bytes()
    code, _, err = call(
        capsys, "rerank", "--requests-file", path, "--output-jsonl-file", path, "--overwrite"
    )
    assert code == 2 and "both input and output" in err and path.read_bytes() == before


# -- modes -------------------------------------------------------------------------------------


def test_dry_run_and_validation_load_nothing(judge, capsys, tmp_path):
    path = write_requests(tmp_path, request(1, range(25)), request(2, [1]))
    code, out, _ = call(capsys, "rerank", "--requests-file", path, "--dry-run")
    assert code == 0 and "would compare 2 queries, 26 candidates, 2 windows" in out
    bad = write_requests(tmp_path, request(1, [1, 2]), "{", name="bad.jsonl")
    code, out, _ = call(capsys, "rerank", "--requests-file", bad, "--validate-only", "--json")
    envelope = json.loads(out)
    assert code == 5 and envelope["mode"] == "validate"
    assert envelope["validation"] == {
        "queries": 1, "candidates": 2, "windows": 1, "problems": 1,
    }  # fmt: skip
    assert judge.opened == []


def test_resume_and_refusals(judge, capsys, tmp_path):
    path = write_requests(tmp_path, *(request(i, [1, 3, 2]) for i in range(4)))
    out, run = tmp_path / "out.jsonl", tmp_path / "run.txt"
    args = ["rerank", "--requests-file", path, "--output-jsonl-file", out]
    args += ["--output-trec-file", run]
    assert call(capsys, *args)[0] == 0
    whole, whole_run = out.read_bytes(), run.read_bytes()
    code, _, err = call(capsys, *args)
    assert code == 2 and "--resume" in err
    # A run that was killed while it wrote its third record.
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + lines[2][:40])
    run.unlink()
    judge.prompts.clear()
    code, _, err = call(capsys, *args, "--resume")
    assert code == 0 and "2 were done before" in err and len(judge.prompts) == 2
    assert out.read_bytes() == whole and run.read_bytes() == whole_run
    code, _, err = call(capsys, *args, "--resume", "--window-size", 5)
    assert code == 5 and "window was 20 and is now 5" in err and out.read_bytes() == whole
    path.write_text(path.read_text() + json.dumps(request(9, [1, 2])) + "\n")
    code, _, err = call(capsys, *args, "--resume")
    assert code == 5 and "input was" in err
    assert call(capsys, *args, "--overwrite")[0] == 0
    assert len(out.read_bytes().splitlines()) == 5


def test_resume_of_a_run_without_jsonl(judge, capsys, tmp_path, trec):
    out = tmp_path / "out.txt"
    judge.logits, plain = _interrupt_at("law", judge.logits), judge.logits
    code, _, err = call(capsys, "rerank", *trec, "--output-trec-file", out)
    assert code == 130 and "1 queries are in" in err and not out.exists()
    judge.logits = plain
    code, _, err = call(capsys, "rerank", *trec, "--output-trec-file", out, "--resume")
    assert code == 0 and "1 were done before" in err
    assert len(read_run(out)) == 2


def _interrupt_at(word, logits):
    def interrupted(text):
        if f"query: {word}" in text:
            raise KeyboardInterrupt
        return logits(text)

    return interrupted


def test_shuffle_is_seeded_and_its_result_the_same(judge, capsys, tmp_path):
    path = write_requests(tmp_path, request(1, [1, 3, 2, 0]))
    code, out, _ = call(capsys, "rerank", "--requests-file", path, "--shuffle-candidates")
    assert code == 0 and docids(out) == ["d1", "d2", "d0", "d3"]
    shown = judge.prompts[-1]
    judge.prompts.clear()
    call(capsys, "rerank", "--requests-file", path, "--shuffle-candidates", "--seed", 5)
    assert judge.prompts[-1] != shown


def test_history_of_model_calls(judge, capsys, tmp_path):
    path = write_requests(tmp_path, request(1, [1, 3]))
    history = tmp_path / "history.jsonl"
    call(capsys, "rerank", "--requests-file", path, "--invocations-history-file", history)
    (line,) = [json.loads(row) for row in history.read_text().splitlines()]
    assert line["qid"] == "1" and line["docids"] == ["d1", "d0"] and line["scores"] == [1.0, 3.0]
    assert "[A] worth 1" in line["prompts"][0] and line["prompt_tokens"] > 0


def test_prompt_file(judge, capsys, tmp_path):
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("opening: 'Rank for {query}'\n")
    path = write_requests(tmp_path, request(1, [1, 3]))
    assert call(capsys, "rerank", "--requests-file", path, "--prompt-file", prompt)[0] == 0
    assert "Rank for flea" in judge.prompts[0]
    prompt.write_text("openning: x\n")
    code, _, err = call(capsys, "rerank", "--requests-file", path, "--prompt-file", prompt)
    assert code == 5 and "prompt.yaml:1: openning: unknown key, did you mean 'opening'" in err


# -- eval --------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path):
    pytest.importorskip("ir_measures")
    (tmp_path / "qrels").write_text("1 0 a 1\n1 0 b 0\n2 0 a 1\n3 0 a 1\n")
    (tmp_path / "run").write_text("1 Q0 b 1 2 x\n1 Q0 a 2 1 x\n2 Q0 a 1 1 x\n4 Q0 a 1 1 x\n")
    (tmp_path / "tied").write_text("1 Q0 a 1 1 x\n1 Q0 b 2 1 x\n2 Q0 a 1 1 x\n3 Q0 a 1 1 x\n")
    return tmp_path


def test_eval_counts_every_judged_query(scored, capsys):
    code, out, err = call(capsys, "eval", scored / "run", scored / "qrels", "-m", "RR")
    assert code == 0 and out.splitlines()[1].split()[:2] == ["RR", "0.5000"]
    assert "1 judged queries are not in the run and count 0" in err
    assert "1 queries have no judgement" in err


def test_eval_names_ties_and_their_rule(scored, capsys):
    code, out, err = call(
        capsys, "eval", scored / "tied", scored / "qrels", "-m", "RR", "-m", "RR@10", "--json"
    )
    envelope = json.loads(out)
    assert code == 0
    assert envelope["metrics"] == {"RR": pytest.approx(5 / 6), "RR@10": 1.0}
    ties = envelope["validation"][str(scored / "tied")]["ties"]
    assert ties == {"queries": 1, "documents": 2, "single_only": 0}
    assert "RR: trec_eval: by document id, last first" in err
    assert "RR@10: MS MARCO script: by document id, first first" in err


def test_eval_compares(scored, capsys):
    code, out, _ = call(
        capsys, "eval", scored / "tied", scored / "qrels", "-m", "nDCG@10",
        "--compare", scored / "run", "--per-query", "--json",
    )  # fmt: skip
    result = json.loads(out)["result"]
    assert code == 0
    (gap,) = result["compare"]["differences"]
    assert gap["value"] == pytest.approx(1 / 3) and (gap["better"], gap["equal"]) == (1, 2)
    assert result["measures"][0]["per_query"]["2"] == 1.0
    code, out, _ = call(
        capsys, "eval", scored / "tied", scored / "qrels", "--compare", scored / "run"
    )
    assert code == 0 and "+0.3333" in out and "better/equal/worse" in out


def test_eval_errors(scored, capsys):
    code, _, err = call(capsys, "eval", scored / "run", scored / "qrels", "-m", "ndcg@10")
    assert code == 2 and "did you mean 'nDCG'" in err
    assert call(capsys, "eval", scored / "none", scored / "qrels")[0] == 4
    (scored / "bad").write_text("1 Q0 a\n")
    code, _, err = call(capsys, "eval", scored / "bad", scored / "qrels")
    assert code == 5 and "bad:1: 3 fields" in err


def test_a_run_that_rerank_wrote_has_no_ties(judge, capsys, tmp_path, trec):
    pytest.importorskip("ir_measures")
    run = (tmp_path / "run").read_text().split("\n")
    (tmp_path / "run").write_text(
        "\n".join(" ".join([*r.split()[:4], "5.0", "x"]) for r in run if r)
    )
    out = tmp_path / "out.txt"
    assert call(capsys, "rerank", *trec, "--output-trec-file", out)[0] == 0
    (tmp_path / "qrels").write_text("1 0 d1 1\n2 0 d1 1\n")
    code, text, _ = call(
        capsys, "eval", out, tmp_path / "qrels", "-m", "RR", "-m", "RR@10", "--json"
    )
    envelope = json.loads(text)
    assert envelope["metrics"] == {"RR": 1.0, "RR@10": 1.0} and envelope["warnings"] == []
