"""``steersman trace``: look at how recorded texts came about. Needs no engine and no model."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import UsageError

from .. import common, output

if TYPE_CHECKING:
    from steersman.core.trace import Recording, Replay


@click.group("trace")
def command() -> None:
    """Look at traces, which generate and chat record with --trace FILE."""


@command.command("show")
@click.argument("file", metavar="FILE")
@common.option(
    "--request",
    type=common.Finite(0, 2**63, whole=True),
    envvar=None,
    help="Only this text of the file: its number, or its line in a batch.",
)
@common.option(
    "--plain", is_flag=True, help="A table instead of the screen; so it is into a pipe, too."
)
@common.output_options
def show_command(file: str, request: int | None, plain: bool) -> None:
    """Walk through a trace step by step.

    Arrows step forwards and backwards, Home and End go to the ends, Space plays, m finds the next
    place where something was taken back, refused or routed, c changes the colours, n shows the
    next text, q leaves.
    """  # fmt: skip
    from steersman.core.trace import Replay, read_trace

    with common.Envelope("trace show") as envelope:
        envelope.inputs = {"trace": file, "request": request}
        _say_if_large(file)
        replay = Replay(file)
        places = _places(replay, file, request)
        if envelope.json:
            wanted = {replay.recordings[place].request for place in places}
            envelope.result = {
                "header": replay.header,
                "full": replay.full,
                "events": [
                    line.data for line in read_trace(file) if line.data.get("request") in wanted
                ],
            }
            return
        if not plain and output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout):
            from ..trace_app import TraceApp

            TraceApp(replay, request=places[0]).run()
            return
        for place in places:
            _print(replay, replay.recordings[place])
        if replay.full:
            output.warn(f"{file}: reached its size limit and ends there")


def _say_if_large(file: str) -> None:
    size = os.path.getsize(file) if os.path.isfile(file) else 0
    if size > 16 << 20:
        output.note(f"reading {size >> 20} MiB")


def _places(replay: Replay, file: str, request: int | None) -> list[int]:
    """Return the places of the recordings to show."""
    places = [
        place
        for place, recording in enumerate(replay.recordings)
        if request is None or recording.request == request
    ]
    if places:
        return places
    if request is None:
        raise UsageError(f"{file}: holds no text yet")
    known = sorted({recording.request for recording in replay.recordings})
    shown = ", ".join(map(str, known[:20])) + (", ..." if len(known) > 20 else "")
    raise UsageError(f"--request {request}: {file} holds {shown}")


def _print(replay: Replay, recording: Recording) -> None:
    from .. import trace_text

    details = {
        at: replay.detail(frame)
        for at, frame in enumerate(recording.frames)
        if frame.kind == "token"
    }
    output.print_text(f"request {recording.request}: {trace_text.title(recording)}")
    rows = trace_text.plain_rows(recording, details)
    print(output.table(rows, header=trace_text.PLAIN_HEADER, right=(0, 1, 3, 4, 5, 6)))
    if not recording.finished:
        output.print_text("(the trace ends here)")
    print()


@command.command("stats")
@click.argument("file", metavar="FILE")
@common.output_options
def stats_command(file: str) -> None:
    """Count: rewinds, accepted drafts, routing, and what each stage did on average."""
    from steersman.core.trace import summarise

    with common.Envelope("trace stats") as envelope:
        envelope.inputs = {"trace": file}
        _say_if_large(file)
        envelope.result = found = summarise(file)
        if not envelope.json:
            _print_stats(found)


def _print_stats(found: dict[str, Any]) -> None:
    from ..plots import bar, sparkline

    def say(name: str, value: object, remark: str = "") -> list[str]:
        return [name, str(value), remark]

    ends = ", ".join(f"{n} {reason}" for reason, n in found["finished"].items())
    failed = f", {found['failed']} failed" if found["failed"] else ""
    rows = [
        say("texts", found["requests"], ends + failed),
        say("tokens", found["kept"], f"{found['withdrawn']} more taken back"),
    ]
    if found["rewinds"]:
        rules = ", ".join(f"{rule}: {n}" for rule, n in list(found["rules"].items())[:8])
        rows.append(say("rewinds", found["rewinds"], rules))
    if found["suppressed"]:
        rows.append(say("suppressed", found["suppressed"], "bans given up"))
    if found["drafted"]:
        share = f"{found['accepted']} of {found['drafted']} in {found['rounds']} rounds"
        rows.append(say("drafts accepted", f"{found['acceptance']:.1%}", share))
    if found["routed"]:
        total = sum(found["routed"].values())
        for role, n in found["routed"].items():
            rows.append(say(f"routed to {role}", n, f"{n / total:.1%}"))
    if found["blocks"]:
        passes = f"{found['passes']:.2f} passes each" if found["passes"] is not None else ""
        rows.append(say("blocks", found["blocks"], passes))
    if found["tokens_per_second"] is not None:
        rows.append(say("tokens per second", f"{found['tokens_per_second']:.1f}", "recording"))
    if found["surprise"] is not None:
        rows.append(say("surprise", f"{found['surprise']:.3f}", "nats per token: mean -log p"))
    if found["entropy"] is not None:
        rows.append(say("entropy", f"{found['entropy']:.3f}", "nats, of the model's distribution"))
    print(output.table(rows, right=(1,)))
    if found["curve"]:
        output.print_text(f"\nsurprise over the text, 0 to {max(found['curve']):.2f} nats")
        output.print_text(sparkline(found["curve"]))
    if any(found["ranks"].values()):
        most = max(found["ranks"].values())
        total = sum(found["ranks"].values())
        rows = [[r, n, f"{n / total:.1%}", bar(n, most, 30)] for r, n in found["ranks"].items()]
        print("\n" + output.table(rows, header=["rank", "tokens", "", ""], right=(0, 1, 2)))
    if found["stages"]:
        most = max(max(s["entropy_before"], s["entropy_after"]) for s in found["stages"])
        rows = [
            [
                s["name"], f"{s['left'] or 0:.1f}", f"{s['removed'] or 0:.4f}",
                f"{s['tv'] or 0:.4f}", f"{s['argmax_changed']:.1%}", f"{s['entropy_change']:+.3f}",
                f"{s['entropy_after']:.3f}", bar(s["entropy_after"], most, 24),
            ]
            for s in found["stages"]
        ]  # fmt: skip
        header = ["stage", "left", "removed", "TV", "argmax", "Δ entropy", "entropy", ""]
        print("\n" + output.table(rows, header=header, right=(1, 2, 3, 4, 5, 6)))
    if found["full"]:
        output.warn("the trace reached its size limit and ends there")
