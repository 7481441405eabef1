"""Decoding strategies on one loop (:mod:`.loop`); :data:`STRATEGIES` names them."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .antislop import Antislop as Antislop
    from .beam import BeamSearch as BeamSearch
    from .best_of_n import BestOfN as BestOfN
    from .block_diffusion import BlockDiffusion as BlockDiffusion
    from .byte_level import ByteLevel as ByteLevel
    from .byte_level import Cover as Cover
    from .byte_level import TokenHealing as TokenHealing
    from .contrastive import ContrastiveSearch as ContrastiveSearch
    from .dola import DoLa as DoLa
    from .opera import Opera as Opera
    from .r2r import R2R as R2R
    from .sample import Sample as Sample
    from .soft_thinking import SoftThinking as SoftThinking
    from .speculative.prompt_lookup import PromptLookup as PromptLookup
    from .speculative.spectr import SpecTr as SpecTr
    from .speculative.spectr import Speculative as Speculative
    from .speculative.stand import STAND as STAND
    from .value_beam import ValueBeam as ValueBeam

_BUILT_IN = {
    "sample": ".sample:Sample",
    "beam": ".beam:BeamSearch",
    "contrastive": ".contrastive:ContrastiveSearch",
    "dola": ".dola:DoLa",
    "best_of_n": ".best_of_n:BestOfN",
    "soft_thinking": ".soft_thinking:SoftThinking",
    "opera": ".opera:Opera",
    "value_beam": ".value_beam:ValueBeam",
    "r2r": ".r2r:R2R",
    "antislop": ".antislop:Antislop",
    "block_diffusion": ".block_diffusion:BlockDiffusion",
    "prompt_lookup": ".speculative.prompt_lookup:PromptLookup",
    "stand": ".speculative.stand:STAND",
    "speculative": ".speculative.spectr:Speculative",
    "spectr": ".speculative.spectr:SpecTr",
    "byte_level": ".byte_level:ByteLevel",
    "cover": ".byte_level:Cover",
    "token_healing": ".byte_level:TokenHealing",
}
_HOMES = {home.partition(":")[2]: home.partition(":")[0] for home in _BUILT_IN.values()}


class _Strategies(MutableMapping[str, type[Any]]):
    """Strategy classes by name; a class is imported when it is first asked for.

    Opening a model and answering with one strategy should not pay for the imports of all.
    """

    def __init__(self) -> None:
        self._found: dict[str, str | type[Any]] = dict(_BUILT_IN)

    def __getitem__(self, name: str) -> type[Any]:
        found = self._found[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self._found[name] = getattr(import_module(module, __name__), attribute)
        return found

    def __setitem__(self, name: str, cls: type[Any]) -> None:
        self._found[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def name_of(self, cls: type[Any]) -> str | None:
        """Return the name of a class, importing nothing."""
        home = (cls.__module__, cls.__qualname__)
        for name, found in self._found.items():
            if found is cls:
                return name
            if isinstance(found, str):
                module, _, attribute = found.partition(":")
                # A package re-exports classes of the modules below it.
                if attribute == home[1] and f"{home[0]}.".startswith(f"{__name__}{module}."):
                    return name
        return None


STRATEGIES = _Strategies()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


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
    name = STRATEGIES.name_of(type(strategy))
    if name is not None:
        return name
    for point in entry_points(group=ENTRY_POINTS):
        if point.value == f"{type(strategy).__module__}:{type(strategy).__qualname__}":
            return point.name
    raise UsageError(f"strategy {type(strategy).__name__}: not registered under any name")
