"""Traces written by hand, for tests of what shows them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEADER = {"format": "steersman.trace", "version": 1, "steersman": "0"}
STARTED = {
    "event": "started",
    "models": {
        "target": {"name": "toy", "backend": "none"},
        "small": {"name": "tiny", "backend": "none"},
    },
    "profile": {"name": "antislop", "fingerprint": "f"},
    "seed": 7,
    "prompt": "Once",
    "prompt_ids": [4],
}


def write_trace(
    path: Path, lines: Iterable[Mapping[str, Any]], *, header: Mapping[str, Any] = HEADER
) -> Path:
    """Write ``lines``, with what every line has filled in."""
    filled = [{"request": 0, "t": round(0.1 * i, 1), **line} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *filled]))
    return path


def note(**values: Any) -> dict[str, Any]:
    """Return a note."""
    return {"event": "note", "values": values}


def token(
    index: int, text: str, number: int, p: float, final: float, *, rank: int = 1, **more: Any
) -> dict[str, Any]:
    """Return a token with two stages."""
    other = 90
    stages = [
        {
            "name": "min_p", "removed": 0.125, "tv": 0.125, "kl": 0.134, "left": 3,
            "argmax_changed": False, "entropy": 0.9, "p": p, "top": [[number, p], [other, 0.25]],
        },
        {
            "name": "temperature", "removed": 0.0, "tv": 0.05, "kl": 0.012, "left": 3,
            "argmax_changed": rank > 1, "entropy": 0.7, "p": final,
            "top": [[number, final], [other, 0.0625]],
        },
    ]  # fmt: skip
    raw = {"left": 99, "entropy": 2.25, "p": p, "rank": rank, "top": [[number, p], [other, 0.2]]}
    return {
        "event": "token", "index": index, "id": number, "text": text, "raw": raw, "stages": stages,
        "names": {str(number): text, "90": " other"}, **more,
    }  # fmt: skip


def eventful() -> list[dict[str, Any]]:
    """Return a text with a rewind, refused drafts and routing, and a second text that is cut."""
    return [
        STARTED,
        token(0, " upon", 11, 0.75, 0.875),
        token(1, " a", 12, 0.5, 0.625),
        token(2, " tapestry", 13, 0.03, 0.0625, rank=4),
        note(rewind={"to": 2, "rule": "phrase 'a tapestry'", "token": 13}),
        {"event": "withdrawn", "keep": 2, "tokens": 1},
        token(2, " time", 14, 0.25, 0.5, rank=2),
        {**note(drafted=3, accepted=1, rejected=[15, 16]), "names": {"15": " long", "16": " ago"}},
        token(3, ",", 17, 0.9, 0.95),
        token(4, " there", 18, 0.001, 0.01, rank=40),
        note(routed="target", score=0.25),
        token(5, "\nwas", 19, 0.6, 0.6),
        note(routed="small", score=0.75),
        token(6, " one", 20, 0.6, 0.6),
        note(routed="small", score=0.8125),
        token(7, ".", 21, 0.7, 0.7),
        {
            "event": "finished", "reason": "eos", "tokens": 8,
            "timings": {"generated_tokens": 8, "decode_s": 2.0},
        },
        {**STARTED, "request": 1},
        {**token(0, " more", 22, 0.5, 0.5), "request": 1},
    ]  # fmt: skip
