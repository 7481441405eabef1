"""``steersman prompt``: the exact text and token ids that a model would see."""

from __future__ import annotations

from typing import Any

import click

from steersman.core.errors import UsageError

from .. import common, output


@click.group("prompt")
def command() -> None:
    """Look at prompts as models see them."""


@command.command("show")
@click.argument("file", required=False, metavar="[FILE]")
@common.option("-p", "--prompt", metavar="TEXT", envvar=None, help="The prompt; - is stdin.")
@common.option("--chat", is_flag=True, help="As a chat message, through the chat template.")
@common.option("-s", "--system", metavar="TEXT", help="System message; implies --chat.")
@common.model_options
@common.output_options
def show_command(
    file: str | None,
    prompt: str | None,
    chat: bool,
    system: str | None,
    model_args: common.ModelArgs,
) -> None:
    """Print the rendered chat template (with --chat) and every token id.

    A beginning-of-text token that the model wants is among the ids; it stands there once.
    """
    if (prompt is None) == (file is None):
        raise UsageError("prompt: give one of -p TEXT and FILE")
    if prompt is None or prompt == "-":
        prompt = common.read_text(file or "-", drop_final_newline=True)
    chat = chat or system is not None
    from steersman.core.api import encode_prompt

    with common.Envelope("prompt show") as envelope:
        envelope.inputs = {"prompt": prompt, "chat": chat, "system": system}
        wanted: str | list[dict[str, str]] = prompt
        rendered = prompt
        with common.load_model(model_args, envelope=envelope) as model:
            tokenizer = model.tokenizer
            if chat:
                from steersman.core.chat import render

                wanted = [{"role": "system", "content": system}] if system is not None else []
                wanted.append({"role": "user", "content": prompt})
                if tokenizer.chat_template is None:
                    raise UsageError(
                        f"--chat: {model.info.name} has no chat template; leave out --chat"
                    )
                rendered = render(tokenizer.chat_template, wanted, tokenizer=tokenizer)
            ids = encode_prompt(tokenizer, wanted).tolist()
            tokens: list[dict[str, Any]] = [
                {
                    "id": i,
                    "token": tokenizer.token_name(i),
                    "special": i in tokenizer.special_ids,
                }
                for i in ids
            ]
        envelope.result = {"text": rendered, "token_ids": ids, "tokens": tokens}
        if envelope.json:
            return
        output.print_text(rendered)
        print()
        rows = [
            [n, t["id"], t["token"], "control" if t["special"] else ""]
            for n, t in enumerate(tokens)
        ]
        print(output.table(rows, header=["#", "id", "token", ""], right=(0, 1)))
