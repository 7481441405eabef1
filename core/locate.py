"""From what a person writes after ``--model`` to files on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Weights on disk.

    Attributes
    ----------
    name : str
        How to show it: the known name, or the last part of the path.
    kind : {"gguf", "hf"}
        A GGUF file, or a folder with ``config.json`` and safetensors.
    path : Path
    trusted : bool
        True for files whose hash steersman ships; others are first opened in a child process.
    """

    name: str
    kind: Literal["gguf", "hf"]
    path: Path
    trusted: bool = False
