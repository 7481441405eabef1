"""``index.json``: what an index was made with, and which segments it consists of.

The file is replaced as a whole, and only after the segments it names are on disk: whatever stops a
build, the index is what its last manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, MissingFile, SteersmanError
from ..model import Model
from ..strict_json import parse_json
from .prompt import WordEncoder, WordPrompt
from .represent import IMPACT_SCALE, PromptReps
from .words import WORDS_VERSION

FORMAT = "steersman.index.v1"
NAME = "index.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``index.json`` holds.

    Attributes
    ----------
    settings : mapping
        What representations depend on: queries must be made with the same.
    engine : mapping
        Engine, number format and arguments it was opened with; another one rounds differently.
    segments : tuple of (name, documents)
    graph : (name, documents), or None
        File of the approximate vector index over the first documents.
    job : (input, documents before), or None
        An unfinished build or addition.
    last : str
        Input of the last finished one.
    """

    settings: Mapping[str, Any]
    engine: Mapping[str, Any]
    segments: tuple[tuple[str, int], ...] = ()
    graph: tuple[str, int] | None = None
    job: tuple[str, int] | None = None
    last: str = ""
    serial: int = 0  # of the next segment's name
    format: str = field(default=FORMAT)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(count for _, count in self.segments)

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest in one step."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        part = folder / f".{NAME}.part"
        with part.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / NAME)

    def with_segment(self, name: str, count: int) -> Manifest:
        """Return the manifest with one more segment."""
        return replace(self, segments=(*self.segments, (name, count)), serial=self.serial + 1)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index.

    Raises
    ------
    MissingFile
        The folder is not there, or is no index.
    InvalidInput
        It is of another version, or damaged.
    """
    path = folder / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        told = "is not an index (no index.json)" if folder.exists() else "no such folder"
        raise MissingFile(f"{folder}: {told}; make one with: steersman index") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {error}") from None
    value = parse_json(text, str(path))
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InvalidInput(f"{path}: not in the format {FORMAT}; build the index again")
    try:
        segments = tuple((_name(name), int(count)) for name, count in value["segments"])
        graph, job = value["graph"], value["job"]
        return Manifest(
            settings=dict(value["settings"]),
            engine=dict(value["engine"]),
            segments=segments,
            graph=None if graph is None else (_name(graph[0]), int(graph[1])),
            job=None if job is None else (str(job[0]), int(job[1])),
            last=str(value["last"]),
            serial=int(value["serial"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidInput(f"{path}: damaged ({error}); build the index again") from None


def _name(value: Any) -> str:
    """Return a name that stays inside the index's folder."""
    if not isinstance(value, str) or Path(value).name != value or value in ("", ".", ".."):
        raise ValueError(f"{value!r} is not the name of a file")
    return value


def settings_of(model: Model, reps: PromptReps, encoder: WordEncoder) -> dict[str, Any]:
    """Return all that representations depend on, as plain JSON values."""
    template = json.dumps(encoder.parts, sort_keys=True).encode()
    info = model.info
    value = {
        "weights": info.fingerprint or info.name,
        "width": info.width,
        "vocab_size": info.vocab_size,
        "template": hashlib.sha256(template).hexdigest()[:16],
        "words": WORDS_VERSION,
        "impact_scale": IMPACT_SCALE,
        **reps.as_dict(),
    }
    return dict(json.loads(json.dumps(value)))


def reps_of(manifest: Manifest, folder: Path) -> PromptReps:
    """Return the settings that an index was made with, to represent queries by.

    Raises
    ------
    InvalidInput
        This version does not know them.
    """
    try:
        names = [f.name for f in fields(PromptReps) if f.name != "prompt"]
        given = {name: manifest.settings[name] for name in names}
        return PromptReps(prompt=WordPrompt(**manifest.settings["prompt"]), **given)
    except (KeyError, TypeError, SteersmanError) as error:
        raise InvalidInput(
            f"{folder / NAME}: settings: not of this version ({error}); build the index again"
        ) from None


def engine_of(model: Model) -> dict[str, Any]:
    """Return what made an index besides its settings."""
    info = model.info
    options = {
        k: v
        for k, v in model.options.items()
        if k in ("model", "adapter", "layers") and v is not None
    }
    value = {"model": info.name, "backend": info.backend, "dtype": info.dtype, "options": options}
    return dict(json.loads(json.dumps(value, default=str)))


def check_settings(folder: Path, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InvalidInput, naming what differs, if an index was made with other settings."""
    names = sorted({*made, *now})
    differ = [name for name in names if made.get(name) != now.get(name)]
    if differ:
        told = "; ".join(
            f"{name} was {_short(made.get(name))} and is now {_short(now.get(name))}"
            for name in differ
        )
        raise InvalidInput(
            f"{folder}: made with other settings ({told}); use them again or build another index"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
