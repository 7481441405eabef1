"""Decoding strategies on one loop (:mod:`.loop`); :data:`STRATEGIES` names them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from ..errors import UsageError, did_you_mean
from .antislop import Antislop
from .beam import BeamSearch
from .best_of_n import BestOfN
from .block_diffusion import BlockDiffusion
from .byte_level import ByteLevel, Cover, TokenHealing
from .contrastive import ContrastiveSearch
from .dola import DoLa
from .opera import Opera
from .r2r import R2R
from .sample import Sample
from .soft_thinking import SoftThinking
from .speculative.prompt_lookup import PromptLookup
from .speculative.spectr import SpecTr, Speculative
from .speculative.stand import STAND
from .value_beam import ValueBeam

STRATEGIES: Mapping[str, type[Any]] = {
    "sample": Sample,
    "beam": BeamSearch,
    "contrastive": ContrastiveSearch,
    "dola": DoLa,
    "best_of_n": BestOfN,
    "soft_thinking": SoftThinking,
    "opera": Opera,
    "value_beam": ValueBeam,
    "r2r": R2R,
    "antislop": Antislop,
    "block_diffusion": BlockDiffusion,
    "prompt_lookup": PromptLookup,
    "stand": STAND,
    "speculative": Speculative,
    "spectr": SpecTr,
    "byte_level": ByteLevel,
    "cover": Cover,
    "token_healing": TokenHealing,
}

ENTRY_POINTS = "steersman.strategies"


def strategy_class(name: str) -> type[Any]:
    """Return the strategy called ``name``: a built-in one, or an installed package's.

    Raises
    ------
    UsageError
        No strategy has this name.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            loaded: type[Any] = point.load()
            return loaded
    raise UsageError(f"strategy {name!r}: unknown{did_you_mean(name, STRATEGIES)}")


def strategy_name(strategy: Any) -> str:
    """Return the name under which the class of ``strategy`` is registered.

    Raises
    ------
    UsageError
        It is registered under none.
    """
    for name, cls in STRATEGIES.items():
        if type(strategy) is cls:
            return name
    for point in entry_points(group=ENTRY_POINTS):
        if point.value == f"{type(strategy).__module__}:{type(strategy).__qualname__}":
            return point.name
    raise UsageError(f"strategy {type(strategy).__name__}: not registered under any name")
