"""Options that commands share, and what they come to.

Three decorators add the options and hand the command one value each::

    @click.command("generate")
    @common.model_options      # model_args: ModelArgs
    @common.sampling_options   # sampling: SamplingArgs
    @common.output_options     # --json, --output, --quiet, --debug; read by Envelope and output
    def command(model_args, sampling): ...

Every flag has an environment twin, ``STEERSMAN_`` and its long name; see
:mod:`steersman.tui.settings` for files and the order of precedence.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from steersman.core.errors import UsageError
from steersman.core.read_file import decoded, read_bytes, read_limited

from . import completing, output
from .envelope import PARTIAL as PARTIAL
from .envelope import Envelope as Envelope
from .envelope import Problem as Problem
from .envelope import problem as problem
from .envelope import to_json as to_json

if TYPE_CHECKING:
    from steersman.core.model import Model
    from steersman.core.profile import Profile, Setting

DEFAULT_MODEL = "smollm2"
DEFAULT_PROFILE = "balanced"
MAX_PROMPT_BYTES = 64 << 20

F = TypeVar("F", bound=Callable[..., Any])


class Lines(click.types.StringParamType):
    """Text; several in an environment variable are separated by newlines."""

    envvar_list_splitter = "\n"


class Finite(click.ParamType):  # type: ignore[type-arg]
    """A number in a range; nan and infinities are refused."""

    name = "number"

    def __init__(self, low: float, high: float, *, whole: bool = False) -> None:
        self.low, self.high, self.whole = low, high, whole
        self.name = "integer" if whole else "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | int:
        """Return the number, or fail naming the range."""
        try:
            number = int(value) if self.whole else float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not {'a whole' if self.whole else 'a'} number", param, ctx)
        if not self.low <= number <= self.high:  # nan fails too
            self.fail(f"{value} is not in {self.low:g}..{self.high:g}", param, ctx)
        return number


def option(*names: str, env: str | None = None, **settings: Any) -> Callable[[F], F]:
    """Like ``click.option``, with the environment twin of the long name."""
    long = max((n.split("/")[0] for n in names if n.startswith("--")), key=len, default="--x")
    twin = env or "STEERSMAN_" + long[2:].upper().replace("-", "_")
    settings.setdefault("envvar", twin)
    settings.setdefault("show_envvar", False)
    return click.option(*names, **settings)


def collect(names: Sequence[str], into: str, build: Callable[..., Any]) -> Callable[[F], F]:
    """Replace the keyword arguments ``names`` of a command by one, ``into``."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            taken = {name: kwargs.pop(name) for name in names}
            return function(*args, **{into: build(**taken)}, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def stack(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return one decorator that does what ``decorators`` do, written in this order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def origin(name: str) -> str:
    """Return where the current command's option ``name`` got its value, for a person to read."""
    ctx = click.get_current_context()
    source = ctx.get_parameter_source(name)
    if source is ParameterSource.COMMANDLINE:
        return "flag"
    if source is ParameterSource.ENVIRONMENT:
        return "environment"
    if source is ParameterSource.DEFAULT_MAP:
        defaults = ctx.find_root().meta.get("steersman.defaults")
        command = ctx.command_path.split(" ")[1:2]
        return defaults.origin(*command, name) if defaults and command else "a settings file"
    return "built-in"


# -- model ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Which model to open, and how; None means "not said"."""

    model: str | None = None
    backend: str | None = None
    ctx_size: int | None = None
    threads: int | None = None
    dtype: str | None = None
    device: str | None = None
    setting: str | None = None
    layers: str | None = None
    adapter: str | None = None
    offline: bool = False
    roles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    role_origins: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, profile: Profile | None = None) -> dict[str, Any]:
        """Return the arguments of ``steersman.core.load``: flags over profile over built-in.

        They are the target's; :mod:`steersman.tui.roles` has those of all roles.
        """
        wanted = dict(profile.models.get("target", {})) if profile is not None else {}
        said = dict(self.roles.get("target", {})) | self._said()
        if "model" in said:  # layers and adapter are those of the model named beside them
            wanted.pop("layers", None)
            wanted.pop("adapter", None)
        wanted.update(said)
        wanted.setdefault("model", DEFAULT_MODEL)
        return {**wanted, "offline": self.offline}

    def _said(self) -> dict[str, Any]:
        said = {
            "model": self.model,
            "backend": self.backend,
            "context": self.ctx_size,
            "threads": self.threads,
            "dtype": self.dtype,
            "device": self.device,
            "setting": self.setting,
            "layers": self.layers,
            "adapter": self.adapter,
        }
        return {name: value for name, value in said.items() if value is not None}


def _with_roles(draft_model: str | None, model_for: tuple[str, ...], **values: Any) -> ModelArgs:
    from .roles import parse_roles

    roles = parse_roles(draft_model, model_for) if draft_model or model_for else {}
    named = {"draft": "draft_model"} if draft_model else {}
    origins = {role: origin(named.get(role, "model_for")) for role in roles}
    return ModelArgs(**values, roles=roles, role_origins=origins)


_MODEL_NAMES = (
    "model", "backend", "ctx_size", "threads", "dtype", "device", "setting", "layers",
    "adapter", "offline",
)  # fmt: skip
_model_flags = (
    option(
        "-m", "--model", metavar="NAME|PATH|HUB-ID", shell_complete=completing.models,
        help="Model to open [smollm2].",
    ),
    option(
        "--backend",
        metavar="llamacpp|torch|mlx|auto",
        shell_complete=completing.engines,
        help="Engine to run it on [auto: the first installed one that suits the file].",
    ),
    option(
        "-c", "--ctx-size", type=Finite(8, 1 << 24, whole=True),
        help="Context in tokens [what the model was trained for, as far as memory allows].",
    ),
    option("-t", "--threads", type=Finite(1, 4096, whole=True), help="CPU threads."),
    option("--dtype", metavar="NAME", help="Number format of the weights [auto]."),
    option("--device", metavar="NAME", help="cpu, cuda, mps ... [auto]."),
    option(
        "--setting",
        type=click.Choice(["reproducible", "fast"]),
        help="reproducible: the same logits however a prompt is cut, as far as the engine can "
        "[reproducible].",
    ),
    option("--layers", metavar="N|LIST", help="Keep only these layers: 20, or 0-9,20-29 [all]."),
    option(
        "--adapter", metavar="FOLDER|NAME", shell_complete=completing.adapters,
        help="LoRA adapter to merge into the weights.",
    ),
    option("--offline", is_flag=True, help="Never ask the hub."),
)  # fmt: skip
model_options = stack(collect(_MODEL_NAMES, "model_args", ModelArgs), *_model_flags)
# For commands that run a strategy, which may have roles beside the target.
models_options = stack(
    collect([*_MODEL_NAMES, "draft_model", "model_for"], "model_args", _with_roles),
    *_model_flags,
    option(
        "-md", "--draft-model", metavar="NAME[,KEY=VALUE]",
        help="Model that drafts, for strategies with such a role; short for --model-for draft=...",
    ),
    option(
        "--model-for", multiple=True, type=Lines(), metavar="ROLE=NAME[,KEY=VALUE]",
        help="Model for a role of the strategy: draft=smollm2,layers=0-9,20-29. Without NAME, the "
        "target's own; keys as under models: in a profile.",
    ),
)  # fmt: skip


def load_model(
    args: ModelArgs, *, profile: Profile | None = None, envelope: Envelope | None = None
) -> Model:
    """Open the model that ``args`` (and a profile's ``models.target``) name.

    What it came to is recorded under ``resolved.model`` of ``envelope``.
    """
    from steersman.core import load

    options = args.resolve(profile)
    model = load(**options)
    if envelope is not None:
        envelope.resolved["model"] = model_facts(model)
    return model


def model_facts(model: Model) -> dict[str, Any]:
    """Return what a report should say about a loaded model."""
    info = model.info
    return {
        "name": info.name,
        "backend": info.backend,
        "path": info.path,
        "architecture": info.architecture,
        "dtype": info.dtype,
        "device": info.device,
        "context": info.context,
        "threads": info.threads,
        "vocab_size": info.vocab_size,
        "batch_invariant": info.batch_invariant,
        "fingerprint": info.fingerprint,
        "capabilities": model.capabilities.names(),
    }


# -- sampling -------------------------------------------------------------------------------

# Flags that stand for one parameter of one stage of the chain.
STAGE_FLAGS: Mapping[str, str] = {
    "temp": "temperature.t",
    "top_k": "top_k.k",
    "top_p": "top_p.p",
    "min_p": "min_p.p",
}


@dataclass(frozen=True, kw_only=True)
class SamplingArgs:
    """Profile and changes to it, as the person gave them."""

    profile: str = DEFAULT_PROFILE
    option: tuple[str, ...] = ()
    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    truncate: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)

    def overrides(self) -> list[tuple[str, Any, str]]:
        """Return (key, value, origin) for every change to the profile, in the order applied."""
        changes: list[tuple[str, Any, str]] = [
            (key, getattr(self, name), self._origin(name))
            for name, key in STAGE_FLAGS.items()
            if getattr(self, name) is not None
        ]
        if self.max_tokens is not None:
            changes.append(("generation.max_tokens", self.max_tokens, self._origin("max_tokens")))
        from steersman.core.profile import parse_value

        for item in self.option:
            key, equals, value = item.partition("=")
            if not equals or not key.strip():
                raise UsageError(f"-o {item!r}: write key=value, such as -o temperature.t=0.5")
            changes.append((key.strip(), parse_value(value), self._origin("option")))
        return changes

    def _origin(self, name: str) -> str:
        return self.origins.get(name, "flag")

    def load_profile(self, name: str | None = None) -> Profile:
        """Return the profile with every change applied.

        Raises
        ------
        ProfileError, MissingFile, UsageError
            One line that names the file or flag.
        """
        from steersman.core.profile import load_profile

        profile = load_profile(name or self.profile)
        for key, value, where in self.overrides():
            profile = profile.override({key: value}, origin=where)
        return profile

    def stream_options(self) -> dict[str, Any]:
        """Return the arguments of ``steersman.core.stream`` that are not in the profile."""
        return {"seed": self.seed, "stop": self.stop, "truncate": self.truncate}


def _sampling(**values: Any) -> SamplingArgs:
    values["profile"] = values["profile"] or DEFAULT_PROFILE
    return SamplingArgs(**values, origins={name: origin(name) for name in values})


sampling_options = stack(
    collect(
        ["profile", "option", "temp", "top_k", "top_p", "min_p", "seed", "max_tokens", "stop",
         "truncate"],
        "sampling",
        _sampling,
    ),
    option(
        "--profile", metavar="NAME|FILE", shell_complete=completing.profiles,
        help="How to decode [balanced].",
    ),
    option(
        "-o", "--option", multiple=True, type=Lines(), metavar="KEY=VALUE",
        help="Change a parameter of the profile: -o temperature.t=0.5, -o beam.width=8.",
    ),
    option("-n", "--max-tokens", type=Finite(0, 1 << 24, whole=True),
           help="Most tokens to generate [the profile's limit]."),
    option("--temp", type=Finite(0, 1e6), help="Temperature; 1 is neutral, 0 is greedy."),
    option("--top-k", type=Finite(0, 1 << 31, whole=True), help="Top-k; 0 is off."),
    option("--top-p", type=Finite(0, 1), help="Top-p (nucleus); 1 is off."),
    option("--min-p", type=Finite(0, 1), help="Min-p; 0 is off."),
    option("--seed", type=Finite(0, 2**64 - 1, whole=True), help="Seed; drawn and shown if unset."),
    option("--stop", multiple=True, type=Lines(), metavar="TEXT",
           help="End before this text; may be repeated (in the environment: one per line)."),
    option("--truncate", is_flag=True,
           help="Cut a prompt that is too long from the front instead of refusing it."),
)  # fmt: skip


def settings(profile: Profile, model_args: ModelArgs, sampling: SamplingArgs) -> list[Setting]:
    """Return every effective setting of a run, in order, with its origin."""
    from steersman.core.profile import Setting

    from . import roles

    names = {"context": "ctx_size"}
    found = []
    for key, value in {"model": "", "backend": "auto", **model_args.resolve(profile)}.items():
        said = getattr(model_args, names.get(key, key), None)
        if f"models.target.{key}" in profile.origins and said is None:
            where = profile.origins[f"models.target.{key}"]
        else:
            where = origin(names.get(key, key)) if said else "built-in"
        found.append(Setting(key=key, value=value, origin=where))
    where = origin("profile") if sampling.profile != DEFAULT_PROFILE else "built-in"
    found.append(Setting(key="profile", value=sampling.profile, origin=where))
    found += roles.settings(model_args, profile)
    found += [s for s in profile.settings() if not s.key.startswith("models.")]
    seed = "drawn anew" if sampling.seed is None else sampling.seed
    found.append(Setting(key="seed", value=seed, origin=origin("seed")))
    return found


def settings_table(profile: Profile, model_args: ModelArgs, sampling: SamplingArgs) -> str:
    """Return :func:`settings` for reading; stages stand in the order they are applied."""
    rows = [
        [s.key, "none" if s.value is None else s.value, s.origin]
        for s in settings(profile, model_args, sampling)
    ]
    return output.table(rows, header=["setting", "value", "from"])


# -- output ---------------------------------------------------------------------------------


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    output.state.json = output.state.json or value


def _set_output(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    output.state.json = output.state.json or value == "json"


def _set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    output.state.quiet = output.state.quiet or value


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    output.state.debug = output.state.debug or value


debug_option = option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_set_debug,
    help="Show a traceback when something unexpected fails.",
)  # fmt: skip

output_options = stack(
    option("--json", is_flag=True, expose_value=False, is_eager=True, callback=_set_json,
           help="One JSON object on stdout; the same as --output json."),
    option("--output", type=click.Choice(["text", "json"]), expose_value=False, is_eager=True,
           callback=_set_output, help="Form of the result [text]."),
    option("-q", "--quiet", is_flag=True, expose_value=False, is_eager=True, callback=_set_quiet,
           help="No progress and notes on stderr."),
    debug_option,
)  # fmt: skip


# -- input ----------------------------------------------------------------------------------


def read_text(path: str | Path, *, drop_final_newline: bool = False) -> str:
    """Read a UTF-8 file; ``-`` is stdin.

    Parameters
    ----------
    drop_final_newline : bool
        Remove one newline at the end: for prompts, which text editors end with one.

    Raises
    ------
    MissingFile, InvalidInput
        Not there; not readable; not UTF-8 (with the place); larger than 64 MiB.
    """
    name = "stdin" if str(path) == "-" else str(path)
    if name == "stdin":
        raw = read_limited(sys.stdin.buffer, name, MAX_PROMPT_BYTES)
    else:
        raw = read_bytes(path, MAX_PROMPT_BYTES)
    text = decoded(raw, name)
    if drop_final_newline and text.endswith("\n"):
        text = text[:-2] if text.endswith("\r\n") else text[:-1]
    return text
