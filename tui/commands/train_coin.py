"""``steersman train coin``: the matching heads of CoIn, on torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from steersman.core.errors import InvalidInput

from .. import common, output
from ..options import (
    WIDE,
    file_option,
    learning_rate_option,
    overwrite_option,
    refuse_existing,
    require_safetensors,
    whole,
)


@click.command("coin", context_settings=WIDE)
@file_option(
    "--traces",
    required=True,
    help='JSON lines: {"reasoning", "answer", "question"}; some hundred questions.',
)
@file_option("--out", required=True, help="The heads (.safetensors).")
@common.option(
    "--block",
    type=whole(1, 1 << 20),
    default=256,
    help="Tokens per block, as in audit commit [256].",
)
@common.option("--embedding-layer", type=whole(0, 4096), default=0, help="As in audit commit [0].")
@common.option("--epochs", type=whole(0, 10_000), default=3, help="Of each head [3].")
@common.option("--batch", type=whole(1, 1 << 20), default=128, help="[128].")
@learning_rate_option(1e-3, "Of Adam [1e-3].")
@common.option("--gamma", type=common.Finite(0, 100), default=2.0, help="Of the focal loss [2].")
@common.option(
    "--verdict-steps",
    type=whole(0, 1_000_000),
    default=300,
    help="Of the set network; 0: decide by the two means [300].",
)
@common.option(
    "--false-alarms",
    type=common.Finite(0.001, 0.5),
    default=0.05,
    help="Share of honest traces that the thresholds may reject [0.05].",
)
@common.option(
    "--share",
    type=common.Finite(1e-6, 1),
    default=0.1,
    help="Of the blocks that will be asked for [0.1].",
)
@common.option("--tokens", type=whole(1, 1 << 20), default=16, help="Of each such block [16].")
@common.option(
    "--centred",
    is_flag=True,
    help="Take the mean vector off before matching: sharper between topics, blind to "
    "random tokens.",
)
@common.option("--seed", type=whole(0, 2**63 - 1), default=42, help="[42].")
@overwrite_option("Replace heads that are there.")
@common.model_options
@common.output_options
def coin(
    traces: Path,
    out: Path,
    block: int,
    embedding_layer: int,
    overwrite: bool,
    model_args: common.ModelArgs,
    **settings: Any,
) -> None:
    """Train the heads that say whether tokens belong to their block and blocks to the answer.

    \b
    steersman train coin --traces traces.jsonl --block 32 --out coin.safetensors
    """  # fmt: skip
    with common.Envelope("train coin") as envelope:
        envelope.inputs = {"traces": traces, "out": out, "block": block, **settings}
        require_safetensors("--out", out)
        refuse_existing(out, overwrite=overwrite)
        from steersman.core.audit import Embedder
        from steersman.core.audit.traces import prepare, read_traces
        from steersman.core.backend import trainer
        from steersman.core.text_lines import open_text

        module = trainer("coin")
        with open_text(traces) as file:
            found = list(read_traces(file, str(traces)))
        if not found:
            raise InvalidInput(f"{traces}: holds no traces")
        with common.load_model(model_args, envelope=envelope) as model:
            embedder = Embedder(model, embedding_layer)
            with output.progress(len(found), label="embed", unit="trace") as bar:
                ready = []
                for trace in found:
                    ready.append(prepare(embedder, model.tokenizer, trace, block=block))
                    bar.update()
            total = 2 * settings["epochs"] + bool(settings["verdict_steps"])
            with output.progress(total, label="train", unit="epoch") as bar:
                heads, history = module.train_coin(
                    ready, embedder, module.CoinTraining(**settings),
                    threads=model_args.threads, progress=lambda *_: bar.update(),
                )  # fmt: skip
        heads.save(out)
        envelope.artifacts = {"heads": out}
        envelope.metrics = {k: v for k, v in heads.facts.items() if k != "settings"}
        envelope.result = {"thresholds": dict(heads.thresholds), "history": history}
        if not envelope.json:
            rows = [
                [k, v if isinstance(v, int) else f"{v:.3f}"] for k, v in envelope.metrics.items()
            ]
            rows += [[f"threshold {k}", f"{v:.3f}"] for k, v in heads.thresholds.items()]
            print(output.table(rows, header=["on held-out questions", ""]))
            output.note(f"heads: {out}")
