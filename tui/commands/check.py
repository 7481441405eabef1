"""``steersman check``: run the contract suite on a model and engine, and compare two engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from .. import common, output
from ..envelope import RUNTIME, Envelope, Problem

if TYPE_CHECKING:
    from steersman.core.contract import Check
    from steersman.core.model import Model

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
@common.option("--list", "names", is_flag=True, envvar=None, help="Name the checks and end.")
@common.model_options
@common.output_options
def command(
    against: str | None,
    only: tuple[str, ...],
    text: str | None,
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
        with common.load_model(model_args, envelope=envelope) as model:
            checks = _contract(model, words, only)
            if against is not None:
                other = replace(model_args, backend=against, dtype=None, device=None)
                with common.load_model(other) as reference:
                    envelope.resolved["against"] = common.model_facts(reference)
                    checks += _parity(model, reference, words)
            about = f"{model.info.name} on {model.info.backend}, {model.info.dtype}"
            exact = "batch-invariant" if model.info.batch_invariant else "not batch-invariant"
        _report(envelope, checks, f"{about}, {exact}")


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
