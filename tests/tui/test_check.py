"""``steersman check`` on toy models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner
from toys import TableModel, ToySession, ToyTransformer

from steersman.core.contract import CHECKS
from steersman.core.model import Output, Plan


class OffByOne(ToySession):
    def kept(self, plan: Plan, row: int) -> list[Any]:
        entries = super().kept(plan, row)
        return entries[:-1] if plan.base[row] < len(self.rows[plan.rows[row]]) else entries


class Garbled(ToySession):
    def _run(self, plan: Plan) -> Output:
        out = super()._run(plan)
        return out if out.logits is None else replace(out, logits=-out.logits)


def faulty(session: type[ToySession], **options: Any) -> ToyTransformer:
    model = ToyTransformer(layers=1, **options)
    model.session_class = session
    return model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(TableModel)
    return runner


def test_table_of_a_model_that_passes(run: Runner) -> None:
    done = run("check")
    assert done.code == 0
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0].split() == ["check", "result", "measured", "bound", "of"]
    row = next(line for line in lines if line.startswith(CHECKS["rollback"].title))
    assert row.removeprefix(CHECKS["rollback"].title).split() == [
        "passed",
        "0",
        "0",
        "max",
        "|Δlogit|",
    ]
    assert "skipped  block" in done.out
    assert "does not offer BLOCK" in done.out
    passed = len(CHECKS) - 7
    summary = f"toy-table on toy, float64, batch-invariant: {passed} passed, 7 skipped"
    assert lines[-1] == summary


def test_failure_is_named_and_ends_with_6(run: Runner) -> None:
    run.use(lambda: faulty(OffByOne))
    done = run("check", "--only", "rollback", "--only", "last")
    assert done.code == 6
    assert done.err.startswith("error: check: rollback failed on toy-transformer")
    assert "1 passed, 1 failed" in done.out
    assert "failed  rollback" in done.out
    assert "tokens back from" in done.out


def test_json_holds_every_figure(run: Runner) -> None:
    run.use(lambda: faulty(OffByOne))
    done = run("check", "--json", "--only", "rollback", "--only", "bytes")
    assert (done.code, done.json["status"], done.json["exit_code"]) == (6, "error", 6)
    rollback, text = done.json["result"]
    assert rollback["result"] == "failed"
    assert rollback["value"] > rollback["bound"] == 0
    assert rollback["capability"] == ["LAST_LOGITS", "ROLLBACK"]
    assert (text["result"], text["value"]) == ("passed", None)
    assert done.json["metrics"]["failed"] == 1
    assert done.json["errors"][0]["code"] == "check_failed"


def test_against_compares_two_engines(run: Runner) -> None:
    run.use(ToyTransformer)
    done = run("check", "--json", "--only", "last", "--against", "torch", "--dtype", "bf16")
    assert done.code == 0
    # The reference is opened like the model, but in its own number format.
    assert [load.get("backend") for load in run.loads] == [None, "torch"]
    assert [load.get("dtype") for load in run.loads] == ["bf16", None]
    names = [check["name"] for check in done.json["result"]]
    assert names == ["last", "parity-kl", "parity-top1", "parity-hidden"]
    assert done.json["resolved"]["against"]["name"] == "toy-transformer"

    models = [faulty(Garbled), ToyTransformer(layers=1)]
    run.use(lambda: models.pop(0))
    done = run("check", "--json", "--only", "last", "--against", "torch")
    assert done.code == 6
    failed = {c["name"] for c in done.json["result"] if c["result"] == "failed"}
    assert failed == {"parity-kl", "parity-top1"}


def test_against_another_vocabulary_is_one_line(run: Runner) -> None:
    models = [ToyTransformer(), TableModel()]
    run.use(lambda: models.pop(0))
    text = run.home / "text"
    text.write_text("ab. cd", encoding="utf-8")
    done = run("check", "--only", "last", "--against", "torch", "--text", str(text))
    assert done.code == 5
    assert "toy: gives other token ids for the same text" in done.err


def test_list_and_unknown_names(run: Runner) -> None:
    done = run("check", "--list")
    assert done.code == 0
    assert run.loads == []
    assert all(f"{name}  " in done.out for name in CHECKS)
    done = run("check", "--only", "rolback")
    assert done.code == 2
    assert "did you mean 'rollback'" in done.err
