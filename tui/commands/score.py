"""``steersman score``: how likely a model finds a text, token by token."""

from __future__ import annotations

from typing import Any

import click

from steersman.core.errors import InvalidInput

from .. import common, output
from ..interrupts import ctrl_c_cancels


@click.command("score", context_settings={"max_content_width": 100})
@click.argument("file", metavar="FILE")
@common.option(
    "--stride",
    type=common.Finite(1, 1 << 24, whole=True),
    help="Tokens newly scored per window, for a text longer than the context "
    "[half the context]. Smaller: more context for each token, and slower.",
)
@common.option("--summary", is_flag=True, help="Print the totals without the table of tokens.")
@common.model_options
@common.output_options
def command(file: str, stride: int | None, summary: bool, model_args: common.ModelArgs) -> None:
    """Log-probability (natural log) of every token of FILE (- is stdin), and the totals.

    Each token is scored given all text before it; the first is conditioned on the beginning-of-
    text token where the model has one, and is not scored where it has none. A text longer than
    the context is never cut: it is scored in overlapping windows, each token once, with at least
    (context - stride) tokens before it.
    """
    text = common.read_text(file)
    if not text:
        raise InvalidInput(f"{'stdin' if file == '-' else file}: empty; there is nothing to score")
    from steersman.core import score

    with common.Envelope("score") as envelope:
        envelope.inputs = {"file": file, "stride": stride}
        with (
            common.load_model(model_args, envelope=envelope) as model,
            ctrl_c_cancels() as cancel,
            output.progress(None, label="score", unit="tok") as bar,
        ):
            seen = 0

            def progress(done: int, total: int) -> None:
                nonlocal seen
                if hasattr(bar, "total"):
                    bar.total = total
                bar.update(done - seen)
                seen = done

            result = score(model, text, stride=stride, progress=progress, cancel=cancel.is_set)
            names = [model.tokenizer.token_name(i) for i in result.token_ids]
            context = model.info.context
        totals: dict[str, Any] = {
            "num_tokens": len(result.token_ids),
            "scored": result.scored,
            "bytes": len(text.encode("utf-8")),
            "nll": result.nll,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "windows": result.windows,
            "context": context,
            "stride": None if result.windows == 1 else stride or context // 2,
        }
        envelope.metrics = totals
        if envelope.json:
            envelope.result = {
                **totals,
                "token_ids": list(result.token_ids),
                "tokens": names,
                "token_bytes": [list(b) for b in result.token_bytes],
                "logprobs": list(result.logprobs),
            }
            return
        if not summary:
            rows = [
                [i, token, name, "" if lp is None else f"{lp:.4f}"]
                for i, (token, name, lp) in enumerate(
                    zip(result.token_ids, names, result.logprobs, strict=True)
                )
            ]
            header = ["#", "id", "token", "logprob"]
            print(output.table(rows, header=header, right=(0, 1, 3)))
            print()
        print(
            output.table(
                [
                    ["tokens", f"{totals['num_tokens']} ({totals['scored']} scored)"],
                    ["bytes", totals["bytes"]],
                    ["negative log-likelihood", f"{result.nll:.4f} nats"],
                    ["perplexity", f"{result.perplexity:.4f} per token"],
                    ["bits per byte", f"{result.bits_per_byte:.4f}"],
                    ["windows", _windows(totals)],
                ]
            )
        )


def _windows(totals: dict[str, Any]) -> str:
    if totals["windows"] == 1:
        return "1 (the text fits the context)"
    return f"{totals['windows']} of {totals['context']} tokens, stride {totals['stride']}"
