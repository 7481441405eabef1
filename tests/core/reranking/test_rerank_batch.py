"""Windows of many queries in one call: the same rankings, in order, with bounded reading ahead."""

import json
from dataclasses import replace

import pytest
from rerank_toys import JudgeModel

from steersman.core.errors import BackendError, Cancelled, ContextOverflow
from steersman.core.model import Capability
from steersman.core.reranking import First, Generate, Prompt, Reranker
from steersman.core.reranking.batch import ahead, rank_each, rows_for
from steersman.core.reranking.io import Candidate, Request
from steersman.core.reranking.job import RecordLog, run_job

SIZES = (6, 0, 1, 3, 9, 2, 6, 5)
PROMPT = Prompt(system="Rank.", opening="{query}", closing="Best first, as in [B] > [A].")


def request(i: int, size: int) -> Request:
    texts = [f"passage {'long ' * (j % 3)}worth {(j * 7 + i) % max(size, 1)}" for j in range(size)]
    return Request(
        qid=f"q{i}",
        query=f"query {i}" + " more" * (i % 4),
        candidates=tuple(Candidate(docid=f"d{j}", text=t) for j, t in enumerate(texts)),
    )


def requests(sizes=SIZES) -> list[Request]:
    return [request(i, size) for i, size in enumerate(sizes)]


def ranked(model, *, rows, method="first", wanted=None, window=4, **options):
    with Reranker(model, method=method, window=window, stride=window // 2, prompt=PROMPT) as r:
        return list(rank_each(r, wanted or requests(), rows=rows, **options))


def facts(found):
    """Everything about rankings that must not depend on how they were computed."""
    usages = [replace(r.usage, cached_tokens=0, seconds=0) for _, r in found]
    orders = [(q.qid, r.indices, r.scores, r.logits) for q, r in found]
    return orders, usages


METHODS = [First(), First(permutations=3, content_free=True), Generate(), Generate(max_tokens=5)]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("rows", [2, 3, 20])
def test_rankings_are_those_of_one_query_after_the_other(method, rows):
    bias = {"bias": lambda j: 0.25 * j}
    alone = ranked(JudgeModel(**bias), rows=1, method=method)
    together = ranked(JudgeModel(**bias), rows=rows, method=method)
    assert facts(together) == facts(alone)


def test_the_model_is_called_less_often_and_the_shared_beginning_computed_once():
    wanted = requests([4] * 6)
    alone, together = JudgeModel(), JudgeModel()
    ranked(alone, rows=1, wanted=wanted)
    found = ranked(together, rows=6, wanted=wanted)
    assert together.calls * 3 < alone.calls
    cached = sum(r.usage.cached_tokens for _, r in found)
    shared = found[0][1].usage.cached_tokens
    assert shared > 0 and cached == 6 * shared
    # Computed for the first row alone, and forked.
    assert together.tokens_run == sum(r.usage.prompt_tokens for _, r in found) - 5 * shared


def test_calls_are_told_with_their_query():
    def calls(rows):
        told = {}

        def add(query, call):
            told.setdefault(query.qid, []).append(replace(call, seconds=0))

        ranked(JudgeModel(), rows=rows, on_call=add)
        return told

    assert calls(3) == calls(1) and len(calls(1)["q4"]) == 4


def test_requests_are_read_as_they_are_needed():
    taken = []

    def source():
        for i in range(1000):
            taken.append(i)
            yield request(i, 3)

    with Reranker(JudgeModel(), window=4, prompt=PROMPT) as reranker:
        found = rank_each(reranker, ahead(reranker, source(), depth=3), rows=3)
        for place in range(20):
            got, _ = next(found)
            assert got.qid == f"q{place}"
            assert len(taken) <= place + 4 * 3 + 3 + 1
        found.close()


def test_a_slow_query_holds_back_a_bounded_number():
    taken = []

    def source():
        for i in range(200):
            taken.append(i)
            yield request(i, 40 if i == 0 else 2)

    found = rank_each(Reranker(JudgeModel(), window=3, stride=1, prompt=PROMPT), source(), rows=2)
    assert next(found)[0].qid == "q0"
    assert len(taken) <= 4 * 2
    assert [q.qid for q, _ in found] == [f"q{i}" for i in range(1, 200)]


def test_a_query_that_fails_fails_alone():
    model = JudgeModel(context=420)
    wanted = requests([3, 3, 3])
    wanted[1] = replace(wanted[1], query="far too long " * 40)
    found = ranked(model, rows=3, wanted=wanted)
    assert isinstance(found[1][1], ContextOverflow)
    alone = ranked(JudgeModel(context=420), rows=1, wanted=[wanted[0], wanted[2]])
    assert facts([found[0], found[2]]) == facts(alone)


def test_logits_that_are_not_finite_fail_their_query_alone():
    class Sick(JudgeModel):
        def logits(self, text):
            return super().logits(text) * (float("nan") if "query 4" in text else 1)

    found = ranked(Sick(), rows=4)
    assert [q.qid for q, r in found if isinstance(r, BackendError)] == ["q4"]
    well = [pair for pair in found if pair[0].qid != "q4"]
    assert facts(well) == facts([p for p in ranked(JudgeModel(), rows=1) if p[0].qid != "q4"])


class Weak(JudgeModel):
    """Its engine fails when a call holds many rows."""

    def session(self, **options):
        session = super().session(**options)
        run = session._run

        def limited(plan):
            if plan.batch > 1 and self.calls > 5:
                raise BackendError("toy: out of memory")
            return run(plan)

        session._run = limited
        return session


def test_what_is_too_much_at_once_is_done_one_by_one():
    model = Weak()
    assert facts(ranked(model, rows=4)) == facts(ranked(JudgeModel(), rows=1))


def test_models_of_one_row_and_own_methods_go_one_by_one():
    lacking = JudgeModel(capabilities=~(Capability.ROWS | Capability.FORK))
    assert rows_for(Reranker(lacking), 4) == 1 and rows_for(Reranker(JudgeModel()), 4) == 4
    assert facts(ranked(lacking, rows=4)) == facts(ranked(JudgeModel(), rows=1))

    class Reverse:
        logit_kind = "none"

        def compare(self, reader, query, texts):
            from steersman.core.reranking.reader import Comparison

            return Comparison(order=tuple(reversed(range(len(texts)))))

    assert rows_for(Reranker(JudgeModel(), method=Reverse()), 4) == 1


def test_cancel():
    polls = iter([False] * 5 + [True])
    with pytest.raises(Cancelled):
        ranked(JudgeModel(), rows=3, cancelled=lambda: next(polls))


def job(path, *, model=None, resume=False, rows=3):
    settings = {"a": 1}
    with (
        Reranker(model or JudgeModel(), window=4, stride=2, prompt=PROMPT) as reranker,
        RecordLog(path, settings, resume=resume) as log,
    ):
        done = run_job(reranker, requests(), log=log, batch_size=rows, tokenise_ahead=True)
        return list(done)


def test_records_are_the_same_bytes_in_the_same_order_and_resume(tmp_path):
    job(tmp_path / "one", rows=1)
    job(tmp_path / "many", rows=3)
    whole = (tmp_path / "one").read_bytes()
    assert (tmp_path / "many").read_bytes() == whole
    assert [json.loads(x)["query"]["qid"] for x in whole.splitlines()] == [
        f"q{i}" for i in range(8)
    ]
    lines = whole.splitlines(keepends=True)
    (tmp_path / "torn").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    outcomes = job(tmp_path / "torn", resume=True)
    assert (tmp_path / "torn").read_bytes() == whole
    assert [o.ranking is None for o in outcomes] == [True] * 3 + [False] * 5


def test_an_interrupt_keeps_what_was_told(tmp_path):
    class Stopped(JudgeModel):
        def logits(self, text):
            if "query 6" in text:
                raise KeyboardInterrupt
            return super().logits(text)

    path = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        job(path, model=Stopped(), rows=2)
    assert 4 <= len(path.read_bytes().splitlines()) <= 6
    job(path, resume=True)
    job(tmp_path / "whole", rows=1)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


# -- reading ahead -----------------------------------------------------------------------------


def test_ahead_tokenises_in_a_thread_and_leaves_the_order():
    model = JudgeModel()
    with Reranker(model, window=4, prompt=PROMPT) as reranker:
        warmed = []
        warm = reranker.warm
        reranker.warm = lambda query, texts: (warmed.append(query), warm(query, texts))
        found = ahead(reranker, requests(), depth=2, skip=lambda r: r.qid == "q3")
        first = next(found)
        assert first.qid == "q0"
        assert [r.qid for r in found] == [f"q{i}" for i in range(1, 8)]
    assert warmed == [r.query for r in requests() if r.qid != "q3"]


def test_what_fails_ahead_is_told_where_it_is_needed():
    with Reranker(JudgeModel()) as reranker:
        reranker.warm = lambda query, texts: 1 / 0
        assert [r.qid for r in ahead(reranker, requests(), depth=2)][-1] == "q7"


@pytest.mark.weights
def test_real_rows_give_the_bits_of_one_query_alone(engine_model):
    """Bit for bit where the engine says so; close, and the same order, elsewhere."""
    texts = ["Tax is due in April.", "Fleas live a year.", "Bridges span rivers.", "Fleas jump."]
    wanted = [
        Request(
            qid=str(i),
            query=query,
            candidates=tuple(Candidate(docid=str(j), text=t) for j, t in enumerate(texts[: 4 - i])),
        )
        for i, query in enumerate(["how long do fleas live", "when is tax due"])
    ]
    alone = ranked(engine_model, rows=1, wanted=wanted, window=3)
    together = ranked(engine_model, rows=2, wanted=wanted, window=3)
    if engine_model.info.batch_invariant:
        assert facts(together) == facts(alone)
        return
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert other.indices == one.indices
        assert other.logits == pytest.approx(one.logits, abs=0.5)
