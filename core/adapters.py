"""LoRA adapters by name or folder, and what a folder says about how to use it.

A folder in peft's format may hold two files more: ``steersman.json`` (format, base model, training,
and under ``rerank`` the window, stride and words per passage it was trained with) and
``prompt.yaml`` (the wording of its reranking prompt). ``steersman train first`` writes both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidInput, MissingFile, did_you_mean
from .paths import config_dir
from .whole_file import whole_file

if TYPE_CHECKING:
    from .reranking.prompt import Prompt

FORMAT = 1
NOTE, PROMPT = "steersman.json", "prompt.yaml"
_CONFIG = "adapter_config.json"
_SHIPPED = Path(__file__).resolve().parent.parent / "profiles" / "adapters"


def adapter_folders() -> list[Path]:
    """Return the folders that hold adapters by name: the user's, then the built-in ones."""
    return [config_dir() / "adapters", _SHIPPED]


def adapter_names() -> list[str]:
    """Return the names of the adapters that are there."""
    found = {
        path.parent.name
        for folder in adapter_folders()
        if folder.is_dir()
        for path in folder.glob(f"*/{_CONFIG}")
    }
    return sorted(found)


def find_adapter(name: str | Path) -> Path:
    """Return an adapter's folder.

    Parameters
    ----------
    name : str or Path
        A folder, or the name of one in the user's or the built-in folder of adapters.

    Raises
    ------
    MissingFile
        There is none; the message names the nearest.
    """
    path = Path(name).expanduser()
    if (path / _CONFIG).is_file():
        return path
    text = str(name)
    if text and not path.is_dir() and os.sep not in text and text not in (".", ".."):
        for folder in adapter_folders():
            if (folder / text / _CONFIG).is_file():
                return folder / text
    where = f"{path}: no {_CONFIG} in it" if path.is_dir() else f"{text!r}: no such folder or name"
    hint = did_you_mean(text, adapter_names()) if adapter_names() else ""
    raise MissingFile(f"--adapter {where}{hint}")


@dataclass(frozen=True, kw_only=True)
class RerankSettings:
    """How an adapter was trained to rerank; what is not said is None."""

    window_size: int | None = None
    stride: int | None = None
    max_words: int | None = None
    first_stage_weight: float | None = None

    def __post_init__(self) -> None:
        weight = self.first_stage_weight
        if weight is not None and not (type(weight) in (int, float) and 0 <= weight <= 1e6):
            raise InvalidInput(
                f"rerank: first_stage_weight: must be a number from 0 to 1e6, got {weight!r}"
            )
        for name in ("window_size", "stride", "max_words"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= 10_000):
                raise InvalidInput(f"rerank: {name}: must be a whole number, got {value!r}")


def read_rerank_settings(folder: Path) -> tuple[RerankSettings, Path | None]:
    """Return the settings in an adapter's folder, and the path of its prompt if it has one.

    Raises
    ------
    InvalidInput
        ``steersman.json`` is damaged or of another format.
    """
    path = folder / NOTE
    prompt = folder / PROMPT if (folder / PROMPT).is_file() else None
    if not path.is_file():
        return RerankSettings(), prompt
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("larger than 1 MiB")
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["format"] != FORMAT:
            raise ValueError(f"format {note['format']!r}, this program reads {FORMAT}")
        return RerankSettings(**note.get("rerank", {})), prompt
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, InvalidInput
    ) as exc:  # fmt: skip
        raise InvalidInput(f"{path}: not usable: {exc}") from None


def rerank_options(name: str | Path) -> dict[str, Any]:
    """Return the arguments of ``rerank`` and ``Reranker`` that an adapter was trained with.

    Examples
    --------
    >>> model = load("smollm2", adapter="my-ranker")
    >>> rerank(model, query, passages, **rerank_options("my-ranker"))
    """
    settings, prompt = read_rerank_settings(find_adapter(name))
    found = {
        "window": settings.window_size,
        "stride": settings.stride,
        "max_words": settings.max_words,
        "first_stage_weight": settings.first_stage_weight,
        "prompt": None if prompt is None else _read_prompt(prompt),
    }
    return {key: value for key, value in found.items() if value is not None}


def _read_prompt(path: Path) -> Prompt:
    from .reranking.prompt import read_prompt

    return read_prompt(path)


def write_note(folder: Path, settings: RerankSettings, facts: Mapping[str, Any]) -> None:
    """Write ``steersman.json`` into an adapter's folder."""
    rerank = {k: v for k, v in asdict(settings).items() if v is not None}
    note = {"format": FORMAT, "rerank": rerank, **facts}
    with whole_file(folder / NOTE) as file:
        file.write((json.dumps(note, indent=1) + "\n").encode())
