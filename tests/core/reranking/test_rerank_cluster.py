"""The same job on a Ray cluster: same bytes, dead workers replaced, resumed like any other."""

import json
import sys
from dataclasses import replace

import pytest
from test_rerank_cli import call, request, write_requests

from steersman.core.errors import BackendError, ContextOverflow, MissingDependency, MissingFile
from steersman.core.reranking import cluster as cl
from steersman.core.reranking.cluster import Cluster, Work, Worker, describe
from steersman.core.reranking.io import Candidate, Request
from steersman.core.reranking.job import job_settings

JUDGE = Work(load={}, opener="cluster_toys:open_judge", window=4, settings={"input": "x"})


def requests(count=3):
    return [
        Request(
            qid=f"q{i}",
            query=f"query {i}",
            candidates=tuple(candidate(i, j) for j in range(5)),
            source=f"in:{i + 1}",
            raw={"query": f"query {i}", "extra": {"a": 1}},
        )
        for i in range(count)
    ]


def candidate(i: int, j: int) -> Candidate:
    raw = {"docid": f"d{j}", "note": [1.5, None]}
    return Candidate(docid=f"d{j}", text=f"worth {(3 * j + i) % 5} ü", raw=raw)


def test_requests_survive_the_journey():
    for one in requests():
        assert cl._unpack(cl._pack(one)) == one


def test_errors_keep_their_class():
    error = cl._error("context_overflow", "too long")
    assert isinstance(error, ContextOverflow) and str(error) == "too long"
    assert type(cl._error("unheard_of", "x")) is BackendError


def test_what_a_worker_says_of_its_model():
    found = json.loads(json.dumps(describe(JUDGE)))
    _, reranker = JUDGE.open()
    assert found["settings"] == job_settings(reranker, reranker.model.info, input="x")
    assert found["facts"]["name"] == "judge" and found["rows"] == 1
    with pytest.raises(MissingFile):
        describe(replace(JUDGE, opener="cluster_toys:open_nothing"))


def test_a_block_of_requests():
    pa = pytest.importorskip("pyarrow")
    wanted = requests()
    worker = Worker(JUDGE, describe(JUDGE)["settings"])
    table = worker(pa.table({"request": [cl._pack(one) for one in wanted]}))
    outcomes = [cl._outcome(json.loads(text)) for text in table.column("result").to_pylist()]
    assert [o.request.qid for o in outcomes] == ["q0", "q1", "q2"]
    assert outcomes[0].record["candidates"][0]["docid"] == "d3"
    assert outcomes[0].usage.windows == 2
    small = replace(JUDGE, load={"context": 50})
    table = Worker(small, describe(small)["settings"])(pa.table({"request": [cl._pack(wanted[0])]}))
    (outcome,) = (cl._outcome(json.loads(text)) for text in table.column("result").to_pylist())
    assert isinstance(outcome.error, ContextOverflow) and outcome.request.source == "in:1"


def test_a_worker_with_another_model_stops_the_job():
    pa = pytest.importorskip("pyarrow")
    settings = {**describe(JUDGE)["settings"], "weights": "others"}
    table = Worker(JUDGE, settings)(pa.table({"request": [cl._pack(requests()[0])]}))
    (row,) = (json.loads(text) for text in table.column("result").to_pylist())
    assert "weights is 'judge-1', elsewhere 'others'" in row["stop"]


def test_without_ray(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r'pip install "steersman\[ray\]"'):
        Cluster(JUDGE)
    path = write_requests(tmp_path, request(1, [1, 2]))
    code, _, err = call(capsys, "rerank", "--requests-file", path, "--engine", "ray")
    assert code == 3 and err.count("\n") == 1 and "Ray is not installed" in err


def test_options_that_do_not_go_together(capsys, tmp_path):
    path = write_requests(tmp_path, request(1, [1, 2]))
    for args, told in (
        (["--workers", 2], "go with --engine ray"),
        (
            ["--engine", "ray", "--invocations-history-file", tmp_path / "h"],
            "not with --engine ray",
        ),
    ):
        code, _, err = call(capsys, "rerank", "--requests-file", path, *args)
        assert code == 2 and told in err


@pytest.fixture(scope="module")
def two_workers():
    """A cluster of this machine with room for two workers."""
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    ray = cl._import_ray()
    cl._connect(ray, "local", 2)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_job_on_two_workers(two_workers, monkeypatch, capsys, tmp_path):
    """Resumed from a torn file, with a worker that dies once: the bytes of one process."""
    from steersman.tui import rerank_job

    flag = tmp_path / "died"
    work, told = rerank_job._work, {}

    def toy_work(*args):
        found = work(*args)
        told.update(
            opener="cluster_toys:open_mortal", load={"word": "query: w4", "flag": str(flag)}
        )
        return replace(found, **told)

    monkeypatch.setattr(rerank_job, "_work", toy_work)
    rows = [request(f"q{i}", [1, 3, 2, i % 4], query=f"w{i}") for i in range(8)]
    path = write_requests(tmp_path, *rows[:3], "{oops", *rows[3:])
    common = ["--requests-file", path, "--window-size", 3]
    flag.touch()
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    code, _, err = call(capsys, "rerank", *common, "--output-jsonl-file", whole)
    assert code == 7, err
    flag.unlink()
    lines = whole.read_bytes().splitlines(keepends=True)
    torn.write_bytes(lines[0] + lines[1] + lines[2][:25])
    code, out, err = call(
        capsys, "rerank", *common, "--output-jsonl-file", torn, "--resume", "--json",
        "--engine", "ray", "--workers", 2,
    )  # fmt: skip
    envelope = json.loads(out)
    assert code == 7 and flag.exists(), err
    assert torn.read_bytes() == whole.read_bytes()
    assert envelope["metrics"]["ranked"] == 6 and envelope["metrics"]["skipped"] == 2
    assert envelope["metrics"]["problems"] == {"malformed_line": 1}
    assert envelope["resolved"]["workers"] == 2
    assert envelope["resolved"]["model"]["name"] == "judge"
