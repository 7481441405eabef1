"""``steersman generate --evidence``: a document goes before the prompt, and is pointed out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner, scripted

from steersman.core.decode import sample
from steersman.core.decode.types import Request
from steersman.core.errors import InvalidInput
from steersman.tui.batch_input import parse

DOCUMENT = "The sea is deep."


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(lambda: scripted([b"one"]))
    (runner.home / "doc.txt").write_text(DOCUMENT + "\n")
    return runner


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What strategies were told."""
    seen: list[Request] = []
    init = sample.Sample.init

    def watched(self: Any, request: Request, rng: Any) -> Any:
        seen.append(request)
        return init(self, request, rng)

    monkeypatch.setattr(sample.Sample, "init", watched)
    return seen


def told(request: Request) -> tuple[str, list[str]]:
    """Return the prompt, and the parts of it that are evidence."""
    pieces = [request.models["target"].tokenizer.token_bytes(t) for t in request.prompt.tolist()]
    parts = [b"".join(pieces[a:b]).decode() for a, b in request.evidence]
    return b"".join(pieces).decode(), parts


def test_a_document_goes_before_the_prompt(run: Runner, requests: list[Request]) -> None:
    done = run("generate", "-p", "Is it?", "--evidence", "doc.txt", "--json")
    assert done.code == 0, done.err
    assert told(requests[0]) == (f"{DOCUMENT}\n\nIs it?", [DOCUMENT])
    assert done.json["inputs"]["evidence"] == [DOCUMENT + "\n"]
    # One that the prompt holds already is only pointed out.
    run("generate", "-p", f"Read: {DOCUMENT} Is it?", "--evidence", "doc.txt")
    assert told(requests[1]) == (f"Read: {DOCUMENT} Is it?", [DOCUMENT])
    done = run("generate", "--chat", "-p", "Is it?", "--evidence", "doc.txt")
    assert done.code == 0, done.err
    prompt, parts = told(requests[2])
    assert f"{DOCUMENT}\n\nIs it?" in prompt and parts == [DOCUMENT]


def test_what_cannot_be_evidence(run: Runner) -> None:
    done = run("generate", "-p", "x", "--evidence", "no.txt")
    assert done.code == 4 and "no.txt: no such file" in done.err
    (run.home / "empty.txt").write_text(" \n")
    done = run("generate", "-p", "x", "--evidence", "empty.txt")
    assert done.code == 2 and "evidence: a text is empty" in done.err
    done = run("generate", "--jsonl", "-", "--evidence", "doc.txt", stdin="{}")
    assert done.code == 2 and "field 'evidence'" in done.err


def test_evidence_of_a_batch_line(run: Runner, requests: list[Request]) -> None:
    line = json.dumps({"prompt": "Is it?", "evidence": [DOCUMENT]})
    done = run("generate", "--jsonl", "-", stdin=line)
    assert done.code == 0, done.err
    assert told(requests[0]) == (f"{DOCUMENT}\n\nIs it?", [DOCUMENT])
    body = {"messages": [{"role": "user", "content": "Is it?"}], "evidence": DOCUMENT}
    item = parse(json.dumps({"custom_id": "c", "body": body}).encode(), line=1)
    assert item.prompt == [{"role": "user", "content": f"{DOCUMENT}\n\nIs it?"}]
    assert item.evidence == (DOCUMENT,)


@pytest.mark.parametrize(
    ("evidence", "message"),
    [(3, "evidence: must be text or a list"), ([""], "evidence: a text is empty")],
)
def test_bad_evidence_of_a_line_is_named(evidence: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse(json.dumps({"prompt": "x", "evidence": evidence}).encode(), line=1)
