"""A trace as steps that can be walked forwards and backwards."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .format import is_whole
from .reader import Line, read_line, read_trace


@dataclass(frozen=True, slots=True)
class Piece:
    """A token as it is shown: its text, and the frame that tells about it."""

    frame: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One step of a text: a token came, tokens were taken back, or the text ended.

    Attributes
    ----------
    kind : {"token", "withdrawn", "finished", "failed"}
    line, begin : int
        Place in the file, for :meth:`Replay.detail`.
    seconds : float
        Since the request began.
    tip : int
        Frame of the last token of the text after this step; -1 if it is empty.
    length : int
        Tokens of the text after this step.
    previous : int
        For a token: the frame of the token before it. For "withdrawn": the tip before it.
    token : int
        Id; -1 unless a token came.
    text : str
        A token's characters; those of a character cut in two belong to the token that completes it.
    p, final : float or None
        The token's probability under the model and after the chain.
    rank : int or None
    entropy : float or None
        Of the model's distribution, in nats.
    notes : tuple of mapping
        What the strategy said right before this step.
    rejected : tuple of int
        Drafted tokens that were refused here.
    said : str
        Why the text ended.
    """

    kind: str
    line: int
    begin: int
    seconds: float
    tip: int
    length: int
    previous: int = -1
    token: int = -1
    text: str = ""
    p: float | None = None
    final: float | None = None
    rank: int | None = None
    entropy: float | None = None
    notes: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[int, ...] = ()
    said: str = ""

    @property
    def marked(self) -> bool:
        """Whether something other than one more token happened."""
        return bool(self.kind != "token" or self.notes or self.rejected)

    @property
    def routed(self) -> str | None:
        """The role that a routing strategy chose for this token."""
        found = [note["routed"] for note in self.notes if isinstance(note.get("routed"), str)]
        return found[-1] if found else None


@dataclass(kw_only=True)
class Recording:
    """One request of a trace.

    Attributes
    ----------
    started : dict
        The line that began it: models, profile, seed, prompt.
    frames : list of Frame
    names : dict of id to str
        Every token that the request mentions.
    """

    started: dict[str, Any]
    frames: list[Frame] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    @property
    def request(self) -> int:
        """Number of the request."""
        return int(self.started["request"])

    @property
    def finished(self) -> bool:
        """Whether the end is in the trace."""
        return bool(self.frames) and self.frames[-1].kind in ("finished", "failed")

    def pieces(self, frame: int, most: int | None = None) -> list[Piece]:
        """Return the text after ``frame``: its last ``most`` tokens, in order."""
        tip = self.frames[frame].tip if self.frames else -1
        return list(self._back(tip, -1, most))[::-1]

    def withdrawn(self, frame: int) -> list[Piece]:
        """Return the tokens that were taken back at ``frame``, in order."""
        step = self.frames[frame]
        if step.kind != "withdrawn":
            return []
        return list(self._back(step.previous, step.tip, None))[::-1]

    def _back(self, tip: int, end: int, most: int | None) -> Iterator[Piece]:
        count = 0
        while tip != end and tip >= 0 and (most is None or count < most):
            step = self.frames[tip]
            yield Piece(tip, step.text)
            tip, count = step.previous, count + 1

    def name(self, token: int) -> str:
        """Return a token's text, or its number where it has none."""
        return self.names.get(token, f"#{token}")


class Replay:
    """A trace file in memory, without the accounts of single tokens, which are read on demand.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    recordings : list of Recording
    header : dict
    full : bool
        Whether the trace ends because it reached its limit.

    Raises
    ------
    MissingFile, InvalidInput
        As :func:`read_trace`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recordings: list[Recording] = []
        self.header: dict[str, Any] = {}
        self.full = False
        building: _Builder | None = None
        for line in read_trace(path):
            if line.event == "header":
                self.header = line.data
            elif line.event == "full":
                self.full = True
            elif line.event == "started":
                building = _Builder(line)
                self.recordings.append(building.recording)
            elif building is not None:
                building.take(line)

    def detail(self, frame: Frame) -> dict[str, Any]:
        """Return the whole line of a frame: for a token, ``raw`` and ``stages`` if recorded."""
        return read_line(self.path, frame.begin, frame.line)


class _Builder:
    """Makes the frames of one request from its lines."""

    def __init__(self, line: Line) -> None:
        self.recording = Recording(started=line.data)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unfinished: dict[int, bytes] = {}  # per frame: the beginning of a character
        self._notes: list[Mapping[str, Any]] = []
        self._rejected: tuple[int, ...] = ()
        self._accepted = 0  # tokens that come before what was rejected
        self._strings: dict[str, str] = {}  # equal texts are kept once

    def take(self, line: Line) -> None:
        """Add one line."""
        data = line.data
        names = self.recording.names
        for key, name in data.get("names", {}).items():
            names[int(key)] = self._strings.setdefault(name, name)
        if line.event == "note":
            self._note(data["values"])
        elif line.event == "token":
            self._token(line)
        elif line.event == "withdrawn":
            self._withdrawn(line)
        elif line.event in ("finished", "failed"):
            last = self._last
            said = data["reason"] if line.event == "finished" else data["message"]
            self._add(line, kind=line.event, tip=last[0], length=last[1], said=said)

    @property
    def _last(self) -> tuple[int, int]:
        """Tip and length of the text so far."""
        frames = self.recording.frames
        return (frames[-1].tip, frames[-1].length) if frames else (-1, 0)

    def _note(self, values: Mapping[str, Any]) -> None:
        self._notes.append(values)
        rejected, accepted = values.get("rejected"), values.get("accepted")
        if isinstance(rejected, list):
            self._rejected = tuple(i for i in rejected if is_whole(i))
            self._accepted = accepted if is_whole(accepted) else 0  # type: ignore[assignment]

    def _add(self, line: Line, **facts: Any) -> None:
        rejected: tuple[int, ...] = ()
        if self._rejected and (self._accepted == 0 or facts["kind"] != "token"):
            rejected, self._rejected = self._rejected, ()
        self._accepted = max(0, self._accepted - 1)
        self.recording.frames.append(
            Frame(
                line=line.number,
                begin=line.begin,
                seconds=float(line.data["t"]),
                notes=tuple(self._notes),
                rejected=rejected,
                **facts,
            )
        )
        self._notes.clear()

    def _token(self, line: Line) -> None:
        data, (tip, length) = line.data, self._last
        raw = data.get("raw", {})
        stages = data.get("stages", [])
        last = stages[-1] if stages else raw
        text = self._decoder.decode(_bytes(data))
        if begun := self._decoder.getstate()[0]:
            self._unfinished[len(self.recording.frames)] = begun
        self._add(
            line,
            kind="token",
            tip=len(self.recording.frames),
            length=length + 1,
            previous=tip,
            token=data["id"],
            text=self._strings.setdefault(text, text),
            p=_probability(raw.get("p"), data.get("raw_logprob")),
            final=_probability(last.get("p"), data.get("logprob")),
            rank=raw.get("rank"),
            entropy=raw.get("entropy"),
        )

    def _withdrawn(self, line: Line) -> None:
        frames, (tip, _) = self.recording.frames, self._last
        before, kept = tip, line.data["keep"]
        for _ in range(line.data["tokens"]):
            tip = frames[tip].previous
        self._add(line, kind="withdrawn", tip=tip, length=kept, previous=before)
        # The text may now end inside a character.
        self._decoder.setstate((self._unfinished.get(tip, b""), 0))


def _bytes(data: Mapping[str, Any]) -> bytes:
    """Return a token's exact bytes."""
    if "bytes" in data:
        return bytes.fromhex(data["bytes"])
    return str(data["text"]).encode("utf-8", "replace")


def _probability(p: float | None, logprob: float | None) -> float | None:
    if p is not None:
        return p
    return math.exp(min(logprob, 0.0)) if logprob is not None else None
