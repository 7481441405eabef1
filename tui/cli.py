"""The ``steersman`` command: a table of commands, each imported when it is run.

Exit codes: 0 ok, 2 bad argument, 3 something is not installed or not offered, 4 missing file,
5 invalid input, 6 failure while running, 7 partly done, 130 cancelled.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from . import common, completing, output
from .envelope import BAD_ARGUMENT, CANCELLED, Envelope, problem

# Name -> line in --help. The module is steersman.tui.commands.<name>, its click command `command`.
COMMANDS: Mapping[str, str] = {
    "generate": "Continue a text, answer a message, or run a JSONL batch.",
    "chat": "Chat line by line, without the full screen.",
    "trace": "Look at traces: how each token of a recorded text came about.",
    "score": "Log-probability of every token of a text; perplexity.",
    "index": "Make documents searchable with a model that was never trained for it.",
    "search": "Find documents in an index; its output pipes into rerank.",
    "rerank": "Order passages by how well they answer a query.",
    "eval": "Measure a ranking against relevance judgements.",
    "audit": "Check a bill for hidden reasoning tokens (CoIn).",
    "verify": "Judge finished traces by the model's hidden states (CLUE).",
    "train": "Train what a method needs: a reranker, a router, a value head (on torch).",
    "slop": "Find over-used words and phrases; make a ban list.",
    "models": "List models: known, installed, cached.",
    "profiles": "List, show, check, compare and create profiles.",
    "check": "Check an engine and a model against the contract.",
    "doctor": "Say what is installed, what is missing, how to get it.",
    "paths": "Print the folders and files in use.",
    "prompt": "Show the exact text and token ids a model would see.",
    "completion": "Print shell completion for bash, zsh or fish.",
}

# Commands with commands of their own, so that settings files reach those without an import.
NESTED: Mapping[str, tuple[str, ...]] = {
    "profiles": ("list", "show", "validate", "path", "new", "diff"),
    "prompt": ("show",),
    "trace": ("show", "stats"),
    "slop": ("profile",),
    "audit": ("commit", "ask", "prove", "check"),
    "verify": ("fit", "score", "rerank"),
    "train": ("first", "coin", "value", "r2r"),
}


class Commands(click.Group):
    """A group that imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".commands.{cmd_name}", __package__)
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from steersman.core.errors import did_you_mean

            raise click.UsageError(
                f"{args[0]!r}: no such command{did_you_mean(args[0], COMMANDS)}", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table; nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from .environment import version_lines

        for line in version_lines():
            output.print_text(line)
        ctx.exit()


def _devices(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from .environment import device_lines

        for line in device_lines():
            output.print_text(line)
        ctx.exit()


@click.group(
    "steersman",
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@common.models_options
@common.option(
    "--profile",
    metavar="NAME|FILE",
    shell_complete=completing.profiles,
    help="How to decode [balanced].",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Versions of steersman and of the engines.",
)
@click.option(
    "--list-devices",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_devices,
    help="Devices that the installed engines can use.",
)
@common.debug_option
@click.pass_context
def cli(ctx: click.Context, model_args: common.ModelArgs, profile: str | None) -> None:
    """Steer how a local language model decodes.

    On a terminal, without a command: the full-screen chat. Every option can also be set by an
    environment variable (STEERSMAN_ and its long name), in ./steersman.yaml or in the user's
    config.yaml; see `steersman paths`.
    """  # fmt: skip
    if ctx.invoked_subcommand is not None:
        _refuse_options_before_command(ctx)
        return
    if not (output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout)):
        output.print_text(ctx.get_help())
        return
    from .app import run_app

    run_app(model_args, profile=profile)


def _refuse_options_before_command(ctx: click.Context) -> None:
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        if param.expose_value and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{param.opts[-1]}: write it after the command: "
                f"steersman {ctx.invoked_subcommand} {param.opts[-1]} ..."
            )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Never raises, except SystemExit from below.

    Parameters
    ----------
    args : sequence of str, optional
        Arguments; those of the process if None.
    """
    argv = list(sys.argv[1:] if args is None else args)
    output.reset()
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (| head) has enough. Python would complain again when it flushes at exit.
        _mute_stdout()
        return 0
    except (Exception, KeyboardInterrupt) as exc:
        return _report(exc, argv)


def _run(argv: list[str]) -> int:
    from .settings import Defaults, read_defaults

    if "_STEERSMAN_COMPLETE" in os.environ:
        cli.main(argv, "steersman")  # click's own protocol with the shell; exits
    # Help and version work whatever a settings file holds.
    asks_help = any(a in ("-h", "--help", "--version") for a in argv)
    defaults = Defaults() if asks_help else read_defaults([*COMMANDS, "app"])
    root: dict[str, Any] = {**defaults.values, **defaults.values.get("app", {})}
    for group, names in NESTED.items():
        values = defaults.values.get(group, {})
        root[group] = {**values, **dict.fromkeys(names, values)}
    with cli.make_context("steersman", argv, default_map=root) as ctx:
        ctx.meta["steersman.defaults"] = defaults
        value = cli.invoke(ctx)
    return value if isinstance(value, int) else 0


def _report(exc: BaseException, argv: list[str]) -> int:
    if isinstance(exc, click.exceptions.Exit):
        return exc.exit_code
    if isinstance(exc, click.exceptions.NoArgsIsHelpError):  # a group without its command
        sys.stderr.write(exc.format_message() + "\n")
        return exc.exit_code
    found = problem(exc)
    if found.exit_code == CANCELLED:
        output.note("cancelled")
    else:
        output.error(found.message)
    if found.code == "bad_argument" and isinstance(exc, click.UsageError) and exc.ctx is not None:
        output.note(f"try: {exc.ctx.command_path} --help")
    if output.state.debug or "--debug" in argv:
        import traceback

        for line in "".join(traceback.format_exception(exc)).rstrip().split("\n"):
            output.note(line)
    if _wants_json(argv) and not output.state.emitted:
        # The arguments did not even parse, so no command could print its envelope.
        envelope = Envelope(next((a for a in argv if a in COMMANDS), "steersman"))
        envelope.errors.append(found)
        envelope.exit_code = found.exit_code or BAD_ARGUMENT
        envelope.emit()
    return found.exit_code


def _wants_json(argv: list[str]) -> bool:
    pairs = zip(argv, [*argv[1:], ""])
    return (
        output.state.json
        or "--json" in argv
        or "--output=json" in argv
        or any(a == "--output" and b == "json" for a, b in pairs)
    )


def _mute_stdout() -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


if __name__ == "__main__":
    sys.exit(main())
