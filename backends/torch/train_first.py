"""Training a reranker with the FIRST objective: language-model loss plus a ranking loss."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steersman.core.errors import InvalidInput, MissingDependency, UsageError
from steersman.core.reranking.examples import EncodedExample

from .checkpoint import StepReport, resume_checkpoint, save_checkpoint, steps_done
from .first_objective import FirstObjective, FirstTraining, first_loss
from .training_base import Base, Team, open_base

__all__ = [
    "Base",
    "FirstTraining",
    "StepReport",
    "batches",
    "first_loss",
    "learning_rate",
    "open_base",
    "open_trainable",
    "save_adapter",
    "save_merged",
    "steps_done",
    "train_first",
]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def open_trainable(folder: Path, settings: FirstTraining) -> Any:
    """Return the model of a Hugging Face folder, with LoRA adapters if wanted.

    Raises
    ------
    MissingDependency
        peft is not installed.
    InvalidInput
        transformers cannot open the folder.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InvalidInput(f"{folder}: transformers cannot open it ({first})") from error
    if settings.lora_rank:
        try:
            import peft
        except ImportError:
            raise MissingDependency(
                'peft: not installed; run: pip install "steersman[train]", or train all weights '
                "with --lora-rank 0"
            ) from None
        torch.manual_seed(settings.seed)
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                target_modules=TARGETS,
                layers_to_transform=_last_layers(model, settings),
                task_type="CAUSAL_LM",
            ),
        )
    elif settings.last_layers is not None:
        kept = {f"layers.{i}." for i in _last_layers(model, settings) or ()}
        embeddings = model.get_input_embeddings().weight
        for name, parameter in model.named_parameters():
            inside = any(part in name for part in kept)
            outside = ".layers." not in name and parameter is not embeddings
            parameter.requires_grad_(inside or outside)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _last_layers(model: Any, settings: FirstTraining) -> list[int] | None:
    if settings.last_layers is None:
        return None
    total = int(model.config.num_hidden_layers)
    if settings.last_layers > total:
        raise UsageError(f"--last-layers {settings.last_layers}: the model has {total}")
    return list(range(total - settings.last_layers, total))


def batches(count: int, settings: FirstTraining, *, update: int) -> Iterator[list[int]]:
    """Yield the examples of each pass of one update; a pure function of seed and update.

    Every example is seen once before any is seen again; the order of each round is its own.
    """
    per_update = settings.batch * settings.accumulation
    begin = update * per_update
    chosen = []
    for position in range(begin, begin + per_update):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        chosen.append(int(torch.randperm(count, generator=generator)[place]))
    for i in range(0, per_update, settings.batch):
        yield chosen[i : i + settings.batch]


def learning_rate(settings: FirstTraining, update: int) -> float:
    """Return the rate of an update: linear warm-up, then a cosine to 0."""
    if update < settings.warmup:
        return settings.learning_rate * (update + 1) / settings.warmup
    span = max(settings.steps - settings.warmup, 1)
    share = min((update - settings.warmup) / span, 1.0)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def train_first(
    model: Any,
    examples: Sequence[EncodedExample],
    settings: FirstTraining,
    folder: Path,
    *,
    base: Base | None = None,
    report: Callable[[StepReport], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[StepReport]:
    """Train; what is in ``folder`` goes on from where it stopped, with the same losses.

    Parameters
    ----------
    model : transformers model, or one with peft adapters
    examples : sequence of EncodedExample
    settings : FirstTraining
    folder : Path
        ``checkpoint/`` (weights that are trained, optimizer and progress) and ``losses.jsonl``.
    base : Base, optional
        Where to compute, alone or with other processes; this process's CPU if None.
    report : callable
        Called after every update.
    cancelled : callable
        Polled between updates; a checkpoint is written then.

    Returns
    -------
    list of StepReport
        Of all updates so far, earlier runs included.

    Raises
    ------
    UsageError
        The folder belongs to a training with other settings or data.
    """
    if not examples:
        raise InvalidInput("train first: no examples")
    team = Team(None if base is None else base.accelerator)
    if settings.accumulation % team.size:
        raise UsageError(
            f"accumulation: {settings.accumulation} passes cannot be shared by "
            f"{team.size} processes"
        )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    # Longer runs and other save points leave the losses as they are; all else must be the same.
    facts = {k: v for k, v in asdict(settings).items() if k != "save_every"}
    job = {
        "settings": facts,
        "examples": len(examples),
        "tokens": sum(len(e.ids) for e in examples),
        "base": "" if base is None else base.fingerprint,
    }
    objective = team.prepare(FirstObjective(model, settings))
    history = resume_checkpoint(folder, job, trained, optimizer)
    model.train()
    for update in range(len(history), settings.steps):
        if team.any(cancelled()):
            break
        # Dropout and noise are the same after a resume, and others in each process.
        torch.manual_seed((settings.seed + update) * team.size + team.place)
        rate = learning_rate(settings, update)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        sums = torch.zeros(3)
        passes = list(batches(len(examples), settings, update=update))[team.place :: team.size]
        for number, chosen in enumerate(passes, start=1):
            with team.together(objective, number == len(passes)):
                loss, lm, ranking = objective([examples[i] for i in chosen])
                if not torch.isfinite(loss):
                    # It would spoil the weights for good; the other processes still wait for it.
                    loss = torch.stack([p.sum() * 0 for p in trained.values()]).sum()
                team.backward(loss * (team.size / settings.accumulation))
            sums += torch.stack([loss.detach(), lm, ranking]).cpu() / settings.accumulation
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)
        optimizer.step()
        total, lm_mean, ranking_mean = team.sum(sums).tolist()
        done = StepReport(
            step=update + 1, loss=total, lm=lm_mean, ranking=ranking_mean, learning_rate=rate
        )
        history.append(done)
        report(done)
        if (update + 1) % settings.save_every == 0 and team.place == 0:
            save_checkpoint(folder, job, trained, optimizer, history)
    if team.place == 0:
        save_checkpoint(folder, job, trained, optimizer, history)
    model.eval()
    return history


def save_adapter(model: Any, folder: Path, *, base: str) -> None:
    """Write the adapters of a peft model, in float16, beside what is in ``folder``.

    Parameters
    ----------
    model : peft model
    folder : Path
        Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    base : str
        Name of the model below, for the config.
    """
    import peft

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().cpu().to(torch.float16).contiguous()
        for name, value in peft.get_peft_model_state_dict(model).items()
    }
    part = folder / "adapter_model.part"
    save_file(weights, part, metadata={"format": "pt"})
    os.replace(part, folder / "adapter_model.safetensors")
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)


def save_merged(model: Any, source: Path, folder: Path) -> None:
    """Write the trained model as a Hugging Face folder that every engine opens.

    Adapters are merged into the weights; config, tokenizer and template are copied from ``source``.
    """
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    merged.save_pretrained(part, safe_serialization=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and not path.name.startswith("model"):
            shutil.copyfile(path, part / path.name)
    os.replace(part, folder)
