"""Jobs that are killed, resumed, and refused under other settings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rerank_toys import JudgeModel

from steersman.core.errors import Cancelled, InvalidInput, UsageError
from steersman.core.reranking import First, Reranker
from steersman.core.reranking.io import Candidate, Request
from steersman.core.reranking.job import (
    RecordLog,
    digest_files,
    job_settings,
    run_job,
    shuffle,
    write_run_from_log,
)
from steersman.core.reranking.trec import read_run

SETTINGS = {"method": "first", "window": 4}


def requests(count: int = 5, size: int = 6) -> list[Request]:
    return [
        Request(
            qid=f"q{i}",
            query=f"query {i}",
            candidates=tuple(
                Candidate(
                    docid=f"d{j}",
                    text=f"worth {(j * 7 + i) % size}",
                    score=float(size - j),
                    raw={"docid": f"d{j}", "doc": f"worth {(j * 7 + i) % size}"},
                )
                for j in range(size)
            ),
        )
        for i in range(count)
    ]


def run(path: Path, wanted, *, resume=False, overwrite=False, model=None, settings=SETTINGS):
    with (
        Reranker(model or JudgeModel(), window=4, stride=2) as reranker,
        RecordLog(path, settings, resume=resume, overwrite=overwrite) as log,
    ):
        return list(run_job(reranker, wanted, log=log))


def test_one_record_per_query_in_order(tmp_path):
    path = tmp_path / "out.jsonl"
    outcomes = run(path, requests())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["query"]["qid"] for r in records] == [f"q{i}" for i in range(5)]
    assert [r["candidates"] for r in records] == [o.record["candidates"] for o in outcomes]
    assert all(r["rerank"]["settings"] == SETTINGS for r in records)


@pytest.mark.parametrize("cut", [0, 1, 30, -1, -2])
def test_a_torn_file_resumes_to_the_same_bytes(tmp_path, cut):
    whole = tmp_path / "whole.jsonl"
    run(whole, requests())
    data = whole.read_bytes()
    lines = data.splitlines(keepends=True)
    # Two whole records and part of the third: nothing, a few bytes, or all but the line's end.
    part = lines[2][:cut] if cut >= 0 else lines[2][: len(lines[2]) + cut]
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b"".join(lines[:2]) + part)
    model = JudgeModel()
    outcomes = run(torn, requests(), resume=True, model=model)
    assert torn.read_bytes() == data
    assert [o.ranking is None for o in outcomes] == [True, True, False, False, False]
    assert len(model.prompts) == 3 * 2  # windows of the three queries that were missing


def test_a_last_line_of_zeros_is_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, requests(2))
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 100 + b"\n")
    run(path, requests(2), resume=True)
    assert path.read_bytes() == data


def test_damage_in_the_middle_is_not_papered_over(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, requests(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{half\n" + lines[2])
    with pytest.raises(InvalidInput, match=r"out.jsonl:2: not JSON"):
        run(path, requests(3), resume=True)
    path.write_bytes(b'{"a": 1}\n' + lines[2])
    with pytest.raises(InvalidInput, match=r"out.jsonl:1: not a record of this command"):
        run(path, requests(3), resume=True)


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, requests(2))
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match=r"window was 4 and is now 5.*--overwrite") as caught:
        run(path, requests(2), resume=True, settings={**SETTINGS, "window": 5})
    assert "method" not in str(caught.value)
    assert path.read_bytes() == before


def test_an_existing_output_is_never_replaced_unasked(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, requests(2))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"--resume to continue it or --overwrite"):
        run(path, requests(2))
    assert path.read_bytes() == before
    run(path, requests(1), overwrite=True)
    assert len(path.read_bytes().splitlines()) == 1


def test_two_writers(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "out.jsonl"
    with RecordLog(path, SETTINGS), pytest.raises(UsageError, match="another process"):
        RecordLog(path, SETTINGS, resume=True)


def test_a_query_that_fails_is_tried_again(tmp_path):
    path = tmp_path / "out.jsonl"
    outcomes = run(path, requests(2), model=JudgeModel(context=50))
    assert all(o.error is not None for o in outcomes) and path.read_bytes() == b""
    outcomes = run(path, requests(2), resume=True)
    assert all(o.ranking is not None for o in outcomes)


def test_cancel_keeps_what_is_done(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        Reranker(JudgeModel(), window=4, stride=2) as reranker,
        RecordLog(path, SETTINGS) as log,
        pytest.raises(Cancelled),
    ):
        for outcome in run_job(reranker, requests(), log=log, cancel=lambda: len(log.done) == 2):
            assert outcome.ranking is not None
    assert len(path.read_text().splitlines()) == 2


def test_run_from_log(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, requests(3))
    with RecordLog(path, SETTINGS, resume=True) as log:
        assert write_run_from_log(log, tmp_path / "run.txt", tag="first") == 0
    found = read_run(tmp_path / "run.txt")
    assert list(found) == ["q0", "q1", "q2"] and len(found["q0"]) == 6
    assert not (tmp_path / "run.txt.part").exists()


def test_shuffle_depends_on_seed_and_query_alone():
    first, second = requests(2, size=20)
    one = shuffle(first, 1)
    assert [c.docid for c in one.candidates] == [c.docid for c in shuffle(first, 1).candidates]
    assert [c.docid for c in one.candidates] != [c.docid for c in shuffle(first, 2).candidates]
    assert [c.docid for c in one.candidates] != [c.docid for c in shuffle(second, 1).candidates]
    assert sorted(c.docid for c in one.candidates) == sorted(c.docid for c in first.candidates)
    assert one.scores() == first.scores()
    assert shuffle(Request(qid="e", query="q", candidates=()), 1).candidates == ()


def test_settings_tell_everything_apart():
    def settings(**options):
        with Reranker(JudgeModel(), **options) as reranker:
            return job_settings(reranker, reranker.model.info, input="x")

    base = settings()
    assert json.loads(json.dumps(base)) == base
    assert base["weights"] == "judge-1" and base["permutations"] == 1
    for other in (
        {"window": 10},
        {"stride": 5},
        {"passes": 2},
        {"max_words": 100},
        {"method": "generate"},
        {"method": First(content_free=True)},
    ):
        assert settings(**other) != base


def test_input_hash(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    forth = digest_files([tmp_path / "a", tmp_path / "b"])
    assert forth != digest_files([tmp_path / "b", tmp_path / "a"])


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_rerank_job import SETTINGS, requests
from rerank_toys import JudgeModel
from steersman.core.reranking import Reranker
from steersman.core.reranking.job import RecordLog, run_job

class Slow(JudgeModel):
    def logits(self, text):
        if "query 3" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().logits(text)

with Reranker(Slow(), window=4, stride=2) as reranker, RecordLog(Path({out!r}), SETTINGS) as log:
    list(run_job(reranker, requests(), log=log))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_resumes_to_the_same_bytes(tmp_path):
    here = Path(__file__).parent
    out = tmp_path / "out.jsonl"
    code = KILLED.format(paths=[str(here), str(here.parent.parent)], out=str(out))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(out.read_bytes().splitlines()) == 3
    run(out, requests(), resume=True)
    whole = tmp_path / "whole.jsonl"
    run(whole, requests())
    assert out.read_bytes() == whole.read_bytes()
