"""``steersman check``: run the contract suite on a model and engine, and compare two engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import UsageError

from .. import common, completing, output
from ..envelope import RUNTIME, Envelope, Problem
from ..roles import open_roles

if TYPE_CHECKING:
    from steersman.core.contract import Check
    from steersman.core.model import Model
    from steersman.core.roles import Roles

MAX_PARITY_TOKENS = 512


@click.command("check")
@common.option(
    "--against",
    metavar="BACKEND",
    envvar=None,
    help="Also compare logits and hidden states with the same model on this engine.",
)
@common.option("--only", metavar="NAME", multiple=True, envvar=None, help="Run this check alone.")
@common.option("--text", metavar="FILE", envvar=None, help="Text to feed instead of the own one.")
@common.option(
    "--profile",
    metavar="NAME|FILE",
    shell_complete=completing.profiles,
    envvar=None,
    help="Check the models of all roles that this profile's strategy has.",
)
@common.option("--list", "names", is_flag=True, envvar=None, help="Name the checks and end.")
@common.models_options
@common.output_options
def command(
    against: str | None,
    only: tuple[str, ...],
    text: str | None,
    profile: str | None,
    names: bool,
    model_args: common.ModelArgs,
) -> None:
    """Check that a model on an engine does what every strategy relies on.

    Asks the same thing in two ways (in one call or in pieces, alone or in a batch, as a draft tree
    or as chains) and measures how far the answers differ. Exit code 0 when all checks pass, 6 when
    one fails. A check is skipped where the model does not offer what it tests.
    """
    from steersman.core import contract

    with Envelope("check") as envelope:
        envelope.inputs = {"against": against, "only": list(only), "text": text}
        if names:
            envelope.result = {name: spec.title for name, spec in contract.CHECKS.items()}
            if not envelope.json:
                print(output.table(list(envelope.result.items()), header=["name", "title"]))
            return
        words = contract.TEXT if text is None else common.read_text(text)
        checks: list[Check] = []
        about = []
        with _opened(model_args, profile, envelope) as roles:
            for names_of, model in _distinct(roles.models):
                own = _contract(model, words, only)
                if model is roles.target and against is not None:
                    other = replace(model_args, backend=against, dtype=None, device=None, roles={})
                    with common.load_model(other) as reference:
                        envelope.resolved["against"] = common.model_facts(reference)
                        own += _parity(model, reference, words)
                if len(roles.models) > 1:
                    own = [replace(c, title=f"{names_of}: {c.title}") for c in own]
                checks += own
                about.append(_described(model))
        _report(envelope, checks, "; ".join(about))


def _opened(args: common.ModelArgs, name: str | None, envelope: Envelope) -> Roles:
    """Open the target, or all roles of a profile, whose strategy must be able to run on them."""
    from steersman.core.decode import strategy_class
    from steersman.core.profile import Profile, load_profile

    if name is None and args.roles:
        raise UsageError("--model-for: give --profile as well; its strategy names the roles")
    if name is not None:
        return open_roles(args, load_profile(name), envelope=envelope)
    plain = Profile(name="check", strategy=strategy_class("sample")())  # the target alone
    return open_roles(args, plain, envelope=envelope)


def _distinct(models: Mapping[str, Model]) -> list[tuple[str, Model]]:
    """Return each model once, with the roles that it plays."""
    found: dict[int, tuple[list[str], Model]] = {}
    for role, model in models.items():
        found.setdefault(id(model), ([], model))[0].append(role)
    return [(" and ".join(roles), model) for roles, model in found.values()]


def _described(model: Model) -> str:
    exact = "batch-invariant" if model.info.batch_invariant else "not batch-invariant"
    return f"{model.info.name} on {model.info.backend}, {model.info.dtype}, {exact}"


def _contract(model: Model, text: str, only: tuple[str, ...]) -> list[Check]:
    from steersman.core.contract import run_contract

    with _steps("check") as moved:
        return run_contract(
            model,
            text=text,
            only=only or None,
            progress=lambda _, done, total: moved(done, total),
        )


def _parity(model: Model, reference: Model, text: str) -> list[Check]:
    from steersman.core.contract import parity_checks
    from steersman.core.errors import InvalidInput

    # The file is read in pieces: a long text must not be tokenised for its first 512 tokens.
    start = text[: 16 * MAX_PARITY_TOKENS]
    tokens, others = (m.tokenizer.encode(start) for m in (model, reference))
    if tokens != others:
        raise InvalidInput(
            f"{reference.info.backend}: gives other token ids for the same text; "
            "compare engines on the same model"
        )
    with _steps("compare") as moved:
        return parity_checks(model, reference, tokens[:MAX_PARITY_TOKENS], progress=moved)


@contextmanager
def _steps(label: str) -> Iterator[Any]:
    """A progress bar that is told how far it is, not how far it went on."""
    with output.progress(None, label=label, unit="step") as bar:
        seen = 0

        def moved(done: int, total: int) -> None:
            nonlocal seen
            if hasattr(bar, "total"):
                bar.total = total
            bar.update(done - seen)
            seen = done

        yield moved


def _report(envelope: Envelope, checks: list[Check], about: str) -> None:
    count = {
        result: sum(check.result == result for check in checks)
        for result in ("passed", "failed", "skipped")
    }
    envelope.metrics = {**count, "seconds": sum(check.seconds for check in checks)}
    envelope.result = [
        {**asdict(check), "capability": check.capability.names()} for check in checks
    ]
    if not envelope.json:
        rows = [
            [
                check.title,
                check.result,
                "" if check.value is None else f"{check.value:.3g}",
                "" if check.bound is None else f"{check.bound:.3g}",
                check.measure,
            ]
            for check in checks
        ]
        header = ["check", "result", "measured", "bound", "of"]
        print(output.table(rows, header=header, right=(2, 3)))
        print()
        notes = [[c.result, c.name, c.detail] for c in checks if c.result != "passed"]
        if notes:
            print(output.table(notes))
            print()
        summary = ", ".join(f"{number} {result}" for result, number in count.items() if number)
        output.print_text(f"{about}: {summary}")
    if count["failed"]:
        failed = ", ".join(check.name for check in checks if check.result == "failed")
        envelope.fail(
            Problem(code="check_failed", message=f"check: {failed} failed on {about}"),
            exit_code=RUNTIME,
        )
