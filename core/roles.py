"""Models by role: which a profile needs, how each is opened, and what they can share.

A strategy names the roles it asks ("target" speaks; "draft", "small", "second" ... help). A profile
says under ``models`` what plays them, flags or arguments may say otherwise, and what neither says
is as for the target::

    models:
      target: {model: smollm2, backend: llamacpp}
      draft: {layers: "0-9,20-29"}     # the target's own weights, without ten layers

:class:`Roles` opens them, keeps the caches of one conversation on them, and changes both when
another profile is chosen: what stays is reused, what no role needs any more is freed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from .decode.sessions import Sessions, missing_role
from .errors import Cancelled, SteersmanError, UsageError, did_you_mean
from .layers import layers_text, read_layers
from .model import Model

if TYPE_CHECKING:
    from .profile import Profile

TARGET = "target"
Options = Mapping[str, Any]  # arguments of ``steersman.core.load``

# What a role takes over from the target however its own model is called, and what only where it
# runs on the same engine, or is of the same weights: another model has another size and context.
_ALWAYS = ("backend", "threads", "setting", "offline")
_SAME_ENGINE = ("device", "dtype")
_SAME_MODEL = ("model", "context", "layers", "adapter")


def roles_of(strategy: Any) -> tuple[str, ...]:
    """Return the roles of a strategy, the target first."""
    return (TARGET, *(role for role in strategy.requires if role != TARGET))


def known_roles() -> frozenset[str]:
    """Return the roles of all built-in strategies, as they are when nothing is set."""
    from .decode import STRATEGIES

    found = {TARGET}
    for cls in STRATEGIES.values():
        with suppress(TypeError, SteersmanError):  # one that needs a parameter
            found.update(cls().requires)
    return frozenset(found)


def check_roles(given: Iterable[str], profile: Profile, *, said: str, all_known: bool) -> None:
    """Refuse roles that nobody plays.

    Parameters
    ----------
    given : iterable of str
    profile : Profile
    said : str
        What named them, for the message: a flag.
    all_known : bool
        Accept roles of other strategies too: for conversations, where profiles change.

    Raises
    ------
    UsageError
        With the roles that the profile's strategy has.
    """
    roles = roles_of(profile.strategy)
    for role in given:
        if role in roles or (all_known and role in known_roles()):
            continue
        hint = did_you_mean(role, roles) if len(roles) > 1 else ""
        raise UsageError(
            f"{said} {role}: strategy {profile.strategy_name} has "
            f"{'the roles ' + ', '.join(roles) if len(roles) > 1 else 'no role but target'}"
            f"{hint if hint.startswith(', did') else ''}"
        )


def role_options(
    profile: Profile, target: Options, given: Mapping[str, Options] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the arguments of ``load`` for every role of a profile's strategy, the target first.

    Parameters
    ----------
    profile : Profile
    target : mapping
        Those of the target, complete.
    given : mapping of role to mapping, optional
        What is said beside the profile, and is stronger. Where it names another model, what the
        profile says of the other one's layers and context does not count.

    Raises
    ------
    CapabilityError
        Nothing says what plays a role.
    """
    given = given or {}
    found = {TARGET: dict(target)}
    for role in roles_of(profile.strategy)[1:]:
        if role not in profile.models and role not in given:
            raise missing_role(f"strategy {profile.strategy_name}", role)
        own = overlaid(profile.models.get(role, {}), given.get(role, {}))
        taken = [*_ALWAYS]
        if own.get("backend", target.get("backend")) == target.get("backend"):
            taken += _SAME_ENGINE
        if "model" not in own or own["model"] == target.get("model"):
            taken += _SAME_MODEL
        base = {name: target[name] for name in taken if name in target}
        found[role] = base | own
    return found


def overlaid(options: Options, stronger: Options) -> dict[str, Any]:
    """Return ``options`` with what ``stronger`` says; layers and adapters go with their model."""
    kept = dict(options)
    if stronger.get("model", kept.get("model")) != kept.get("model"):
        for name in ("layers", "context", "adapter"):
            kept.pop(name, None)
    return kept | dict(stronger)


class Roles:
    """Open models by role, and the caches of one conversation on them.

    Parameters
    ----------
    opener : callable, optional
        ``steersman.core.load``, or a stand-in with the same parameters.
    target : Model, optional
        An open model that plays the target whatever options say; it is not closed here.

    Attributes
    ----------
    models : dict of role to Model
        What is open now; roles may share one.
    """

    def __init__(
        self, *, opener: Callable[..., Model] | None = None, target: Model | None = None
    ) -> None:
        self._opener = opener
        self._given = target
        self._open: dict[str, Model] = {}  # by what they were opened as
        self._sessions: Sessions | None = None
        self.models: dict[str, Model] = {}

    @property
    def target(self) -> Model:
        """The model that speaks.

        Raises
        ------
        UsageError
            Nothing is open yet.
        """
        return self.sessions.target

    @property
    def sessions(self) -> Sessions:
        """The caches, for ``stream(..., session=...)``; a role keeps its own while its model stays.

        Raises
        ------
        UsageError
            Nothing is open yet.
        """
        if self._sessions is None:
            raise UsageError("roles: no model is open; call prepare first")
        return self._sessions

    def ready(self, wanted: Mapping[str, Options]) -> bool:
        """Whether :meth:`prepare` would find all of these open."""
        return all(key in self._open for key in self._keys(wanted).values())

    def prepare(
        self,
        profile: Profile,
        wanted: Mapping[str, Options],
        *,
        opening: Callable[[str, str], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        keep: bool = False,
    ) -> Mapping[str, Model]:
        """Open what ``wanted`` asks for, and free what it does not; all of it or nothing.

        Until everything is open and the strategy is known to run on it, what was open stays, so
        that a failure or a cancel leaves the caller with what worked.

        Parameters
        ----------
        profile : Profile
        wanted : mapping of role to arguments of ``load``
            As :func:`role_options` returns them.
        opening : callable, optional
            Called with a role and what is opened for it, before each opening.
        cancelled : callable
            Polled before each opening, and after the last.
        keep : bool
            Free nothing: for batches, whose lines may change profiles to and fro.

        Raises
        ------
        CapabilityError
            A model lacks what the strategy requires of its role.
        Cancelled
        SteersmanError
            What ``load`` raises.
        """
        keys = self._keys(wanted)
        held = {key: self._open[key] for key in keys.values() if key in self._open}
        fresh: dict[str, Model] = {}
        try:
            # Whole models first: others may share their weights.
            for role in sorted(keys, key=lambda role: wanted[role].get("layers") is not None):
                if keys[role] in held or keys[role] in fresh:
                    continue
                if cancelled():
                    raise Cancelled("cancelled; the models stay as they were")
                if opening is not None:
                    opening(role, described(wanted[role]))
                fresh[keys[role]] = self._load(wanted[role], held | fresh)
            if cancelled():
                raise Cancelled("cancelled; the models stay as they were")
            models = {role: (held | fresh)[key] for role, key in keys.items()}
            for role, needs in profile.strategy.requires.items():
                models[role].require(needs, who=f"strategy {profile.strategy_name}", role=role)
        except BaseException:
            for model in fresh.values():
                self._close(model)
            raise
        if keep:
            held, models = self._open, self.models | models
        left = [model for key, model in self._open.items() if key not in held]
        self._open = held | fresh
        self.models = models
        if self._sessions is None:
            self._sessions = Sessions(models)
        else:
            self._sessions.use(models)
        for model in left:
            self._close(model)
        return models

    def _keys(self, wanted: Mapping[str, Options]) -> dict[str, str]:
        return {role: opened_as(options) for role, options in wanted.items()}

    def _load(self, options: Options, others: Mapping[str, Model]) -> Model:
        from . import load  # here, since it may be replaced

        if self._given is not None and opened_as(self._given.options) == opened_as(options):
            return self._given
        layers = options.get("layers")
        if layers is not None:
            whole = others.get(opened_as({k: v for k, v in options.items() if k != "layers"}))
            shared = whole.with_layers(layers) if whole is not None else None
            if shared is not None:
                return shared
        if "model" not in options:
            raise UsageError("models: name the model; the target was not opened by load")
        return (self._opener or load)(**options)

    def _close(self, model: Model) -> None:
        if model is not self._given:
            model.close()

    def close(self) -> None:
        """Free every cache and every model that was opened here."""
        if self._sessions is not None:
            self._sessions.close()
        for model in self._open.values():
            self._close(model)
        self._open, self.models, self._sessions = {}, {}, None

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def __getitem__(self, role: str) -> Model:
        return self.models[role]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load_roles(
    profile: str | Profile,
    target: Model | None = None,
    *,
    roles: Mapping[str, Options] | None = None,
    opener: Callable[..., Model] | None = None,
    **options: Any,
) -> Roles:
    """Open every model that a profile's strategy asks.

    >>> with load_roles("greedy", model="smollm2") as opened:
    ...     print(generate(opened.target, "Once", profile="greedy", session=opened.sessions).text)

    Parameters
    ----------
    profile : str or Profile
    target : Model, optional
        An open model (of :func:`steersman.core.load`) to speak; it stays the caller's. Otherwise
        one is opened as the profile and ``options`` say.
    roles : mapping of role to mapping, optional
        Arguments of ``load`` for other roles, stronger than the profile's.
    opener : callable, optional
        Instead of ``steersman.core.load``.
    **options
        Arguments of ``load`` for the target, stronger than the profile's.

    Returns
    -------
    Roles
        To be closed by the caller.

    Raises
    ------
    CapabilityError
        A role has no model, or its model lacks something.
    UsageError
        ``roles`` names a role that the strategy does not have.
    SteersmanError
        What ``load`` raises.
    """
    from .profile import Profile, load_profile

    if not isinstance(profile, Profile):
        profile = load_profile(profile)
    check_roles(roles or (), profile, said="roles:", all_known=False)
    wanted = dict(options)
    if target is not None:
        if options:
            raise UsageError(f"load_roles: {next(iter(options))}: not with an open target")
        wanted = dict(target.options)
    else:
        wanted = {"model": "smollm2", **overlaid(profile.models.get(TARGET, {}), options)}
    opened = Roles(opener=opener, target=target)
    opened.prepare(profile, role_options(profile, wanted, roles))
    return opened


def described(options: Options) -> str:
    """Return a few words for what arguments of ``load`` open."""
    name = str(options.get("model", "")).rsplit("/", 1)[-1] or "the target's model"
    layers = options.get("layers")
    text = name if layers is None else f"{name} layers {_layers(layers)}"
    backend = options.get("backend", "auto")
    return text if backend == "auto" else f"{text} on {backend}"


def _layers(choice: Any) -> str:
    read = read_layers(choice)
    return layers_text(range(read)) if isinstance(read, int) else layers_text(read)


def opened_as(options: Options) -> str:
    """Return a text that is equal where ``load`` would open the same: files, engine, options."""
    from .backend import engine_for
    from .locate import locate

    said = {k: v for k, v in options.items() if v is not None and (k, v) not in _UNSAID}
    offline = bool(said.pop("offline", False))
    with suppress(SteersmanError):  # what cannot be found is told when it is opened
        source = locate(str(said.get("model", "")), offline=offline)
        said["model"] = str(source.path)
        said["backend"] = said.get("backend") or engine_for(source.kind)
    if "layers" in said:
        said["layers"] = _layers(said["layers"])
    return json.dumps(said, sort_keys=True, default=str)


_UNSAID = {("backend", "auto"), ("dtype", "auto"), ("device", "auto"), ("setting", "reproducible")}
