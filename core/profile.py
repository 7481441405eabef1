"""Profiles: how to decode, as a YAML file.

A profile names the stages of the logit chain in order, a strategy, and limits. It is data: it runs
no code, picks no template, and every mistake in it is reported with file, line, key and the nearest
valid name. The keys under a stage or a strategy are the fields of its dataclass::

    description: What it is for.
    references: [arXiv:2407.01082]
    logits:
      - temperature: {t: 0.8}
      - min_p: {p: 0.05}
    strategy: {sample: {}}
    generation: {max_tokens: 512, stop: ["###"]}
    models: {target: {model: smollm2, backend: torch}}   # optional

A name is looked up in the user's folder (``config_dir()/profiles``), then among the built-in ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import strict_yaml
from .errors import SteersmanError, UsageError
from .model import Tokenizer
from .parameters import Mismatch, nested_strategies, parameters, path_parameters
from .profile_files import builtin_folder as builtin_folder
from .profile_files import find_profile as find_profile
from .profile_files import folders, profile_files
from .profile_files import new_profile as new_profile
from .profile_files import profile_names as profile_names
from .profile_files import user_folder as user_folder


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One effective parameter and where its value came from."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A loaded profile.

    Attributes
    ----------
    name : str
    description : str
    source : str
        Path of its file.
    references : tuple of str
        Papers or documents that its values come from.
    stages : tuple
        Stages of the logit chain, in order.
    strategy_name : str
    strategy : object
        Built strategy; its field ``chain`` holds the stages.
    max_tokens : int or None
        Most tokens to generate; None: what the context leaves.
    stop : tuple of str
        Strings that end the text.
    models : mapping of role to mapping
        Arguments of ``steersman.core.load`` per role ("target", "draft", ...).
    origins : mapping of key to str
        Where each value that is no default was set.
    """

    name: str
    description: str = ""
    source: str = ""
    references: tuple[str, ...] = ()
    stages: tuple[Any, ...] = ()
    strategy_name: str = "sample"
    strategy: Any = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    # -- reading -----------------------------------------------------------------------------

    def settings(self) -> list[Setting]:
        """Return every effective parameter, in the order of the chain, with its origin."""
        found: list[Setting] = []

        def add(key: str, value: Any) -> None:
            origin = self.origins.get(key, "default")
            found.append(Setting(key=key, value=value, origin=origin))

        for i, stage in enumerate(self.stages):
            before = len(found)
            for name in parameters(type(stage)):
                add(f"logits.{i}.{stage.name}.{name}", getattr(stage, name))
            if len(found) == before:
                add(f"logits.{i}.{stage.name}", "on")
        add("strategy", self.strategy_name)
        for name, value in _values(self.strategy).items():
            add(f"strategy.{self.strategy_name}.{name}", value)
        add("generation.max_tokens", self.max_tokens)
        add("generation.stop", list(self.stop))
        for role, options in self.models.items():
            for name, value in options.items():
                add(f"models.{role}.{name}", value)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the profile in the shape of its file, every parameter written out."""
        result: dict[str, Any] = {"description": self.description}
        if self.references:
            result["references"] = list(self.references)
        result["logits"] = [{stage.name: _values(stage)} for stage in self.stages]
        result["strategy"] = {self.strategy_name: _values(self.strategy)}
        result["generation"] = {"max_tokens": self.max_tokens, "stop": list(self.stop)}
        if self.models:
            result["models"] = {role: dict(options) for role, options in self.models.items()}
        return result

    def to_yaml(self) -> str:
        """Return a file that loads to an equal profile."""
        import yaml

        text: str = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=100)
        return text

    @property
    def fingerprint(self) -> str:
        """Short hash of all that can change a text: equal for equal settings."""
        content = {k: v for k, v in self.as_dict().items() if k in ("logits", "generation")}
        # What a file says counts, not where it lies.
        content["strategy"] = {self.strategy_name: _values(self.strategy, digests=True)}
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- changing ----------------------------------------------------------------------------

    def override(self, values: Mapping[str, Any], *, origin: str = "override") -> Profile:
        """Return the profile with some parameters changed.

        Parameters
        ----------
        values : mapping
            Keys: ``temperature.t`` (a stage's parameter; a stage that the chain lacks is added in
            llama.cpp's order), ``logits.2.p`` (the third stage's), ``top_k: False`` (take a stage
            out) or ``True`` (put it in), ``beam.beams`` or ``strategy.beams``, ``strategy`` (its
            name), ``generation.max_tokens``, ``generation.stop``.
        origin : str
            Recorded for :meth:`settings`, and named in errors.

        Raises
        ------
        UsageError
            Unknown key, with the nearest known one; wrong type or range.
        """
        from .profile_override import override

        profile = self
        for key, value in values.items():
            try:
                profile = override(profile, key, value, origin)
            except (Mismatch, UsageError) as exc:
                raise UsageError(f"{origin} {key}: {exc}") from None
        return profile

    def bind(self, tokenizer: Tokenizer) -> Profile:
        """Return the profile with stages and strategy resolved for a tokenizer."""
        from .profile_build import with_chain

        stages = tuple(stage.bind(tokenizer) for stage in self.stages)
        strategy = self.strategy
        if hasattr(strategy, "bind"):
            strategy = strategy.bind(tokenizer)
        return replace(self, stages=stages, strategy=with_chain(strategy, stages))


def _values(thing: Any, *, digests: bool = False) -> dict[str, Any]:
    """Return the parameters as plain values; with ``digests`` a hash for every file named."""
    values = {name: _plain(getattr(thing, name)) for name in parameters(type(thing))}
    for name in nested_strategies(type(thing)):
        values[name] = _nested(getattr(thing, name), digests)
    for name in path_parameters(type(thing)) if digests else ():
        if values[name]:
            values[name] = hashlib.sha256(Path(values[name]).read_bytes()).hexdigest()
    return values


def _nested(strategy: Any, digests: bool) -> dict[str, Any]:
    from .decode import strategy_name

    return {strategy_name(strategy): _values(strategy, digests=digests)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list | frozenset | set):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def parse_value(text: str) -> Any:
    """Return the value of ``-o key=value``: a number, true/false, a list, or text."""
    return strict_yaml.parse_scalar(text, source="-o")


@dataclass(frozen=True, kw_only=True)
class ProfileEntry:
    """A profile that can be named.

    Attributes
    ----------
    name, description : str
    path : Path
    origin : {"user", "built-in"}
    shadows : bool
        A user's profile that hides a built-in one of the same name.
    error : str or None
        Why it does not load.
    """

    name: str
    description: str
    path: Path
    origin: str
    shadows: bool = False
    error: str | None = None


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a profile by name or path.

    Raises
    ------
    MissingFile, ProfileError
        One line with file, line, key and remedy.
    """
    from .profile_build import from_document

    path = find_profile(name_or_path)
    return from_document(strict_yaml.read(path), name=path.stem)


def list_profiles() -> list[ProfileEntry]:
    """Return every profile that can be named, sorted; a user's one hides a built-in one."""
    found: dict[str, ProfileEntry] = {}
    for origin, folder in reversed(folders()):
        for name, path in profile_files(folder).items():
            description, error = "", None
            try:
                description = load_profile(path).description
            except SteersmanError as exc:
                error = str(exc)
            found[name] = ProfileEntry(
                name=name,
                description=description,
                path=path,
                origin=origin,
                shadows=name in found,
                error=error,
            )
    return [found[name] for name in sorted(found)]


__all__ = [
    "Profile",
    "ProfileEntry",
    "Setting",
    "builtin_folder",
    "find_profile",
    "list_profiles",
    "load_profile",
    "new_profile",
    "parse_value",
    "profile_names",
    "user_folder",
]
