"""From a parsed file to a profile; every mistake is reported with file, line and key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from . import strict_yaml
from .errors import SteersmanError, UsageError, did_you_mean
from .layers import read_layers
from .parameters import Mismatch, convert, nested_strategies, parameters, path_parameters
from .profile import Profile
from .strict_yaml import Document

_KEYS = ("description", "references", "logits", "strategy", "generation", "models")
GENERATION: Mapping[str, Any] = {"max_tokens": int | None, "stop": tuple[str, ...]}
MODEL: Mapping[str, Any] = {
    "model": str,
    "backend": str,
    "context": int,
    "dtype": str,
    "device": str,
    "threads": int,
    "layers": int | str | tuple[int, ...],
    "adapter": str,
    "setting": str,
}
MAX_STOPS = 64


def has_chain(strategy: type[Any]) -> bool:
    return any(f.name == "chain" for f in fields(strategy)) if is_dataclass(strategy) else False


def with_chain(strategy: Any, stages: tuple[Any, ...]) -> Any:
    """Return ``strategy``, and every strategy inside it, with a chain of ``stages``."""
    from .logits import Chain

    changed: dict[str, Any] = {
        name: with_chain(getattr(strategy, name), stages)
        for name in nested_strategies(type(strategy))
    }
    if has_chain(type(strategy)):
        changed["chain"] = Chain(stages)
    return replace(strategy, **changed) if changed else strategy


def build(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a stage or strategy from checked values; Mismatch when it refuses a value."""
    needed = [
        f.name
        for f in fields(cls)
        if f.init and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing := [name for name in needed if name not in values]:
        raise Mismatch(f"needs {', '.join(missing)}")
    try:
        return cls(**values)
    except SteersmanError as exc:
        raise Mismatch(str(exc)) from None
    except (TypeError, ValueError) as exc:
        raise Mismatch(f"{cls.__name__}: {exc}") from None


def _one_named(document: Document, path: strict_yaml.Key, what: str) -> tuple[str, dict[str, Any]]:
    """Return name and parameters of ``{name: {...}}``, ``{name: }`` or ``name``."""
    value = document.at(path)
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, dict) or len(value) != 1:
        document.error(path, f"must be one {what}, such as {{name: {{parameter: value}}}}")
    [(name, values)] = value.items()
    if values is None:
        return name, {}
    if not isinstance(values, dict):
        document.error(
            (*path, name), f"must hold parameters, such as {{parameter: value}}, got {values!r}"
        )
    return name, values


def _component(document: Document, path: strict_yaml.Key, what: str, find: Any) -> tuple[str, Any]:
    name, given = _one_named(document, path, what)
    inside = (*path, name)
    try:
        cls = find(name)
    except UsageError as exc:
        document.error(inside, str(exc).partition(": ")[2])
    known, nested = parameters(cls), nested_strategies(cls)
    values = {}
    for key, value in given.items():
        if key not in known:
            document.error((*inside, key), f"unknown key{did_you_mean(key, known)}")
        if key in nested:
            values[key] = _component(document, (*inside, key), "strategy", find)[1]
        else:
            values[key] = _converted(document, (*inside, key), value, known[key])
    for key in path_parameters(cls):
        if values.get(key):
            beside = Path(document.source).parent / Path(values[key]).expanduser()
            values[key] = str(beside.absolute())
    try:
        return name, build(cls, values)
    except Mismatch as exc:
        message = str(exc)
        # "min_p: p must be in ..." points at its key when it starts with one.
        start = message.removeprefix(f"{name}: ")
        first = start.partition(" ")[0]
        if first in given:
            document.error((*inside, first), start)
        document.error(inside, start)


def _converted(document: Document, path: strict_yaml.Key, value: Any, hint: Any) -> Any:
    try:
        return convert(value, hint)
    except Mismatch as exc:
        document.error(path, str(exc))


def from_document(document: Document, *, name: str) -> Profile:
    """Build a profile from a parsed file.

    Raises
    ------
    ProfileError
        ``file:line: key: what is wrong``.
    """
    from .decode import strategy_class
    from .logits import stage_class

    data = document.data
    if not isinstance(data, dict):
        document.error((), "must hold keys such as 'description' and 'logits'")
    document.check_keys((), _KEYS)
    text = {
        key: _converted(document, (key,), data[key], hint)
        for key, hint in (("description", str), ("references", tuple[str, ...]))
        if data.get(key) is not None
    }
    stages = []
    listed = [] if data.get("logits") is None else data["logits"]
    if not isinstance(listed, list):
        document.error(("logits",), "must be a list of stages, such as - temperature: {t: 0.8}")
    origins: dict[str, str] = {}

    def note(path: strict_yaml.Key, key: str) -> None:
        origins[key] = f"{document.source}:{document.line(path)}"

    for i in range(len(listed)):
        stage_name, stage = _component(document, ("logits", i), "stage", stage_class)
        stages.append(stage)
        given = listed[i][stage_name] if isinstance(listed[i], dict) else None
        for key in given or ():
            note(("logits", i, stage_name, key), f"logits.{i}.{stage_name}.{key}")
        if not given:
            note(("logits", i), f"logits.{i}.{stage_name}")
    if data.get("strategy") is None:
        strategy_name, strategy = "sample", strategy_class("sample")()
    else:
        strategy_name, strategy = _component(document, ("strategy",), "strategy", strategy_class)
        note(("strategy",), "strategy")
        given = data["strategy"].get(strategy_name) if isinstance(data["strategy"], dict) else None
        for key in given or ():
            note(("strategy", strategy_name, key), f"strategy.{strategy_name}.{key}")
    if stages and not has_chain(type(strategy)):
        document.error(("logits",), f"strategy {strategy_name!r} takes no logits chain")
    generation = _section(document, ("generation",), GENERATION)
    for key in generation:
        note(("generation", key), f"generation.{key}")
    models = _models(document, strategy)
    for role, options in models.items():
        for key in options:
            note(("models", role, key), f"models.{role}.{key}")
    try:
        check_generation(generation)
        strategy = with_chain(strategy, tuple(stages))
    except Mismatch as exc:
        document.error(("generation",), str(exc))
    except SteersmanError as exc:  # the chain refuses this order of stages
        document.error(("logits",), str(exc))
    return Profile(
        name=name,
        description=" ".join(str(text.get("description", "")).split()),
        source=document.source,
        references=tuple(text.get("references", ())),
        stages=tuple(stages),
        strategy_name=strategy_name,
        strategy=strategy,
        max_tokens=generation.get("max_tokens"),
        stop=tuple(generation.get("stop", ())),
        models=models,
        origins=origins,
    )


def _section(document: Document, path: strict_yaml.Key, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping of plain settings, checked; {} when it is not there."""
    value: Any = document.data
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        document.error(path, f"must hold {', '.join(known)}")
    document.check_keys(path, known)
    return {k: _converted(document, (*path, k), v, known[k]) for k, v in value.items()}


def check_generation(values: Mapping[str, Any]) -> None:
    limit, stop = values.get("max_tokens"), values.get("stop", ())
    if limit is not None and limit < 0:
        raise Mismatch(f"max_tokens must be at least 0, got {limit}")
    if len(stop) > MAX_STOPS:
        raise Mismatch(f"stop: at most {MAX_STOPS} texts, got {len(stop)}")
    if any(not text for text in stop):
        raise Mismatch("stop: a text must not be empty")


def _models(document: Document, strategy: Any) -> dict[str, dict[str, Any]]:
    value = document.data.get("models")
    if value is None:
        return {}
    if not isinstance(value, dict):
        document.error(("models",), "must hold roles, such as target: {model: smollm2}")
    document.check_keys(("models",), sorted({"target", *strategy.requires}))
    found = {role: _section(document, ("models", role), MODEL) for role in value}
    for role, options in found.items():
        try:
            read_layers(options.get("layers", 1))
        except UsageError as exc:
            document.error(("models", role, "layers"), str(exc).partition(": ")[2])
    return found
