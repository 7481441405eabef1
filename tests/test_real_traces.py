"""Traces of SmolLM2 on every engine: they agree with the logits, and looking changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steersman.core import stream
from steersman.core.array import to_numpy
from steersman.core.decode.events import Finished, TokenEvent
from steersman.core.model import Forward, Model
from steersman.core.ops import entropy, softmax
from steersman.core.profile import load_profile
from steersman.core.trace import Replay, TraceWriter, summarise

pytestmark = pytest.mark.weights

BEGUN = "Once upon a time"


@pytest.mark.parametrize("name", ["llama.cpp-default", "dola"])
def test_a_trace_agrees_with_the_model(engine_model: Model, tmp_path: Path, name: str) -> None:
    profile, path = load_profile(name), tmp_path / "t.jsonl"
    plain = list(stream(engine_model, BEGUN, profile=profile, seed=3, max_tokens=3))
    with TraceWriter(path) as writer:
        events = stream(engine_model, BEGUN, profile=profile, seed=3, max_tokens=3, trace=3)
        events = list(writer.record(events, models=engine_model, profile=profile))
    assert isinstance(plain[-1], Finished) and isinstance(events[-1], Finished)
    assert events[-1].token_ids == plain[-1].token_ids

    (one,) = Replay(path).recordings
    ids = [*one.started["prompt_ids"], *events[-1].token_ids]
    with engine_model.session() as session:
        first = len(one.started["prompt_ids"])
        session.forward(Forward(keep=0, tokens=np.array([ids[: first - 1]]), logits="none"))
        tokens = [e for e in events if isinstance(e, TokenEvent)]
        assert len(tokens) == len(one.frames) - 1
        for place, (event, frame) in enumerate(zip(tokens, one.frames)):
            at = first + place
            out = session.forward(Forward(keep=at - 1, tokens=np.array([[ids[at - 1]]])))
            probs = to_numpy(softmax(out.logits))[0]
            raw = Replay(path).detail(frame)["raw"]
            assert event.trace is not None and raw == event.trace["raw"]
            assert raw["p"] == pytest.approx(probs[event.id], abs=1e-4)
            assert raw["entropy"] == pytest.approx(
                float(to_numpy(entropy(out.logits))[0]), abs=1e-3
            )
            assert [p for _, p in raw["top"]] == pytest.approx(sorted(probs)[:-4:-1], abs=1e-4)
            assert one.name(event.id) == engine_model.tokenizer.token_name(event.id)
    found = summarise(path)
    assert found["tokens"] == len(tokens) and found["stages"]
