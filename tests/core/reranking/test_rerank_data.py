"""The evaluation script prepares each collection as its makers describe it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from steersman.core.reranking.evaluate import evaluate

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "eval_rerank.py"


@pytest.fixture(scope="module")
def scripts_path():
    sys.path.insert(0, str(SCRIPT.parent))  # as when the script is run
    yield SCRIPT.parent
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def script(scripts_path):
    spec = importlib.util.spec_from_file_location("eval_rerank", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["eval_rerank"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["eval_rerank"]


def ndcg(rows, qrels):
    pytest.importorskip("ir_measures")
    run = {r["query"]["qid"]: {c["docid"]: c["score"] for c in r["candidates"]} for r in rows}
    (found,) = evaluate(run, {q: qrels[q] for q in run}, ("nDCG@10",), samples=10)
    return found.value


def test_dl19_gives_the_published_figure_of_bm25(script, data_dir):
    rows, qrels = script.SETS["dl19"](data_dir, 20)
    assert len(rows) == 43 and {len(r["candidates"]) for r in rows} == {20}
    assert ndcg(rows, qrels) == pytest.approx(0.5058, abs=5e-5)


def test_cranfield_drops_the_doubtful_judgements(script, data_dir):
    pytest.importorskip("bm25s")
    rows, qrels = script.SETS["cranfield"](data_dir, 20)
    assert len(rows) == 225
    counts = [sum(g == gain for d in qrels.values() for g in d.values()) for gain in (4, 3, 2, 1)]
    assert counts == [128, 387, 734, 363]  # codes 1 to 4, as the collection's notes count them
    first = next(r for r in rows if r["query"]["qid"] == "1")
    assert first["query"]["text"].startswith("what similarity laws must be obeyed")
    assert qrels["1"]["184"] == 3
    assert 0.3 < ndcg(rows, qrels) < 0.6


def test_preparing_twice_keeps_the_queries_and_their_order(script, data_dir, tmp_path):
    path = script.prepare("dl19", data_dir, tmp_path / "a", 5)
    again = script.prepare("dl19", data_dir, tmp_path / "b", 5)
    assert path.read_bytes() == again.read_bytes()
    some = script.read(path, 3)
    assert [r.qid for r in some] == [r.qid for r in script.read(path, None)][:3]


def test_kendall_tau(script):
    scipy_stats = pytest.importorskip("scipy.stats")
    orders = (["a", "b", "c", "d"], ["b", "a", "d", "c"], ["d", "c", "b", "a"])
    for order in orders:
        places = ["abcd".index(x) for x in order]
        want = scipy_stats.kendalltau(places, range(4)).statistic
        assert script.kendall_tau(order, orders[0]) == pytest.approx(want)


def test_training_windows_hold_no_test_query(scripts_path, data_dir, tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    import ir_sets
    import make_first_data

    from steersman.core.reranking.examples import read_examples

    out = tmp_path / "windows.jsonl"
    arguments = ["make_first_data.py", "--data", str(data_dir), "--out", str(out), "--titles", "5"]
    monkeypatch.setattr(sys, "argv", arguments)
    make_first_data.main()
    examples = list(read_examples(out))
    assert len(examples) > 1000
    tested = {
        *ir_sets.dl19(data_dir)[0].values(),
        *ir_sets.scifact(data_dir).queries.values(),
        *ir_sets.split(ir_sets.cranfield(data_dir), "held-out").queries.values(),
        *ir_sets.split(ir_sets.cisi(data_dir), "held-out").queries.values(),
    }
    assert not tested & {example.query for example in examples}
    relevant = next(e for e in examples if e.query.startswith("what is the basic mechanism"))
    assert relevant.ranks is not None and sorted(relevant.ranks) == [1, 2, 2, 2]
