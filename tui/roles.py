"""Which models a run opens, for every role its strategy has: flags, profile, and opening them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steersman.core.errors import UsageError, did_you_mean

from . import common, output
from .envelope import Envelope

if TYPE_CHECKING:
    from steersman.core.model import Model
    from steersman.core.profile import Profile, Setting
    from steersman.core.roles import Roles

_MORE = re.compile(r",(?=[a-z_-]+=)")  # a comma inside a list of layers is none of these
_EXAMPLE = "--model-for draft=smollm2,layers=0-19"


def parse_roles(draft: str | None, others: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return the arguments of ``load`` that ``--draft-model`` and ``--model-for`` give, by role.

    Raises
    ------
    UsageError
        One line that names the flag and what is wrong with it.
    """
    found: dict[str, dict[str, Any]] = {}
    if draft is not None:
        found["draft"] = _options(f"--draft-model {draft}", draft)
    for text in others:
        role, equals, rest = text.partition("=")
        if not equals or not role.strip().isidentifier():
            raise UsageError(f"--model-for {text!r}: write ROLE=NAME[,key=value], as in {_EXAMPLE}")
        if role.strip() in found:
            raise UsageError(f"--model-for {text}: role {role.strip()!r} has a model already")
        found[role.strip()] = _options(f"--model-for {text}", rest)
    return found


def _options(said: str, text: str) -> dict[str, Any]:
    """Read ``NAME[,key=value]...``; without a name, the target's own weights are meant."""
    from steersman.core.layers import read_layers
    from steersman.core.parameters import Mismatch, convert
    from steersman.core.profile_build import MODEL

    pieces = _MORE.split(text)
    unnamed = "=" in pieces[0] and pieces[0].partition("=")[0] in MODEL
    name = "" if unnamed else pieces.pop(0).strip()
    options: dict[str, Any] = {"model": name} if name else {}
    for item in pieces:
        key, _, value = item.partition("=")
        key = "context" if key == "ctx-size" else key
        if key not in MODEL:
            raise UsageError(f"{said}: {key}: unknown key{did_you_mean(key, MODEL)}")
        try:
            number = MODEL[key] is int and value.isdecimal()
            options[key] = convert(int(value) if number else value, MODEL[key])
            if key == "layers":
                read_layers(options[key])
        except (Mismatch, UsageError) as exc:
            problem = str(exc).removeprefix(f"{key} ")
            raise UsageError(f"{said}: {key}: {problem}") from None
    return options


def open_model(said: str, text: str) -> Model:
    """Open a model that is named as ``NAME[,key=value]...``, for a job beside the roles."""
    from steersman.core import load

    return load(**{"model": common.DEFAULT_MODEL, **_options(said, text)})


def wanted(
    args: common.ModelArgs, profile: Profile, *, all_known: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the arguments of ``load`` for every role: flags over profile over the target's.

    Parameters
    ----------
    args : ModelArgs
    profile : Profile
    all_known : bool
        Let flags name roles of other strategies: where profiles may change on the way.

    Raises
    ------
    UsageError
        A flag names a role that the strategy does not have.
    CapabilityError
        Nothing says what plays a role.
    """
    from steersman.core.roles import check_roles, role_options

    # A value from the environment or a file is a standing preference, not a slip.
    said = [role for role in args.roles if args.role_origins.get(role) == "flag"]
    check_roles(
        [role for role in said if role != "target"],
        profile,
        said="--model-for",
        all_known=all_known,
    )
    return role_options(profile, args.resolve(profile), args.roles)


def open_roles(
    args: common.ModelArgs,
    profile: Profile,
    *,
    envelope: Envelope | None = None,
    all_known: bool = False,
) -> Roles:
    """Open the models of all roles; to be closed by the caller.

    What it came to is recorded under ``resolved.model`` and ``resolved.roles`` of ``envelope``.
    """
    from steersman.core.roles import Roles

    roles = Roles()
    roles.prepare(profile, wanted(args, profile, all_known=all_known), opening=note_opening)
    if envelope is not None:
        facts = {role: common.model_facts(model) for role, model in roles.models.items()}
        envelope.resolved["model"] = facts.pop("target")
        if facts:
            envelope.resolved["roles"] = facts
    return roles


def note_opening(role: str, what: str) -> None:
    """Say on stderr which second model is being opened, where someone is waiting for it."""
    import sys

    if role != "target" and output.is_terminal(sys.stderr):
        output.note(f"opening {role}: {what}")


def settings(args: common.ModelArgs, profile: Profile) -> list[Setting]:
    """Return what is said of each role beside the target, with its origin."""
    from steersman.core.profile import Setting
    from steersman.core.roles import overlaid, roles_of

    found = []
    for role in roles_of(profile.strategy)[1:]:
        given: Mapping[str, Any] = args.roles.get(role, {})
        for key, value in overlaid(profile.models.get(role, {}), given).items():
            name = f"models.{role}.{key}"
            where = args.role_origins.get(role, "flag") if key in given else profile.origins[name]
            found.append(Setting(key=name, value=value, origin=where))
    return found


def described(roles: Mapping[str, Any]) -> dict[str, str]:
    """Return what plays each role beside the target, in words."""
    return {
        role: f"{model.info.name} on {model.info.backend}"
        for role, model in roles.items()
        if role != "target"
    }
