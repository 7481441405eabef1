"""``steersman generate``: continue a text, answer a message, or run a batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from steersman.core.errors import UsageError

from .. import common, output
from ..interrupts import ctrl_c_cancels
from ..roles import open_roles
from ..tracing import TraceArgs, trace_options


@click.command("generate", context_settings={"max_content_width": 100})
@click.argument("file", required=False, metavar="[FILE]")
@common.option(
    "-p", "--prompt", metavar="TEXT", envvar=None, help="The prompt; - reads it from stdin."
)
@common.option(
    "-f", "--file", "file_option", metavar="FILE", envvar=None, help="Read the prompt from FILE."
)
@common.option("--chat", is_flag=True, help="Send the prompt as a chat message.")
@common.option("-s", "--system", metavar="TEXT", help="System message; implies --chat.")
@common.option(
    "--evidence",
    metavar="FILE",
    multiple=True,
    envvar=None,
    help="A document to answer from: put before the prompt, unless it holds it already, and "
    "pointed out to strategies that look at evidence; may be given several times.",
)
@common.models_options
@common.sampling_options
@common.option(
    "--top-logprobs",
    type=common.Finite(0, 1000, whole=True),
    help="Report the log-probability of each token and of the N likeliest ones.",
)
@common.option(
    "--show-chain",
    is_flag=True,
    help="Print every effective setting and where it came from; "
    "without a prompt, that and nothing else.",
)
@common.option(
    "--stream/--no-stream",
    default=None,
    help="Write text as it comes [on a terminal: yes; into a pipe: at the end].",
)
@common.option(
    "--jsonl", metavar="FILE", envvar=None, help="Batch: one JSON object per line; - is stdin."
)
@common.option("--out", metavar="FILE", envvar=None, help="Batch: append results here; resumable.")
@trace_options
@common.output_options
def command(
    file: str | None,
    prompt: str | None,
    file_option: str | None,
    chat: bool,
    system: str | None,
    evidence: tuple[str, ...],
    model_args: common.ModelArgs,
    sampling: common.SamplingArgs,
    top_logprobs: int | None,
    show_chain: bool,
    stream: bool | None,
    jsonl: str | None,
    out: str | None,
    trace_args: TraceArgs,
) -> None:
    """Continue a text (default) or answer a chat message (--chat).

    The prompt is -p TEXT, a FILE, or stdin; one newline at the end of a file or of stdin is not
    part of it. On a terminal, control characters in the text are shown, not sent; into a pipe or
    file the text goes as the model wrote it, in UTF-8.

    \b
    steersman generate -p "The capital of France is"
    steersman generate --chat -p "Name three rivers." --profile precise --json
    git diff | steersman generate --chat -s "Write a commit message." -p -
    steersman generate --chat --profile opera --evidence report.txt -p "Summarise the report."
    steersman generate --jsonl prompts.jsonl --out answers.jsonl
    """
    chat = chat or system is not None
    if jsonl is not None:
        _refuse(prompt=prompt, file=file or file_option, stream=stream)
        if evidence:
            raise UsageError("--evidence: give each line of a batch a field 'evidence' instead")
        from ..batch import run_batch

        with common.Envelope("generate", mode="batch") as envelope:
            run_batch(
                jsonl,
                out,
                model_args=model_args,
                sampling=sampling,
                chat=chat,
                system=system,
                top_logprobs=top_logprobs,
                trace_args=trace_args,
                envelope=envelope,
            )
        return
    if out is not None:
        raise UsageError("--out: belongs to --jsonl; redirect stdout instead")
    with common.Envelope("generate") as envelope:
        _generate(
            _prompt(prompt, file, file_option, optional=show_chain),
            chat=chat,
            system=system,
            evidence=[common.read_text(name) for name in evidence],
            model_args=model_args,
            sampling=sampling,
            top_logprobs=top_logprobs,
            show_chain=show_chain,
            live=output.is_terminal(sys.stdout) if stream is None else stream,
            trace_args=trace_args,
            envelope=envelope,
        )


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name}: cannot be used together with --jsonl")


def _prompt(
    prompt: str | None, file: str | None, file_option: str | None, *, optional: bool
) -> str | None:
    sources = [s for s in (prompt, file, file_option) if s is not None]
    if len(sources) > 1:
        raise UsageError("prompt: give one of -p, -f and FILE")
    if prompt is not None and prompt != "-":
        return prompt
    name = "-" if prompt == "-" else file or file_option
    if name is None:
        if output.is_terminal(sys.stdin):
            if optional:
                return None
            raise UsageError("prompt: give -p TEXT, a FILE, or text on stdin")
        name = "-"
    return common.read_text(name, drop_final_newline=True)


def _generate(
    prompt: str | None,
    *,
    chat: bool,
    system: str | None,
    evidence: Sequence[str],
    model_args: common.ModelArgs,
    sampling: common.SamplingArgs,
    top_logprobs: int | None,
    show_chain: bool,
    live: bool,
    trace_args: TraceArgs,
    envelope: common.Envelope,
) -> None:
    from steersman.core.evidence import with_evidence

    from .. import generation  # not for --help: they import NumPy

    profile = sampling.load_profile()
    envelope.inputs = {
        "prompt": prompt,
        "chat": chat,
        "system": system,
        "evidence": list(evidence),
        "profile": sampling.profile,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
    }
    envelope.resolved = {
        "profile": profile.name,
        "profile_fingerprint": profile.fingerprint,
        "settings": [vars(s) for s in common.settings(profile, model_args, sampling)],
    }
    if show_chain and not envelope.json:
        text = common.settings_table(profile, model_args, sampling)
        print(text, file=sys.stderr if prompt is not None else sys.stdout)
    if prompt is None:
        return
    wanted: str | list[dict[str, str]] = prompt
    if chat:
        wanted = [{"role": "system", "content": system}] if system is not None else []
        wanted.append({"role": "user", "content": prompt})
    if evidence:
        wanted = with_evidence(wanted, evidence)
    with (
        trace_args.recorder() as recorder,
        open_roles(model_args, profile, envelope=envelope) as roles,
    ):
        model = roles.target
        logprobs = top_logprobs if top_logprobs is not None else (0 if envelope.json else None)
        printer = None if envelope.json else generation.Printer(live=live)
        with ctrl_c_cancels() as cancel:
            done = generation.run(
                model,
                wanted,
                profile,
                printer=printer,
                cancel=cancel,
                envelope=envelope,
                recorder=recorder,
                logprobs=logprobs,
                evidence=evidence,
                session=roles.sessions,
                models=roles.models,
                **sampling.stream_options(),
            )
        envelope.result = done.record(model, logprobs=logprobs is not None)
    envelope.metrics = generation.timings_record(done.timings)
    if recorder.path is not None:
        envelope.artifacts["trace"] = recorder.path
    if not envelope.json:
        if top_logprobs is not None:
            print(_token_table(envelope.result["logprobs"]))
        if output.is_terminal(sys.stderr):
            output.note(generation.summary(done))
    if done.finish_reason == "cancelled":
        envelope.errors.append(common.problem(KeyboardInterrupt()))
        envelope.exit_code = 130


def _token_table(tokens: list[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    rows = [
        [
            i,
            t["id"],
            t["token"],
            number(t["raw_logprob"]),
            number(t["logprob"]),
            "  ".join(f"{a['token']!r} {a['raw_logprob']:.2f}" for a in t["top"]),
        ]
        for i, t in enumerate(tokens)
    ]
    header = ["#", "id", "token", "raw logprob", "final logprob", "likeliest"]
    return output.table(rows, header=header, right=(0, 1, 3, 4))
