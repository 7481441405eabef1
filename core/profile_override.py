"""Changing single parameters of a profile: ``-o temperature.t=0.5`` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .errors import SteersmanError, UsageError, did_you_mean
from .parameters import Mismatch, convert, nested_strategies, parameters
from .profile import Profile
from .profile_build import GENERATION, build, check_generation, has_chain, with_chain

# Where a stage goes that an override adds to a chain: llama.cpp's default order.
STAGE_ORDER = (
    "logit_bias",
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "processor",
    "temperature",
    "mirostat",
)


def override(profile: Profile, key: str, value: Any, origin: str) -> Profile:
    """Return the profile with one parameter changed; see :meth:`Profile.override`.

    Raises
    ------
    Mismatch, UsageError
        What is wrong, without the key.
    """
    head, _, rest = key.partition(".")
    if head == "generation" or (key in GENERATION):
        return _set_generation(profile, rest if head == "generation" else key, value, origin)
    if key == "strategy":
        return _set_strategy(profile, value, origin)
    if head in ("strategy", profile.strategy_name):
        return _set_strategy_parameter(profile, rest, value, origin)
    if head == "logits":
        return _set_indexed(profile, rest, value, origin)
    return _set_stage(profile, head, rest, value, origin)


def _set_generation(profile: Profile, name: str, value: Any, origin: str) -> Profile:
    if name not in GENERATION:
        raise Mismatch(f"unknown key{did_you_mean(name, GENERATION)}")
    if name == "stop" and isinstance(value, str):
        value = [value]
    checked = convert(value, GENERATION[name])
    check_generation({name: checked})
    origins = {**profile.origins, f"generation.{name}": origin}
    if name == "stop":
        return replace(profile, stop=checked, origins=origins)
    return replace(profile, max_tokens=checked, origins=origins)


def _set_strategy(profile: Profile, name: Any, origin: str) -> Profile:
    from .decode import strategy_class

    if not isinstance(name, str):
        raise Mismatch(f"expected the name of a strategy, got {name!r}")
    cls = strategy_class(name)
    if profile.stages and not has_chain(cls):
        raise Mismatch(f"strategy {name!r} takes no logits chain, and the profile has one")
    origins = {k: v for k, v in profile.origins.items() if not k.startswith("strategy")}
    return replace(
        profile,
        strategy_name=name,
        strategy=with_chain(cls(), profile.stages),
        origins={**origins, "strategy": origin},
    )


def _set_strategy_parameter(profile: Profile, name: str, value: Any, origin: str) -> Profile:
    return replace(
        profile,
        strategy=with_chain(_with_parameter(profile.strategy, name, value), profile.stages),
        origins={**profile.origins, f"strategy.{profile.strategy_name}.{name}": origin},
    )


def _with_parameter(strategy: Any, name: str, value: Any) -> Any:
    """Return ``strategy`` with one parameter changed; "inner.nodes" is one of a strategy inside."""
    from .decode import strategy_class

    head, _, rest = name.partition(".")
    if head not in nested_strategies(type(strategy)):
        return _replaced(strategy, name, _parameter(type(strategy), name, value))
    if rest:
        return _replaced(strategy, head, _with_parameter(getattr(strategy, head), rest, value))
    if not isinstance(value, str):
        raise Mismatch(f"expected the name of a strategy, got {value!r}")
    return _replaced(strategy, head, strategy_class(value)())


def _set_indexed(profile: Profile, rest: str, value: Any, origin: str) -> Profile:
    index, _, name = rest.partition(".")
    if not index.isdecimal() or int(index) >= len(profile.stages):
        raise Mismatch(
            f"no such stage; the chain has {len(profile.stages)}: "
            + ", ".join(f"{i} {s.name}" for i, s in enumerate(profile.stages))
        )
    stage = profile.stages[int(index)]
    return _put(profile, int(index), name.removeprefix(f"{stage.name}."), value, origin)


def _set_stage(profile: Profile, head: str, name: str, value: Any, origin: str) -> Profile:
    from .decode import STRATEGIES
    from .logits import STAGES, stage_class

    try:
        cls = stage_class(head)
    except UsageError:
        if head in STRATEGIES:
            raise Mismatch(
                f"the profile's strategy is {profile.strategy_name!r}; "
                f"choose the other first: strategy={head}"
            ) from None
        known = [*STAGES, profile.strategy_name, "strategy", "generation", "logits"]
        raise Mismatch(f"unknown key{did_you_mean(head, known)}") from None
    places = [i for i, stage in enumerate(profile.stages) if stage.name == cls.name]
    if not name:
        return _switch(profile, cls, places, value, origin)
    if len(places) > 1:
        raise Mismatch(
            f"the chain has {len(places)} stages of this name; write "
            + " or ".join(f"logits.{i}.{name}" for i in places)
        )
    if not places:
        _parameter(cls, name, value)  # an error about the parameter comes before any change
        profile, place = _insert(profile, cls, origin)
        places = [place]
    return _put(profile, places[0], name, value, origin)


def _switch(
    profile: Profile, cls: type[Any], places: list[int], value: Any, origin: str
) -> Profile:
    if value is True:
        return profile if places else _insert(profile, cls, origin)[0]
    if value is not False and value is not None:
        known = ", ".join(f"{cls.name}.{p}" for p in parameters(cls))
        raise Mismatch(f"write on or off, or one of {known}")
    for place in reversed(places):
        stages = (*profile.stages[:place], *profile.stages[place + 1 :])
        profile = _restaged(
            profile, stages, {i: i - (i > place) for i in range(len(profile.stages)) if i != place}
        )
    return profile


def _insert(profile: Profile, cls: type[Any], origin: str) -> tuple[Profile, int]:
    if not has_chain(type(profile.strategy)):
        raise Mismatch(f"strategy {profile.strategy_name!r} takes no logits chain")

    def rank(name: str) -> int:
        known = name if name in STAGE_ORDER else "xtc"
        return STAGE_ORDER.index(known)

    later = (i for i, s in enumerate(profile.stages) if rank(s.name) > rank(cls.name))
    place = next(later, len(profile.stages))
    stages = (*profile.stages[:place], build(cls, {}), *profile.stages[place:])
    moved = {i: i + (i >= place) for i in range(len(profile.stages))}
    profile = _restaged(profile, stages, moved)
    return replace(
        profile, origins={**profile.origins, f"logits.{place}.{cls.name}": origin}
    ), place


def _restaged(profile: Profile, stages: tuple[Any, ...], moved: Mapping[int, int]) -> Profile:
    """Return the profile with other stages; ``moved`` maps old places to new ones."""
    origins = {}
    for key, origin in profile.origins.items():
        part = key.split(".")
        if part[0] == "logits":
            if int(part[1]) not in moved:
                continue
            part[1] = str(moved[int(part[1])])
        origins[".".join(part)] = origin
    try:
        strategy = with_chain(profile.strategy, stages)
    except SteersmanError as exc:
        raise Mismatch(str(exc)) from None
    return replace(profile, stages=stages, strategy=strategy, origins=origins)


def _put(profile: Profile, place: int, name: str, value: Any, origin: str) -> Profile:
    stage = profile.stages[place]
    changed = _replaced(stage, name, _parameter(type(stage), name, value))
    stages = (*profile.stages[:place], changed, *profile.stages[place + 1 :])
    profile = _restaged(profile, stages, {i: i for i in range(len(stages))})
    key = f"logits.{place}.{stage.name}.{name}"
    return replace(profile, origins={**profile.origins, key: origin})


def _parameter(cls: type[Any], name: str, value: Any) -> Any:
    known = parameters(cls)
    if name not in known:
        raise Mismatch(f"unknown parameter {name!r}{did_you_mean(name, known)}")
    return convert(value, known[name])


def _replaced(thing: Any, name: str, value: Any) -> Any:
    try:
        return replace(thing, **{name: value})
    except (SteersmanError, TypeError, ValueError) as exc:
        raise Mismatch(str(exc)) from None
