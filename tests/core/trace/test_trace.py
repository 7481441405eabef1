"""Traces: what is written can be read, walked and explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toys import TableModel

from steersman.core.decode.events import Finished, TokenEvent
from steersman.core.errors import InvalidInput
from steersman.core.profile import Profile, load_profile
from steersman.core.trace import (
    Replay,
    TraceWriter,
    read_trace,
)

from .trace_support import (
    PROMPT,
    endless,
    events_of,
    recorded,
    write,
)


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
