"""Stages by name, for profiles."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import UsageError, did_you_mean
from ..model import Tokenizer
from .dry import Dry
from .logit_bias import LogitBias
from .min_p import MinP
from .mirostat import Mirostat
from .penalties import Penalties
from .processor import Processor
from .stage import Stage
from .temperature import Temperature
from .top_k import TopK
from .top_n_sigma import TopNSigma
from .top_p import TopP
from .typical_p import TypicalP
from .xtc import XTC

STAGES: dict[str, type[Stage]] = {
    "logit_bias": LogitBias,
    "penalties": Penalties,
    "dry": Dry,
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "typical_p": TypicalP,
    "top_n_sigma": TopNSigma,
    "xtc": XTC,
    "mirostat": Mirostat,
    "processor": Processor,
}

ENTRY_POINTS = "steersman.logits"


def stage_class(name: str) -> type[Stage]:
    """Return the stage called ``name``: a built-in one, or one that an installed package adds.

    Packages add stages under the entry-point group ``steersman.logits``; only the one that is named
    is imported.

    Raises
    ------
    UsageError
        There is no such stage.
    """
    if name in STAGES:
        return STAGES[name]
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    for point in points:
        if point.name == name:
            found = point.load()
            if not (isinstance(found, type) and issubclass(found, Stage)):
                raise UsageError(f"{name}: entry point {point.value} is not a Stage")
            return found
    known = [*STAGES, *(point.name for point in points)]
    raise UsageError(f"{name}: unknown stage{did_you_mean(name, known)}")


def stage_fields(stage: type[Stage]) -> list[str]:
    """Return the keys that a profile may set."""
    return [f.name for f in fields(stage) if f.init and not f.metadata.get("hidden")]  # type: ignore[arg-type]


def build_stage(
    name: str, params: Mapping[str, Any] | None = None, *, tokenizer: Tokenizer | None = None
) -> Stage:
    """Return the stage ``name`` with ``params``, bound to ``tokenizer`` if one is given.

    Raises
    ------
    UsageError
        Unknown stage or parameter, or a value out of range; the message starts with the stage and
        the key.
    """
    cls = stage_class(name)
    known = stage_fields(cls)
    if params is None:
        params = {}
    if not isinstance(params, Mapping):
        example = f"{{{known[0]}: ...}}" if known else "{}"
        raise UsageError(f"{name}: parameters must be a mapping like {example}, got {params!r}")
    for key in params:
        if key not in known:
            raise UsageError(f"{name}.{key}: unknown key{did_you_mean(str(key), known)}")
    stage = cls(**params)
    return stage if tokenizer is None else stage.bind(tokenizer)
