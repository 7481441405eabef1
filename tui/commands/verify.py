"""``steersman verify``: judge finished traces by the model's hidden states (CLUE)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import InvalidInput, SteersmanError, UsageError

from .. import common, output
from ..envelope import INVALID, PARTIAL, RUNTIME
from ..interrupts import ctrl_c_cancels
from ..options import (
    FILE,
    WIDE,
    file_option,
    overwrite_option,
    refuse_existing,
    require_safetensors,
    whole,
)

if TYPE_CHECKING:
    from steersman.core.verification.problems import Problem

_SHOWN_PROBLEMS = 20


@click.group("verify")
def command() -> None:
    """Judge finished traces by the model's own hidden states (CLUE)."""


_traces = click.argument("traces", metavar="TRACES", type=FILE)
_overwrite = overwrite_option("Start anew; replace what is there.")
_centroids = file_option(
    "--centroids", required=True,
    help="Made by steersman verify fit, with the same model.",
)  # fmt: skip
_standardise = common.option(
    "--standardise", is_flag=True,
    help="Divide each layer's distance by its spread, so that large layers do not decide alone.",
)  # fmt: skip
_out = file_option(
    "--out",
    help="Results as JSON lines, each on disk before the next; the same command goes on with them "
    "[stdout].",
)  # fmt: skip


@command.command("fit", context_settings=WIDE)
@_traces
@file_option("--out", required=True, help="The centroids (.safetensors).")
@common.option(
    "--span",
    type=click.Choice(["tags", "response"]),
    default="tags",
    help="Compare states at the two tags of the reasoning, or at the end of the prompt "
    "and of the response [tags].",
)
@common.option("--opening", default="<think>", help="Opening tag [<think>].")
@common.option("--closing", default="</think>", help="Closing tag [</think>].")
@common.option(
    "--answer-marker",
    default="",
    metavar="TEXT",
    help="With --span response: the answer begins at the last TEXT, such as \\boxed.",
)
@common.option(
    "--max-tokens",
    type=whole(1, 1 << 24),
    help="Read at most N tokens of a response [all].",
)
@common.option("--chat", is_flag=True, help="Send plain prompts as chat messages.")
@common.option(
    "--states",
    type=click.Choice(["all", "last"]),
    default="all",
    help="Layers to compare; last is a reduced variant [all].",
)
@common.option(
    "--no-final-norm", is_flag=True, help="Take the last layer's state before the final norm."
)
@_overwrite
@common.model_options
@common.output_options
def fit(
    traces: Path,
    out: Path,
    span: Any,
    opening: str,
    closing: str,
    answer_marker: str,
    max_tokens: int | None,
    chat: bool,
    states: Any,
    no_final_norm: bool,
    overwrite: bool,
    model_args: common.ModelArgs,
) -> None:
    """Make centroids of right and wrong traces from TRACES, JSON lines with labels.

    A line: {"id", "prompt" or "messages", "responses": [{"response", "correct", "answer"}, ...]};
    with one response its fields may stand in the line itself. A stopped run goes on from
    OUT.part; the same command then finishes it.

    \b
    steersman verify fit labelled.jsonl --chat --out clue.safetensors
    steersman verify fit labelled.jsonl --chat --span response --out clue.safetensors
    """  # fmt: skip
    with common.Envelope("verify fit") as envelope, ExitStack() as stack:
        envelope.inputs = {"traces": traces, "out": out, "span": span}
        require_safetensors("--out", out)
        refuse_existing(out, overwrite=overwrite)
        from steersman.core.reranking.job import digest_files
        from steersman.core.verification import DeltaReader, TraceRule
        from steersman.core.verification import job as work

        rule = TraceRule(
            span=span, opening=opening, closing=closing, answer_marker=answer_marker,
            max_tokens=max_tokens, chat=chat, layers=states, final_norm=not no_final_norm,
        )  # fmt: skip
        made_of = {"input": digest_files([traces]), "rule": rule.as_dict()}
        problems = _Problems(envelope)
        total = _count(traces)
        model = stack.enter_context(common.load_model(model_args, envelope=envelope))
        facts = rule.model_facts(model)
        part = out.with_name(out.name + ".part")
        if overwrite:
            part.unlink(missing_ok=True)
        state = work.FitState(part, made_of | {"model": facts})
        resumed = len(state.done)
        with (
            ctrl_c_cancels() as cancel,
            output.progress(total, label="verify fit", unit="problem") as bar,
        ):
            reader = stack.enter_context(DeltaReader(model, rule, cancelled=cancel.is_set))
            try:
                tally = work.fit(
                    reader, _read(traces, problems, stack), state,
                    report=problems.problem, progress=bar.update,
                )  # fmt: skip
            finally:
                if cancel.is_set():
                    output.note(f"{len(state.done)} problems are kept; the same command goes on")
        found = state.experience.centroids(rule=rule, model=facts)
        found.save(out)
        part.unlink(missing_ok=True)
        envelope.artifacts = {"centroids": out}
        right, wrong = found.counts
        envelope.metrics = {
            "right": right, "wrong": wrong, "unlabelled": tally.unlabelled,
            "without_span": tally.without_span, "resumed": resumed, "problems": len(state.done),
        }  # fmt: skip
        apart = found.separation()
        envelope.result = {"separation": apart, "scale": found.scale, "rule": rule.as_dict()}
        problems.settle(succeeded=right + wrong)
        if tally.without_span:
            envelope.warn(f"{tally.without_span} traces have no span and were left out")
        if not envelope.json:
            rows: list[list[Any]] = [["right traces", right], ["wrong traces", wrong],
                    ["compared", work.describe(rule)],
                    ["classes lie apart", f"{apart[0]:.4g} in the first layer, "
                     f"{apart[-1]:.4g} in the last"]]  # fmt: skip
            print(output.table(rows))
            output.note(f"centroids: {out}")


@command.command("score", context_settings=WIDE)
@_traces
@_centroids
@_out
@_standardise
@_overwrite
@common.model_options
@common.output_options
def score(
    traces: Path,
    centroids: Path,
    out: Path | None,
    standardise: bool,
    overwrite: bool,
    model_args: common.ModelArgs,
) -> None:
    """Say of each trace in TRACES how far it is from right and from wrong ones.

    A trace counts as correct if it is nearer to success; one without a span counts as incorrect.
    Lines are those of verify fit, labels not needed; - is stdin.

    \b
    steersman verify score new.jsonl --centroids clue.safetensors
    """  # fmt: skip
    from steersman.core.verification.job import score_record

    _judge("score", traces, centroids, out, standardise, overwrite, model_args, score_record, {})


@command.command("rerank", context_settings=WIDE)
@_traces
@_centroids
@_out
@common.option(
    "--vote",
    default="4,8,16",
    metavar="K,...",
    help="Let the K nearest vote on the answer [4,8,16].",
)
@_standardise
@_overwrite
@common.model_options
@common.output_options
def rerank(
    traces: Path,
    centroids: Path,
    out: Path | None,
    vote: str,
    standardise: bool,
    overwrite: bool,
    model_args: common.ModelArgs,
) -> None:
    """Order the responses of each problem in TRACES, nearest to success first.

    "top" is the best response's place in the line; "votes" has the answer that most of the K
    nearest give (the nearer one among equals).

    \b
    steersman verify rerank samples.jsonl --centroids clue.safetensors --out ranked.jsonl
    """  # fmt: skip
    from steersman.core.verification.job import rerank_record

    votes = _numbers(vote)
    _judge(
        "rerank", traces, centroids, out, standardise, overwrite, model_args,
        lambda problem, found: rerank_record(problem, found, votes=votes), {"votes": list(votes)},
    )  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"--vote {text!r}: write whole numbers from 1, such as 4,8,16")
    return found


def _judge(
    name: str, traces: Path, file: Path, out: Path | None, standardise: bool, overwrite: bool,
    model_args: common.ModelArgs, make: Callable[..., dict[str, Any]], more: dict[str, Any],
) -> None:  # fmt: skip
    with common.Envelope(f"verify {name}") as envelope, ExitStack() as stack:
        envelope.inputs = {"traces": traces, "centroids": file, "out": out, **more}
        from steersman.core.journal import Journal
        from steersman.core.reranking.job import digest_files
        from steersman.core.verification import job as work
        from steersman.core.verification import read_centroids

        stdin = str(traces) == "-"
        if stdin and out is not None:
            raise UsageError("--out: needs a file of traces, which can be read again to go on")
        if out is not None and out.resolve() in (traces.resolve(), file.resolve()):
            raise UsageError(f"{out}: is both input and output")
        held = read_centroids(file)
        problems = _Problems(envelope)
        total = None if stdin else _count(traces)
        model = stack.enter_context(common.load_model(model_args, envelope=envelope))
        log = None
        with (
            ctrl_c_cancels() as cancel,
            output.progress(total, label=f"verify {name}", unit="problem") as bar,
        ):
            reader = stack.enter_context(
                work.open_reader(model, held, where=str(file), cancelled=cancel.is_set)
            )
            if out is not None:
                settings = {
                    "command": name, "input": digest_files([traces, file]),
                    "standardise": standardise, **held.rule.model_facts(model), **more,
                }  # fmt: skip
                log = stack.enter_context(Journal(out, settings, overwrite=overwrite))
            resumed = set(log.done) if log is not None else set()
            results: list[Any] = []
            made = 0
            try:
                for record in work.run(
                    reader, held, _read(traces, problems, stack), make, done=resumed,
                    standardise=standardise, report=problems.problem,
                ):  # fmt: skip
                    bar.update()
                    if record is None:
                        continue
                    made += 1
                    if log is not None:
                        log.append(record)
                    elif envelope.json:
                        results.append(record)
                    else:
                        output.print_json(common.to_json(record))
            finally:
                if cancel.is_set() and log is not None:
                    output.note(f"{len(log.done)} problems are in {out}; the same command goes on")
        if log is None and envelope.json:
            envelope.result = results
        envelope.artifacts = {} if out is None else {"out": out}
        envelope.metrics = {"done": made + len(resumed), "resumed": len(resumed),
                            "failed": problems.count}  # fmt: skip
        problems.settle(succeeded=made + len(resumed))
        output.note(f"{made} problems judged" + (f", {len(resumed)} before" if resumed else ""))


class _Problems:
    """Errors that do not stop the job: counted, the first ones shown and kept."""

    def __init__(self, envelope: common.Envelope) -> None:
        self._envelope = envelope
        self._failed = False
        self.count = 0

    def line(self, error: InvalidInput) -> None:
        """A line of input that cannot be used."""
        self._tell(error)

    def problem(self, problem: Problem, error: SteersmanError) -> None:
        """A problem of which a trace cannot be read."""
        self._failed |= not isinstance(error, InvalidInput)
        told = common.problem(error)
        self._tell(common.Problem(code=told.code, message=f"{problem.where}: {told.message}"))

    def _tell(self, error: InvalidInput | common.Problem) -> None:
        self.count += 1
        if self.count <= _SHOWN_PROBLEMS:
            self._envelope.fail(error, exit_code=PARTIAL)

    def settle(self, succeeded: int) -> None:
        """Set the exit code: 7 if something succeeded, else 5 for bad input or 6."""
        if self.count > _SHOWN_PROBLEMS:
            self._envelope.warn(f"{self.count - _SHOWN_PROBLEMS} more problems are not shown")
        if self.count:
            failed = RUNTIME if self._failed else INVALID
            self._envelope.exit_code = PARTIAL if succeeded else failed


def _read(traces: Path, problems: _Problems, stack: ExitStack) -> Iterator[Problem]:
    from steersman.core.text_lines import open_text
    from steersman.core.verification.problems import read_problems

    if str(traces) == "-":
        return read_problems(sys.stdin.buffer, "stdin", report=problems.line)
    lines = stack.enter_context(open_text(traces))
    return read_problems(lines, str(traces), report=problems.line)


def _count(traces: Path) -> int | None:
    """Number of lines for the progress bar, where it costs little to know."""
    from steersman.core.text_lines import open_text

    with open_text(traces) as file:
        return None if traces.suffix == ".gz" else sum(bool(line.strip()) for line in file)
