"""Lines of a trace: what is no trace is refused in one line, what is one is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman.core.errors import InvalidInput
from steersman.core.trace import (
    MAX_LINE,
    Replay,
    describe_note,
    summarise,
)

from .trace_support import (
    HEADER,
    STAGE,
    STARTED,
    TOKEN,
    write,
)

# -- hostile files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([TOKEN], ":2: request: 0 is not under way"),
        ([STARTED, {**TOKEN, "index": 1}], ":3: index: 1 follows 0 tokens"),
        ([STARTED, {**TOKEN, "id": -1}], ":3: token: id: must be a whole number"),
        ([STARTED, {**TOKEN, "id": True}], ":3: token: id: must be a whole number"),
        ([STARTED, {**TOKEN, "id": 1 << 70}], ":3: token: id: must be a whole number"),
        ([STARTED, {**TOKEN, "text": 5}], ":3: token: text: must be text"),
        ([STARTED, {**TOKEN, "bytes": "zz"}], ":3: token: bytes: must be bytes in hexadecimal"),
        ([STARTED, {**TOKEN, "t": "now"}], ":3: token: t: must be a number"),
        ([STARTED, {**TOKEN, "t": 1e40}], ":3: token: t: must be a number"),
        ([STARTED, {**TOKEN, "names": {"x": "y"}}], ":3: token: names: must map token ids to text"),
        ([STARTED, {**TOKEN, "stages": [STAGE, {**STAGE, "tv": 3}]}],
         r":3: token: stages: 1: tv: must be in \[0, 1\]"),
        ([STARTED, {**TOKEN, "stages": [{**STAGE, "top": [[1]]}]}], "0: top: must be"),
        ([STARTED, {**TOKEN, "stages": [{}]}], ":3: token: stages: 0: left: missing"),
        ([STARTED, {**TOKEN, "stages": [STAGE] * 1001}], ":3: token: stages: must be a list"),
        ([STARTED, {**TOKEN, "request": 7}], ":3: request: 7 is not under way"),
        ([STARTED, {"event": "withdrawn", "keep": 5, "tokens": 1}], ":3: keep: 5 and 1"),
        ([STARTED, {"event": "withdrawn", "keep": 0, "tokens": -1}], ":3: withdrawn: tokens"),
        ([STARTED, {"event": "explode"}], ":3: event: must be one of started"),
        ([STARTED, {"event": ["token"]}], ":3: event: must be one of started"),
        ([STARTED, {"event": "note", "values": []}], ":3: note: values: must be an object"),
        ([{"event": "full", "limit": 1}, STARTED], ":3: follows a line that said the trace was"),
        ([{k: v for k, v in STARTED.items() if k != "seed"}], ":2: started: seed: missing"),
    ],
)  # fmt: skip
def test_lines_that_no_trace_holds(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    write(path, lines)
    for use in (Replay, summarise):
        with pytest.raises(InvalidInput, match=f"bad.jsonl.*{message}") as caught:
            use(path)
        assert "\n" not in str(caught.value)


def test_files_made_to_do_harm(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    begin = (json.dumps(HEADER) + "\n").encode()
    for data, message in [
        (b"[" * 100_000 + b"\n", "bad.jsonl:2: nested too deeply"),
        (b'{"event": NaN}\n', "bad.jsonl:2: NaN is not JSON"),
        (b'{"event": 1, "event": 2}\n', "key 'event' stands twice"),
        (b"x" * (MAX_LINE + 5), "bad.jsonl:2: longer than 8 MiB"),
        (b'{"event": "\xff"}\n', "bad.jsonl:2: not UTF-8"),
        (b"5\n", "bad.jsonl:2: must be an object"),
        (b'{"seed": ' + b"9" * 6000 + b"}\n", "bad.jsonl:2: "),
        (b'{"event": "note", "request": 0, "t": 0, "values": ' + b'{"a":' * 60 + b"1" + b"}" * 61
         + b"\n", "nested too deeply"),
    ]:  # fmt: skip
        path.write_bytes(begin + data)
        with pytest.raises(InvalidInput, match=message):
            Replay(path)
    for data, message in [
        (b"\x1f\x8b\x08binary\n", "bad.jsonl:1: not UTF-8"),
        (b'{"prompt": "x"}\n', 'not a trace: the first line must hold "format"'),
        (b'{"format": "steersman.trace"}\n', "version: must be a whole number"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match=message):
            Replay(path)


def test_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write(path, [STARTED], header={**HEADER, "version": 9})
    with pytest.raises(InvalidInput, match=r"t.jsonl:1: version 9 .* reads 1: update steersman"):
        Replay(path)
    write(path, [STARTED], header={**HEADER, "version": 0})
    with pytest.raises(InvalidInput, match="record it again"):
        Replay(path)
    write(path, [{**STARTED, "a new key": 1}], header={**HEADER, "another": []})
    assert Replay(path).header["another"] == []


# -- counting --------------------------------------------------------------------------------------


def test_what_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    raw = {"left": 9, "entropy": 2.0, "top": [], "p": 0.25, "rank": 4}
    other = {**STAGE, "entropy": 1.0, "argmax_changed": True, "removed": 0.3}
    token = {**TOKEN, "raw": raw, "stages": [STAGE, other]}
    timings = {"generated_tokens": 30, "decode_s": 2.0}
    write(
        path,
        [
            STARTED,
            {"event": "note", "values": {"drafted": 4, "accepted": 1, "rejected": [3]}},
            token,
            {**token, "index": 1, "raw": {**raw, "rank": 1, "p": 1.0}},
            {"event": "note", "values": {"rewind": {"to": 1, "rule": "r", "token": 1}}},
            {"event": "withdrawn", "keep": 1, "tokens": 1},
            {"event": "note", "values": {"routed": "large", "score": 0.5}},
            {**token, "index": 1},
            {"event": "note", "values": {"drafted": 4, "accepted": 3, "suppressed": {}}},
            {"event": "note", "values": {"block": 0, "passes": 3}},
            {"event": "finished", "reason": "eos", "tokens": 2, "timings": timings},
        ],
    )
    found = summarise(path)
    assert (found["requests"], found["finished"]) == (1, {"eos": 1})
    assert (found["tokens"], found["kept"], found["withdrawn"], found["rewinds"]) == (3, 2, 1, 1)
    assert (found["rules"], found["suppressed"]) == ({"r": 1}, 1)
    assert (found["drafted"], found["accepted"], found["acceptance"]) == (8, 4, 0.5)
    assert found["routed"] == {"large": 1} and found["routing_score"] == 0.5
    assert (found["blocks"], found["passes"]) == (1, 3.0)
    assert found["entropy"] == 2.0
    assert found["surprise"] == pytest.approx(2 * np.log(4) / 3)
    assert found["curve"] == pytest.approx([np.log(4), np.log(4) / 2])
    assert found["ranks"] == {"1": 1, "2": 0, "3-5": 2, "6-10": 0, "11-100": 0, "> 100": 0}
    first, second = found["stages"]
    assert (first["name"], first["tokens"], second["name"]) == ("x", 3, "x (2)")
    assert (first["entropy_before"], first["entropy_change"]) == (2.0, -1.5)
    assert (second["entropy_before"], second["entropy_change"]) == (0.5, 0.5)
    assert (first["argmax_changed"], second["argmax_changed"]) == (0.0, 1.0)
    assert second["removed"] == pytest.approx(0.3) and first["kl"] is None
    assert found["tokens_per_second"] == 15.0


def test_notes_in_words() -> None:
    names = {1: " one", 2: "\x1b"}
    assert describe_note({"rewind": {"to": 3, "rule": "a b", "token": 1}}, names) == [
        "rewound to token 3, rule a b, because of ' one'"
    ]
    assert describe_note({"suppressed": {"to": 3, "token": 7, "times": 2}}, names) == [
        "let stand at token 3, because of #7, times 2"
    ]
    assert describe_note(
        {"drafted": 3, "accepted": 1, "rejected": [1, 2], "x": 1.23456}, names
    ) == [
        r"drafted 3, accepted 1, rejected ' one' '\x1b'",
        "x: 1.23",
    ]
    assert describe_note({"routed": "large", "score": 0.5}, names) == [
        "routed to large (score 0.5)"
    ]
    assert describe_note({"block": 2, "passes": 4}, names) == ["block 2 after 4 passes"]
    assert describe_note({"thought": {"ids": [1, 7], "w": [0.5]}, "proposed": 1}, names) == [
        "thought: ids ' one' #7, w [0.5]",
        "proposed: ' one'",
    ]
    assert describe_note({"k": [{"a": 1}], "l": "y" * 300}, names) == [
        'k: [{"a": 1}]',
        "l: " + "y" * 199 + "…",
    ]
    # Whatever stands under the agreed keys, nothing breaks.
    for odd in ([], {}, None, "x", 1e300, [[[]]], {"rewind": 1}):
        keys = ("rewind", "suppressed", "drafted", "rejected", "routed", "block", "score")
        assert all(isinstance(s, str) for s in describe_note(dict.fromkeys(keys, odd), names))
