"""Traces: what is written can be read, walked, counted; what is no trace is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TableModel

from steersman.core import stream
from steersman.core.decode import STRATEGIES
from steersman.core.decode.events import Event, Finished, Started, TokenEvent
from steersman.core.decode.sample import Progress, Sample, appended, begin, draw, feed_last, resumed
from steersman.core.decode.types import Edit, Step
from steersman.core.errors import InvalidInput, MissingFile, UsageError
from steersman.core.profile import Profile, load_profile
from steersman.core.trace import (
    MAX_LINE,
    Replay,
    TraceWriter,
    describe_note,
    read_trace,
    summarise,
)

PROMPT = [0, 1, 2]


class Rewinding(Sample):
    """Samples; takes the third token back once, and says all that strategies say."""

    def step(self, state: Progress, out: Any, rng: Any) -> tuple[Any, Step]:
        token, grown = draw(state, self.chain, out["target"].logits, rng)
        step = appended(grown, token, {"target": feed_last(grown)})
        request = state.request
        if len(state.chain) < 9 and grown.count == 3 and rng.seed == 0:
            texts = [replace(token, id=int(i)) for i in state.history[len(request.prompt) :]]
            back = resumed(grown, self.chain, texts[:1])
            back = replace(back, chain=(*back.chain, *[None] * 9))  # so that it is done once
            note = {"rewind": {"to": 1, "rule": "phrase", "token": token.id}}
            ask = {"target": feed_last(back)}
            return back, Step(ask=ask, edit=Edit(keep=1), note=note)
        if grown.count == 1:
            note = {"drafted": 3, "accepted": 1, "rejected": [4, 5]}
            return grown, replace(step, note=note)
        return grown, replace(step, note={"routed": "target", "score": 0.25})

    def init(self, request: Any, rng: Any) -> tuple[Any, Step]:
        state, step = super().init(request, rng)
        return begin(request, self.chain), step


@pytest.fixture
def rewinding(monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setitem(STRATEGIES, "rewinding", Rewinding)
    profile = load_profile("balanced").override({"strategy": "rewinding"})
    return profile.override({"generation.max_tokens": 6})


def events_of(
    model: Any, profile: Any, *, trace: int | None = 3, **options: Any
) -> Iterator[Event]:
    options = {"seed": 0, "prompt": PROMPT, **options}
    return stream(model, profile=profile, trace=trace, **options)


def endless() -> TableModel:
    """A model that never ends a text."""
    model = TableModel(order=2, seed=1)
    (eos,) = model.tokenizer.eos_ids
    table = model.table.copy()
    table[..., eos] = 0
    return TableModel(order=2, table=table / table.sum(-1, keepdims=True))


def recorded(path: Path, profile: Any, model: Any = None, **options: Any) -> list[Event]:
    model = model or endless()
    with TraceWriter(path, **options) as writer:
        return list(writer.record(events_of(model, profile), models=model, profile=profile))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- round trip ----------------------------------------------------------------------------------


def test_everything_that_happened_is_in_the_file(tmp_path: Path, rewinding: Profile) -> None:
    path, model = tmp_path / "t.jsonl", endless()
    events = recorded(path, rewinding, model)
    lines = [line.data for line in read_trace(path)]
    assert lines[0]["format"] == "steersman.trace" and lines[0]["version"] == 1
    started = lines[1]
    assert started["prompt_ids"] == PROMPT and started["seed"] == 0
    text = b"".join(model.tokenizer.token_bytes(i) for i in PROMPT).decode()
    assert started["prompt"] == text and started["prompt_omitted"] == 0
    assert started["models"]["target"]["name"] == model.info.name
    assert started["profile"]["fingerprint"] == rewinding.fingerprint
    assert {"min_p": {"p": 0.05}} in started["profile"]["settings"]["logits"]
    assert [line["event"] for line in lines[1:]] == [
        {"TokenEvent": "token"}.get(type(e).__name__, type(e).__name__.lower()) for e in events
    ]
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    written = [line for line in lines[1:] if line["event"] == "token"]
    named: dict[str, str] = {}
    for line in lines[1:]:
        for i, name in line.get("names", {}).items():
            assert i not in named  # a name stands once, before or where it is needed
            named[i] = name
            assert name == model.tokenizer.token_name(int(i))
    for event, line in zip(tokens, written, strict=True):
        assert line["id"] == event.id and line["index"] == event.index
        assert line["raw"] == event.trace["raw"] and line["stages"] == event.trace["stages"]
        assert line["logprob"] == pytest.approx(event.logprob, rel=1e-5)
        for entry in (line["raw"], *line["stages"]):
            assert len(entry["top"]) <= 3 and {str(i) for i, _ in entry["top"]} <= set(named)
    assert {"4", "5"} <= set(named)  # rejected drafts
    assert lines[-1]["reason"] == "length" and lines[-1]["tokens"] == 6


def test_walking_forwards_and_backwards(tmp_path: Path, rewinding: Profile) -> None:
    path = tmp_path / "t.jsonl"
    events = recorded(path, rewinding)
    (one,) = Replay(path).recordings
    shown: list[TokenEvent] = []
    texts = []
    for event in events:
        if isinstance(event, TokenEvent):
            shown.append(event)
        elif type(event).__name__ == "Withdrawn":
            del shown[event.keep :]
        elif not isinstance(event, Finished):
            continue
        texts.append([e.id for e in shown])
    assert len(one.frames) == len(texts)
    for number, ids in reversed(list(enumerate(texts))):
        pieces = one.pieces(number)
        assert [one.frames[p.frame].token for p in pieces] == ids
        assert one.frames[number].length == len(ids)
        assert one.pieces(number, 2) == pieces[-2:]
    (back,) = [i for i, f in enumerate(one.frames) if f.kind == "withdrawn"]
    gone = [one.frames[p.frame].token for p in one.withdrawn(back)]
    assert texts[back - 1] == texts[back] + gone and len(gone) == 1
    assert one.withdrawn(back - 1) == []
    assert one.frames[back].notes[0]["rewind"]["rule"] == "phrase"
    # One draft was accepted, so the refused ones stand before the second token.
    assert [f.rejected for f in one.frames[:3]] == [(), (4, 5), ()]
    assert one.frames[1].routed == "target" and one.frames[1].marked
    assert one.finished and one.frames[-1].said == "length"


def test_details_are_read_from_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    profile = load_profile("llama.cpp-default").override({"generation.max_tokens": 4})
    events = [e for e in recorded(path, profile) if isinstance(e, TokenEvent)]
    replay = Replay(path)
    frames = replay.recordings[0].frames
    for event, frame in zip(events, frames):
        assert replay.detail(frame)["stages"] == event.trace["stages"]
        assert frame.p == event.trace["raw"]["p"] and frame.rank == event.trace["raw"]["rank"]
        assert frame.final == event.trace["stages"][-1]["p"]
    path.write_text("gone\n")
    with pytest.raises(InvalidInput, match="t.jsonl:4"):
        replay.detail(frames[0])


def test_characters_cut_into_tokens_belong_to_the_last_one(tmp_path: Path) -> None:
    from toys import byte_tokenizer

    tokenizer = byte_tokenizer()
    data = "né ☺".encode() + b"\xff!"
    size = tokenizer.vocab_size
    model = TableModel(table=np.full((size + 1, size), 1 / size), tokenizer=tokenizer)
    model.probs = lambda history: np.eye(size)[[*data, *tokenizer.eos_ids][len(history) - 1]]
    path = tmp_path / "t.jsonl"
    profile = load_profile("greedy")
    with TraceWriter(path) as writer:
        list(writer.record(events_of(model, profile, prompt=[65]), models=model, profile=profile))
    (one,) = Replay(path).recordings
    end = len(one.frames) - 1
    assert "".join(p.text for p in one.pieces(end)) == data.decode("utf-8", "replace")
    assert [p.text for p in one.pieces(end)][:3] == ["n", "", "é"]


def test_a_text_taken_back_into_a_character_reads_on(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    about = {"models": {}, "profile": {}, "seed": 0, "prompt": "", "prompt_ids": []}
    token = {"event": "token", "id": 1, "text": ""}
    lines = [
        {"event": "started", **about},
        {**token, "index": 0, "bytes": "c3"},
        {**token, "index": 1, "bytes": "a9"},
        {"event": "withdrawn", "keep": 1, "tokens": 1},
        {**token, "index": 1, "bytes": "a8"},
        {"event": "withdrawn", "keep": 0, "tokens": 2},
        {**token, "index": 0, "text": "x"},
    ]
    write(path, lines)
    (one,) = Replay(path).recordings
    texts = ["".join(p.text for p in one.pieces(i)) for i in range(6)]
    assert texts == ["", "é", "", "è", "", "x"]


def test_without_explanations_there_are_still_probabilities(tmp_path: Path) -> None:
    path, model, profile = tmp_path / "t.jsonl", endless(), load_profile("balanced")
    events = events_of(model, profile, trace=None, logprobs=0, max_tokens=2)
    with TraceWriter(path) as writer:
        events = list(writer.record(events, models=model, profile=profile))
    first = Replay(path).recordings[0].frames[0]
    assert first.p == pytest.approx(np.exp(events[2].raw_logprob), rel=1e-5)
    assert first.rank is None


@pytest.mark.parametrize(
    "name", ["greedy", "balanced", "mirostat", "beam", "contrastive", "dola", "best-of-n"]
)
def test_strategies_explain_themselves(tmp_path: Path, name: str) -> None:
    from toys import ToyTransformer

    model, path = ToyTransformer(), tmp_path / "t.jsonl"
    profile = load_profile(name).override({"generation.max_tokens": 4})
    plain = [e for e in events_of(model, profile, trace=None) if isinstance(e, Finished)]
    with TraceWriter(path) as writer:
        found = list(writer.record(events_of(model, profile), models=model, profile=profile))
    assert found[-1].token_ids == plain[0].token_ids  # looking changes nothing
    tokens = [e for e in found if isinstance(e, TokenEvent)]
    for token in tokens:
        assert np.log(token.trace["raw"]["p"]) == pytest.approx(token.raw_logprob, abs=1e-4)
        last = (token.trace["stages"] or [token.trace["raw"]])[-1]
        if name != "beam":  # whose log-probabilities are differences of sums
            assert np.log(last["p"]) == pytest.approx(token.logprob, abs=1e-4)
    if tokens and name == "dola":
        assert tokens[0].trace["stages"][0]["name"] == "dola"
    assert sum(line.event == "token" for line in read_trace(path)) == len(tokens)


# -- the file ------------------------------------------------------------------------------------


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


# -- hostile files -------------------------------------------------------------------------------

HEADER = {"format": "steersman.trace", "version": 1}
STARTED = {
    "event": "started", "models": {}, "profile": {}, "seed": 0, "prompt": "", "prompt_ids": [],
}  # fmt: skip
TOKEN = {"event": "token", "index": 0, "id": 1, "text": "a"}
STAGE = {
    "name": "x", "removed": 0.1, "tv": 0.1, "kl": None, "argmax_changed": False, "left": 1,
    "entropy": 0.5, "top": [[1, 0.5]],
}  # fmt: skip


def write(path: Path, lines: list[Any], header: Any = HEADER) -> None:
    filled = [{"request": 0, "t": 0.5, **line} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *filled]))


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


# -- counting ------------------------------------------------------------------------------------


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
