"""``steersman train``: fit what a method needs, on torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import UsageError

from .. import common, output
from ..interrupts import ctrl_c_cancels
from ..options import (
    WIDE,
    file_option,
    learning_rate_option,
    overwrite_option,
    refuse_existing,
    require_safetensors,
    train_device_option,
    whole,
)
from ..training_plot import report_training
from .train_coin import coin
from .train_first import first
from .train_value import value

if TYPE_CHECKING:
    from steersman.core.routing.router import Router


@click.group("train")
def command() -> None:
    """Train what a method needs (on torch)."""


command.add_command(first)
command.add_command(coin)
command.add_command(value)


@command.command("r2r", context_settings=WIDE)
@common.option(
    "--prompts",
    required=True,
    metavar="FILE",
    envvar=None,
    help="Prompts as generate --jsonl takes them; some hundred.",
)
@common.option("--chat", is_flag=True, help="Send the prompts as chat messages.")
@file_option(
    "--work",
    required=True,
    metavar="FOLDER",
    help="Texts and features are kept here; a stopped run goes on.",
)
@file_option("--out", required=True, help="The router (.safetensors).")
@common.option(
    "--labels",
    type=click.Choice(["mismatch", "answer", "judge"]),
    default="mismatch",
    help="Divergent: every token the small model would choose otherwise; those that change the "
    "final answer; those whose sentence a judge finds changed [mismatch].",
)
@common.option("--judge", metavar="NAME[,KEY=VALUE]", help="Chat model for --labels judge.")
@common.option(
    "-n",
    "--max-tokens",
    type=whole(1, 1 << 20),
    default=256,
    help="Of the large model's texts [256].",
)
@common.option(
    "--continuation",
    type=whole(1, 1 << 20),
    default=128,
    help="Most tokens of a continuation, for answer and judge [128].",
)
@common.option(
    "--checks",
    type=whole(1, 10_000),
    default=12,
    help="Differing tokens per text that are tried or judged [12].",
)
@common.option(
    "--width",
    type=whole(1, 65_536),
    default=128,
    help="Of the router's network; the paper's is 1024 [128].",
)
@common.option(
    "--blocks",
    type=whole(1, 64),
    default=2,
    help="Of the network; the paper's has 6 [2].",
)
@common.option("--epochs", type=whole(1, 10_000), default=50, help="Most epochs [50].")
@common.option(
    "--batch",
    type=whole(1, 1 << 20),
    default=256,
    help="Tokens per step; the paper's is 1024 [256].",
)
@learning_rate_option(5e-4, "Of AdamW; the paper's large network takes 5e-5 [5e-4].")
@common.option(
    "--recall",
    type=common.Finite(0.01, 1),
    default=0.95,
    help="Share of divergent tokens that the threshold must catch [0.95].",
)
@common.option("--seed", type=whole(0, 2**63 - 1), default=0, help="[0].")
@train_device_option
@overwrite_option("Replace a router that is there.")
@common.models_options
@common.output_options
def r2r(
    prompts: str,
    chat: bool,
    work: Path,
    out: Path,
    labels: Any,
    judge: str | None,
    max_tokens: int,
    continuation: int,
    checks: int,
    width: int,
    blocks: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    recall: float,
    seed: int,
    train_device: str,
    overwrite: bool,
    model_args: common.ModelArgs,
) -> None:
    """Train a router for a pair of models: --model is the large one, --model-for small=... the
    small one (by default the large one without four of its layers).

    The large model writes a text per prompt; the small one reads each and its logits, hidden states
    and choices are kept; the tokens are labelled; a small network learns to tell divergent ones.

    \b
    steersman train r2r --prompts questions.jsonl --chat --work r2r/ --out r2r/router.safetensors
    steersman generate --profile r2r -o r2r.router_file=r2r/router.safetensors -p "..."
    """  # fmt: skip
    with common.Envelope("train r2r") as envelope:
        envelope.inputs = {"prompts": prompts, "work": work, "out": out, "labels": labels}
        refuse_existing(out, overwrite=overwrite)
        require_safetensors("--out", out)
        if (labels == "judge") != (judge is not None):
            raise UsageError("--judge: goes with --labels judge, and the other way round")
        from steersman.core.backend import trainer
        from steersman.core.profile import load_profile
        from steersman.core.routing.collect import CollectSettings, collect, read_dataset
        from steersman.core.routing.router import save_router

        from ..batch_input import read_training
        from ..roles import open_model, open_roles

        trainer("router")  # before any text is written
        texts = read_training(prompts, lambda item: item.prompt, chat=chat, thing="prompts")
        settings = CollectSettings(
            labels=labels, max_tokens=max_tokens, continuation=continuation, checks=checks
        )
        with open_roles(model_args, load_profile("r2r"), envelope=envelope) as models:
            judging = None if judge is None else open_model(f"--judge {judge}", judge)
            with (
                ctrl_c_cancels() as cancel,
                output.progress(len(texts), label="collect", unit="text") as bar,
            ):
                done = collect(
                    work, texts, models["target"], models["small"], settings,
                    judge=judging, cancelled=cancel.is_set, progress=bar.update,
                )  # fmt: skip
            if done < len(texts):
                output.note(f"cancelled after {done} texts; the same command goes on from here")
                envelope.exit_code = 130
                return
            dataset = read_dataset(work, models["small"])
            facts = {r: models[r].info.fingerprint for r in ("small", "target")}
        router, history = _train(
            dataset, facts, labels, width, blocks, epochs, batch, learning_rate, recall, seed,
            train_device, model_args.threads,
        )  # fmt: skip
        save_router(router, out)
        report_training(
            envelope, out, history, kind="router", title="router", of="texts", facts=router.facts,
            result={"threshold": router.threshold, "parameters": router.shape.size},
            also=("threshold",),
        )  # fmt: skip


def _train(
    dataset: Any,
    fingerprints: dict[str, str],
    labels: str,
    width: int,
    blocks: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    recall: float,
    seed: int,
    device: str,
    threads: int | None,
) -> tuple[Router, list[tuple[int, float, float]]]:
    from steersman.core.backend import trainer
    from steersman.core.routing import Router, RouterShape

    shape = RouterShape(
        features=dataset.hidden.shape[1],
        top=dataset.top_logits.shape[1],
        width=width,
        blocks=blocks,
    )
    module = trainer("router")
    settings = module.RouterTraining(
        epochs=epochs, batch=batch, learning_rate=learning_rate, recall=recall, seed=seed
    )
    with output.progress(2 * epochs, label="train", unit="validation") as bar:
        found = module.train_router(
            dataset.top_logits, dataset.hidden, dataset.embedding, dataset.labels, dataset.texts,
            shape, settings, device=device, threads=threads, progress=lambda *_: bar.update(),
        )  # fmt: skip
    router = Router(
        shape=shape,
        weights=found.weights,
        threshold=found.threshold.value,
        small=fingerprints["small"],
        target=fingerprints["target"],
        facts={
            "labels": labels,
            "tokens": len(dataset.labels),
            "divergent": float(dataset.labels.mean()),
            "auc": found.auc,
            "recall": found.threshold.recall,
            "positive_rate": found.threshold.positive_rate,
            "seed": seed,
        },
    )
    return router, found.history
