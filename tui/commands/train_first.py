"""``steersman train first``: a reranker from ranked windows of passages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import InvalidInput, UsageError

from .. import common, output
from ..interrupts import ctrl_c_cancels
from ..options import WIDE, file_option, learning_rate_option, whole

if TYPE_CHECKING:
    from steersman.core.reranking.encoding import PromptEncoder
    from steersman.core.reranking.examples import EncodedExample


def _option(*names: str, **settings: Any) -> Any:
    return common.option(*names, envvar=None, **settings)


_DATA = (
    file_option("--data", "data", multiple=True, required=True,
                help="JSON lines: query, passages, and ranking (places, best first) or relevance "
                "(numbers). May be given several times."),
    file_option("--out", required=True, metavar="FOLDER",
                help="Gets adapter/ (or model/), checkpoint/, losses.jsonl and loss.svg; a stopped "
                "run goes on."),
    file_option("--prompt-file",
                help="YAML with the wording, as for rerank; kept with the adapter."),
    _option("--max-words", type=whole(1), default=100, help="Words kept of each passage [100]."),
    _option("--max-length", type=whole(16), default=2048,
            help="Tokens of an example; passages are cut further where needed [2048]."),
)  # fmt: skip

_TRAINING = (
    _option("--loss", type=click.Choice(["ranknet", "ranknet-unweighted", "lambdarank", "listnet"]),
            default="ranknet", help="Ranking loss [ranknet, weighted]."),
    _option("--ranking-weight", type=common.Finite(0, 1e6),
            help="Of the ranking loss beside the language-model loss [10, 1, 1, 0.1]."),
    _option("--lm-weight", type=common.Finite(0, 1e6), default=1.0,
            help="Of the language-model loss on the written ranking [1]."),
    _option("--steps", type=whole(1), help="Updates [one round through the data]."),
    _option("--batch", type=whole(1), default=1, help="Examples per pass [1]."),
    _option("--accumulation", type=whole(1), default=8, help="Passes per update [8]."),
    learning_rate_option(2e-4, "Of AdamW; a full fine-tune wants less, 5e-6 in the paper [2e-4].",
                         envvar=None),
    _option("--warmup", type=whole(0), default=20, help="Updates of linear warm-up [20]."),
    _option("--weight-decay", type=common.Finite(0, 10), default=0.0, help="[0]."),
    _option("--neftune", type=common.Finite(0, 1000), default=0.0,
            help="Noise on the embeddings; 5 in the paper [0]."),
    _option("--lora-rank", type=whole(0, 4096), default=16,
            help="Of the adapter; 0 trains all weights [16]."),
    _option("--lora-alpha", type=whole(1), help="[twice the rank]."),
    _option("--last-layers", type=whole(1), help="Train only the last N layers [all]."),
    _option("--checkpointing", is_flag=True,
            help="Compute activations twice instead of keeping them: less memory, more time."),
    _option("--save-every", type=whole(1), default=25, help="Updates between checkpoints [25]."),
    _option("--seed", type=whole(0), default=42, help="[42]."),
)  # fmt: skip


@click.command("first", context_settings=WIDE)
@common.stack(*_DATA, *_TRAINING)
@common.model_options
@common.output_options
def first(model_args: common.ModelArgs, data: tuple[Path, ...], out: Path, **given: Any) -> None:
    """Train a reranker with the FIRST objective: a language-model loss on the written ranking plus
    a ranking loss on the logits of the first letter.

    \b
    steersman train first --data windows.jsonl --out first/
    steersman rerank --adapter first/adapter --requests-file in.jsonl

    Several processes (torchrun, accelerate launch) share each update's examples.
    """  # fmt: skip
    with common.Envelope("train first") as envelope:
        envelope.inputs = {"data": list(data), "out": out} | {
            k: v for k, v in given.items() if v not in (None, False)
        }
        if model_args.layers is not None or model_args.adapter is not None:
            raise UsageError("--layers and --adapter do not go with train first")
        for value in (model_args.backend, model_args.device):
            if value not in (None, "auto", "torch", "cpu", "cuda"):
                raise UsageError(f"{value}: training runs on torch, on cpu or cuda")
        _run(model_args, data, out, given, envelope)


def _run(
    model_args: common.ModelArgs,
    data: tuple[Path, ...],
    out: Path,
    given: dict[str, Any],
    envelope: common.Envelope,
) -> None:
    from steersman.core.backend import trainer
    from steersman.core.locate import locate
    from steersman.core.reranking.encoding import PromptEncoder
    from steersman.core.reranking.prompt import Prompt, read_prompt

    wording = Prompt() if given["prompt_file"] is None else read_prompt(given["prompt_file"])
    module = trainer("first")
    source = locate(model_args.model or common.DEFAULT_MODEL, offline=model_args.offline)
    base = module.open_base(source, threads=model_args.threads, device=model_args.device)
    encoder = PromptEncoder(base.tokenizer, wording)
    examples, skipped = _examples(data, encoder, given["max_words"], given["max_length"])
    if skipped:
        envelope.warn(f"{skipped} examples are too long for --max-length and were left out")
    settings = _settings(module, given, len(examples))
    with ctrl_c_cancels() as cancel:
        model = module.open_trainable(base.folder, settings)
        done = module.steps_done(out)
        with output.progress(settings.steps, label="train", unit="update", done=done) as bar:
            history = module.train_first(
                model,
                examples,
                settings,
                out,
                base=base,
                report=lambda _: bar.update(),
                cancelled=cancel.is_set,
            )
    if not base.main:
        return
    _results(module, model, base, settings, history, out, given, examples, envelope, wording)


def _examples(
    files: Sequence[Path], encoder: PromptEncoder, max_words: int, max_length: int
) -> tuple[list[EncodedExample], int]:
    from steersman.core.reranking.examples import encode_example, read_examples

    found, skipped = [], 0
    for path in files:
        for example in read_examples(path):
            try:
                found.append(
                    encode_example(encoder, example, max_words=max_words, max_tokens=max_length)
                )
            except InvalidInput:
                skipped += 1
    if not found:
        names = ", ".join(map(str, files))
        raise InvalidInput(f"{names}: no example fits into --max-length {max_length}")
    return found, skipped


def _settings(module: Any, given: dict[str, Any], examples: int) -> Any:
    names = (
        "loss", "ranking_weight", "lm_weight", "learning_rate", "weight_decay", "warmup", "batch",
        "accumulation", "lora_rank", "last_layers", "neftune", "checkpointing", "save_every",
        "seed",
    )  # fmt: skip
    rank = given["lora_rank"]
    per_update = given["batch"] * given["accumulation"]
    return module.FirstTraining(
        **{name: given[name] for name in names},
        lora_alpha=given["lora_alpha"] or max(2 * rank, 1),
        steps=given["steps"] or max(1, examples // per_update),
    )


def _results(
    module: Any,
    model: Any,
    base: Any,
    settings: Any,
    history: Sequence[Any],
    out: Path,
    given: dict[str, Any],
    examples: Sequence[EncodedExample],
    envelope: common.Envelope,
    wording: Any,
) -> None:
    from importlib.util import find_spec

    envelope.metrics = {
        "updates": len(history),
        "of": settings.steps,
        "examples": len(examples),
        "loss": history[-1].loss if history else None,
        "ranking_loss": history[-1].ranking if history else None,
    }
    if find_spec("matplotlib") is not None and history:
        from ..training_plot import write_loss_plot

        envelope.artifacts["plot"] = out / "loss.svg"
        write_loss_plot(out / "loss.svg", [(h.step, h.loss, None) for h in history], title="FIRST")
    envelope.artifacts["losses"] = out / "losses.jsonl"
    if len(history) < settings.steps:
        output.note(f"cancelled after update {len(history)}; the same command goes on from here")
        envelope.exit_code = 130
        return
    if settings.lora_rank:
        made = out / "adapter"
        module.save_adapter(model, made, base=base.name)
    else:
        made = out / "model"
        module.save_merged(model, base.folder, made)
    _describe(made, base, settings, given, examples, wording)
    envelope.artifacts["adapter" if settings.lora_rank else "model"] = made
    envelope.note_artifacts()


def _describe(
    folder: Path,
    base: Any,
    settings: Any,
    given: dict[str, Any],
    examples: Sequence[EncodedExample],
    wording: Any,
) -> None:
    """Leave beside the weights what a reranker has to know."""
    from dataclasses import asdict

    from steersman.core.adapters import PROMPT, RerankSettings, write_note
    from steersman.core.whole_file import whole_file

    # JSON is YAML, and needs no dumper that keeps line ends.
    with whole_file(folder / PROMPT) as file:
        file.write((json.dumps(asdict(wording), indent=1) + "\n").encode())
    write_note(
        folder,
        RerankSettings(
            window_size=max(len(e.letters) for e in examples), max_words=given["max_words"]
        ),
        {
            "base": {"name": base.name, "fingerprint": base.fingerprint},
            "training": {"examples": len(examples), **asdict(settings)},
        },
    )
