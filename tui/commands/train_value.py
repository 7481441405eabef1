"""``steersman train value``: a value head from a model's own texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import InvalidInput, UsageError

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

if TYPE_CHECKING:
    from steersman.core.values.rollouts import Question, Rollout, RolloutSettings


@click.command("value", context_settings=WIDE)
@common.option(
    "--data",
    required=True,
    metavar="FILE",
    envvar=None,
    help='Lines as generate --jsonl takes them, each with an "answer" beside the prompt.',
)
@common.option("--chat", is_flag=True, help="Send prompts as chat messages.")
@file_option(
    "--work",
    required=True,
    metavar="FOLDER",
    help="Texts, hidden states and the checkpoint are kept here; a stopped run goes on.",
)
@file_option("--out", required=True, help="The head (.safetensors).")
@common.option(
    "--samples", type=whole(2, 10_000), default=32, help="Texts per question; OVM has 100 [32]."
)
@common.option("--rows", type=whole(1, 256), default=16, help="Sampled side by side [16].")
@common.option("-n", "--max-tokens", type=whole(1, 1 << 20), default=24, help="Of a text [24].")
@common.option(
    "--temperature",
    type=common.Finite(0.01, 100),
    default=0.7,
    help="Texts are sampled with; decode with the same [0.7].",
)
@common.option("--top-k", type=whole(0), default=50, help="Likewise; 0: all tokens [50].")
@common.option(
    "--match",
    type=click.Choice(["number", "text"]),
    default="number",
    help="A text is right if its last number is the answer's, or if it is the answer [number].",
)
@common.option(
    "--labels",
    type=click.Choice(["token", "outcome", "step"]),
    default="token",
    help="Of a token: share of right texts among those that begin so; its own text's outcome; "
    "whether its step can still end well [token].",
)
@common.option("--delimiter", default="\n", help="Ends a step, for --labels step [newline].")
@common.option("--layer", type=whole(0, 10_000), help="Hidden state that is read [the last].")
@common.option("--width", type=whole(0, 65_536), default=0, help="Hidden units; 0: linear [0].")
@common.option("--epochs", type=whole(1, 100_000), default=40, help="[40].")
@common.option("--batch", type=whole(1), default=256, help="Prefixes per step [256].")
@learning_rate_option(1e-3, "[1e-3].")
@common.option("--dropout", type=common.Finite(0, 0.99), default=0.2, help="[0.2].")
@common.option(
    "--validation",
    type=common.Finite(0, 0.9),
    default=0.1,
    help="Share of the questions that is held out [0.1].",
)
@common.option("--seed", type=whole(0, 2**62), default=0, help="[0].")
@train_device_option
@overwrite_option("Replace a head that is there.")
@common.model_options
@common.output_options
def value(
    data: str,
    chat: bool,
    work: Path,
    out: Path,
    samples: int,
    rows: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    match: Any,
    labels: Any,
    delimiter: str,
    layer: int | None,
    width: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    dropout: float,
    validation: float,
    seed: int,
    train_device: str,
    overwrite: bool,
    model_args: common.ModelArgs,
) -> None:
    """Train a value head: how likely a text begun so is to end with the right answer.

    The model answers every question several times; each token is labelled with the share of right
    texts among those that begin the same; a small head learns these from the hidden states. The
    model itself stays as it is, so the head serves every engine that opens the same weights.

    \b
    steersman train value --data sums.jsonl --chat --work values/ --out head.safetensors
    steersman generate --profile value-beam -o value_beam.value_file=head.safetensors -p "..."
    """  # fmt: skip
    with common.Envelope("train value") as envelope:
        envelope.inputs = {"data": data, "work": work, "out": out, "labels": labels}
        refuse_existing(out, overwrite=overwrite)
        require_safetensors("--out", out)
        if labels == "step" and not delimiter:
            raise UsageError("--delimiter: must not be empty with --labels step")
        from steersman.core.backend import trainer
        from steersman.core.values import ValueHead, ValueShape, save_value_head
        from steersman.core.values.features import extract, read_dataset
        from steersman.core.values.rollouts import RolloutSettings, read_rollouts, roll_out

        module = trainer("value")  # before any text is written
        questions = read_questions(data, chat)
        settings = RolloutSettings(
            samples=samples, rows=rows, max_tokens=max_tokens, temperature=temperature,
            top_k=top_k, match=match, seed=seed,
        )  # fmt: skip
        training = module.ValueTraining(
            learning_rate=learning_rate, batch=batch, epochs=epochs, dropout=dropout,
            validation=validation, seed=seed,
        )  # fmt: skip
        with ctrl_c_cancels() as cancel:
            with common.load_model(model_args, envelope=envelope) as model:
                chosen = model.info.layers if layer is None else layer
                if chosen > model.info.layers:
                    raise UsageError(
                        f"--layer {chosen}: {model.info.name} has hidden states 0 to "
                        f"{model.info.layers}"
                    )
                with output.progress(len(questions), label="sample", unit="question") as bar:
                    done = roll_out(
                        work, questions, model, settings,
                        cancelled=cancel.is_set, progress=bar.update,
                    )  # fmt: skip
                rollouts = list(read_rollouts(work))[: len(questions)]
                if done == len(questions):
                    with output.progress(done, label="read", unit="question") as bar:
                        done = extract(
                            work, rollouts, model, layer=chosen,
                            cancelled=cancel.is_set, progress=bar.update,
                        )  # fmt: skip
                steps = frozenset(
                    i for i in range(model.info.vocab_size)
                    if labels == "step" and delimiter.encode() in model.tokenizer.token_bytes(i)
                )  # fmt: skip
                fingerprint, features = model.info.fingerprint, model.info.width
            found = None
            if done == len(questions):
                dataset = read_dataset(
                    work, rollouts, layer=chosen, labels=labels, step_tokens=steps
                )
                shape = ValueShape(features=features, width=width)
                job = {
                    "model": fingerprint, "layer": chosen, "labels": labels,
                    "delimiter": delimiter if labels == "step" else "", "questions": done,
                    "prefixes": len(dataset.hidden),
                }  # fmt: skip
                with output.progress(epochs, label="train", unit="epoch") as bar:
                    found = module.train_value(
                        dataset, shape, training, _run_folder(work, job, training), job=job,
                        device=train_device, threads=model_args.threads,
                        progress=lambda *_: bar.update(), cancelled=cancel.is_set,
                    )  # fmt: skip
        if found is None:
            output.note("cancelled; the same command goes on from here")
            envelope.exit_code = 130
            return
        head = ValueHead(
            shape=shape,
            weights=found.weights,
            layer=chosen,
            model=fingerprint,
            facts=_facts(rollouts, settings, job, found),
        )
        save_value_head(head, out)
        report_training(
            envelope, out, found.history, kind="head", title="value head", of="questions",
            facts=head.facts, result={"layer": head.layer, "parameters": head.shape.size},
        )  # fmt: skip


def read_questions(name: str, chat: bool) -> list[Question]:
    """Return the questions of a JSONL file.

    Raises
    ------
    InvalidInput
        A line is not a prompt with an answer; file and line are named.
    """
    from steersman.core.values.rollouts import Question

    from ..batch_input import Item, read_training

    def take(item: Item) -> Question:
        answer = item.passed.get("answer")
        if not isinstance(answer, str | int) or isinstance(answer, bool):
            raise InvalidInput(f"answer: must be a text or a number, got {answer!r}")
        return Question(prompt=item.prompt, answer=str(answer))

    return read_training(name, take, chat=chat, thing="questions")


def _run_folder(work: Path, job: Any, training: Any) -> Path:
    """Return the folder of this training's checkpoint; other settings have their own."""
    import hashlib
    from dataclasses import asdict

    said = json.dumps([job, asdict(training)], sort_keys=True)
    folder = work / "training" / hashlib.sha256(said.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _facts(
    rollouts: list[Rollout], settings: RolloutSettings, job: Any, found: Any
) -> dict[str, Any]:
    from steersman.core.values import prefix_tree

    depths = [prefix_tree(r.texts, r.right).sharing_depth for r in rollouts]
    right = [sum(r.right) / len(r.right) for r in rollouts]
    return {
        "labels": job["labels"],
        "questions": job["questions"],
        "samples": settings.samples,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "prefixes": job["prefixes"],
        "right": round(sum(right) / len(right), 6),
        "sharing_depth": round(sum(depths) / len(depths), 3),
        "error": round(found.error, 6),
        "error_of_a_constant": round(found.constant, 6),
        "auc": None if found.auc != found.auc else round(found.auc, 6),
        "seed": settings.seed,
    }
