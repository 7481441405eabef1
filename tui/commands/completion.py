"""``steersman completion``: the script that teaches a shell to complete."""

from __future__ import annotations

import sys

import click

from .. import common, output

# Shell -> where the script's output goes so that it is loaded at start.
INSTALL = {
    "bash": "steersman completion bash > ~/.local/share/bash-completion/completions/steersman",
    "zsh": 'steersman completion zsh > "${fpath[1]}/_steersman"',
    "fish": "steersman completion fish > ~/.config/fish/completions/steersman.fish",
}


@click.command("completion")
@click.argument("shell", type=click.Choice(sorted(INSTALL)))
@common.output_options
def command(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: steersman completion bash > ~/.local/share/bash-completion/completions/steersman
    zsh:  steersman completion zsh > "${fpath[1]}/_steersman"
    fish: steersman completion fish > ~/.config/fish/completions/steersman.fish
    """
    from click.shell_completion import get_completion_class

    from ..cli import cli

    kind = get_completion_class(shell)
    assert kind is not None  # click ships the three shells that Choice allows
    source = kind(cli, {}, "steersman", "_STEERSMAN_COMPLETE").source()
    with common.Envelope("completion") as envelope:
        envelope.inputs["shell"] = shell
        envelope.result = {"script": source, "install": INSTALL[shell]}
        if not envelope.json:
            output.print_text(source.rstrip("\n"))
            if output.is_terminal(sys.stdout):
                output.note(f"to install: {INSTALL[shell]}")
