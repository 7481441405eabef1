"""The file of a trace: never replaced, limited, cut, appended to, and survived when it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman.core.decode.events import Event, Finished, Started
from steersman.core.errors import InvalidInput, MissingFile, UsageError
from steersman.core.profile import Profile, load_profile
from steersman.core.trace import (
    Replay,
    TraceWriter,
    read_trace,
    summarise,
)

from .trace_support import (
    endless,
    events_of,
    lines_of,
    recorded,
)


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("mine")
    with pytest.raises(InvalidInput, match="exists already; choose another name"):
        TraceWriter(path)
    with pytest.raises(InvalidInput, match="not JSON"):
        TraceWriter(path, append=True)
    assert path.read_text() == "mine"
    with pytest.raises(InvalidInput, match="cannot be written"):
        TraceWriter(tmp_path / "no" / "t.jsonl")


def test_the_limit_holds_and_generation_goes_on(tmp_path: Path) -> None:
    path, profile = tmp_path / "t.jsonl", load_profile("balanced")
    whole = recorded(tmp_path / "whole.jsonl", profile.override({"generation.max_tokens": 60}))
    events = recorded(path, profile.override({"generation.max_tokens": 60}), limit=9000)
    assert events[-1].token_ids == whole[-1].token_ids
    assert path.stat().st_size <= 9000
    lines = lines_of(path)
    assert lines[-1] == {"event": "full", "limit": 9000}
    assert 3 < len(lines) < 63
    replay = Replay(path)
    assert replay.full and not replay.recordings[0].finished
    before = path.read_bytes()
    with TraceWriter(path, append=True) as writer:
        assert writer.full and not writer.open
        list(writer.record(events_of(endless(), profile), models=endless(), profile=profile))
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="at least 1024 bytes"):
        TraceWriter(tmp_path / "x", limit=10)


def test_a_cut_file_is_read_as_far_as_it_goes(tmp_path: Path, rewinding: Profile) -> None:
    path, cut = tmp_path / "t.jsonl", tmp_path / "cut.jsonl"
    recorded(path, rewinding)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for end in range(ends[0], len(data) + 1, 37):
        cut.write_bytes(data[:end])
        whole = sum(e <= end for e in ends)
        assert len(list(read_trace(cut))) in (whole, whole + 1)
        assert len(Replay(cut).recordings) == (whole >= 2)
        summarise(cut)
    for end in range(1, ends[0] - 1, 7):
        cut.write_bytes(data[:end])
        with pytest.raises(InvalidInput, match="cut.jsonl:1: not JSON"):
            Replay(cut)
    cut.write_bytes(b"")
    with pytest.raises(InvalidInput, match="empty; not a trace"):
        Replay(cut)
    with pytest.raises(MissingFile, match="no such file"):
        Replay(tmp_path / "nowhere")


def test_appending_goes_on_after_the_last_whole_line(tmp_path: Path, rewinding: Profile) -> None:
    path = tmp_path / "t.jsonl"
    recorded(path, rewinding)
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    recorded(path, rewinding, append=True)
    lines = lines_of(path)
    assert [line["request"] for line in lines if line.get("event") == "started"] == [0, 1]
    assert len(Replay(path).recordings) == 2
    recorded(tmp_path / "new.jsonl", rewinding, append=True)
    assert len(Replay(tmp_path / "new.jsonl").recordings) == 1


def test_a_failure_is_in_the_trace_and_goes_on_its_way(tmp_path: Path) -> None:
    def failing() -> Iterator[Event]:
        yield Started(prompt_token_ids=(0, 1), seed=1)
        raise ValueError("the engine\x1b broke")

    path, model = tmp_path / "t.jsonl", endless()
    with TraceWriter(path) as writer, pytest.raises(ValueError, match="broke"):
        list(writer.record(failing(), models=model, profile=load_profile("greedy")))
    assert "\x1b" not in path.read_text()
    frame = Replay(path).recordings[0].frames[0]
    assert (frame.kind, frame.said) == ("failed", "the engine\x1b broke")
    assert summarise(path)["failed"] == 1


def test_a_disk_that_is_full_does_not_end_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile = endless(), load_profile("balanced")
    real = os.write

    def failing(handle: int, data: bytes) -> int:
        if b'"token"' in data:
            raise OSError(28, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", failing)
    with TraceWriter(tmp_path / "t.jsonl") as writer:
        events = events_of(model, profile, max_tokens=3)
        events = list(writer.record(events, models=model, profile=profile))
        assert isinstance(events[-1], Finished) and len(events[-1].token_ids) == 3
        assert "No space left on device; the trace ends here" in (writer.problem or "")


def test_large_notes_and_prompts_are_cut(tmp_path: Path) -> None:
    from steersman.core.decode.events import Note

    deep: Any = []
    for _ in range(40):
        deep = [deep]
    numbers = np.arange(3, dtype=np.int64)
    events = [
        Started(prompt_token_ids=tuple([1] * 100_000), seed=0),
        Note(values={"much": "x" * 100_000}),
        Note(values={"deep": deep}),
        Note(values={"y" * 100_000: 1}),
        Note(values={"array": numbers, "nan": float("nan"), "tokens": [1, 10**9]}),
    ]
    path, model = tmp_path / "t.jsonl", endless()
    with TraceWriter(path) as writer:
        list(writer.record(events, models=model, profile=load_profile("greedy")))
    _, started, *notes = [line.data for line in read_trace(path)]
    assert started["prompt_omitted"] + len(started["prompt_ids"]) == 100_000
    assert len(started["prompt_ids"]) == 32_768
    assert notes[0]["values"] == {"omitted": ["much"], "bytes": 100_012}
    assert notes[1]["values"] == {"omitted": ["deep"], "bytes": None}
    assert notes[2]["values"] == {"omitted": 1, "bytes": 100_007}
    assert notes[3]["values"] == {"array": [0, 1, 2], "nan": None, "tokens": [1, 10**9]}
    assert list(notes[3]["names"]) == ["1"]
    assert path.stat().st_size < 600_000
