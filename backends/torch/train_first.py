"""Training a reranker with the FIRST objective: language-model loss plus a ranking loss."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman.backends.files.convert import as_hf_folder
from steersman.backends.files.tokenizer import open_tokenizer
from steersman.core.errors import InvalidInput, MissingDependency, UsageError
from steersman.core.fingerprint import weights_fingerprint
from steersman.core.locate import ModelSource
from steersman.core.objectives import lambdarank, listnet, ranknet
from steersman.core.reranking.examples import EncodedExample

from .linear_cross_entropy import IGNORE, linear_cross_entropy

RankingLoss = Literal["ranknet", "ranknet-unweighted", "lambdarank", "listnet"]
LOSSES: dict[str, tuple[Callable[..., Tensor], float]] = {
    # With the factor that the released code gives each beside the language-model loss.
    "ranknet": (ranknet, 10.0),
    "ranknet-unweighted": (lambda s, r: ranknet(s, r, weighted=False), 1.0),
    "lambdarank": (lambdarank, 1.0),
    "listnet": (listnet, 0.1),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class FirstTraining:
    """Settings; the defaults suit a small model, the paper's are named.

    Parameters
    ----------
    loss : {"ranknet", "ranknet-unweighted", "lambdarank", "listnet"}
    ranking_weight : float, optional
        Of the ranking loss; that of the released code if None (10, 1, 1 and 0.1).
    lm_weight : float
        Of the language-model loss on the written-out ranking; 0 leaves it out.
    learning_rate, weight_decay, warmup, clip : float
        AdamW with cosine decay, ``warmup`` steps, gradients cut at norm ``clip``. The paper's full
        fine-tune takes 5e-6, LoRA wants more.
    steps : int
        Updates.
    batch, accumulation : int
        Examples per pass and passes per update.
    lora_rank, lora_alpha : int
        Rank 0 trains all weights.
    last_layers : int, optional
        Train only that many of the last layers (and, without LoRA, the final norm and the head
        that is not tied); the backward pass ends at the first of them. All if None.
    neftune : float
        Noise on the embeddings in training, the paper's is 5; 0 is none.
    checkpointing : bool
        Compute activations again in the backward pass instead of keeping them.
    save_every : int
        Updates between checkpoints.
    seed : int
    """

    loss: RankingLoss = "ranknet"
    ranking_weight: float | None = None
    lm_weight: float = 1.0
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup: int = 20
    clip: float = 1.0
    steps: int = 200
    batch: int = 1
    accumulation: int = 8
    lora_rank: int = 16
    lora_alpha: int = 32
    last_layers: int | None = None
    neftune: float = 0.0
    checkpointing: bool = False
    save_every: int = 25
    seed: int = 42

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UsageError(f"--loss {self.loss!r}: must be one of {', '.join(LOSSES)}")
        for name in ("steps", "batch", "accumulation", "save_every", "last_layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name}: must be at least 1, got {getattr(self, name)}")

    @property
    def factor(self) -> float:
        """Weight of the ranking loss."""
        return LOSSES[self.loss][1] if self.ranking_weight is None else self.ranking_weight


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model below a training, and where to compute.

    Attributes
    ----------
    name, fingerprint : str
        What is called so, and what identifies its weights.
    folder : Path
        As a Hugging Face folder.
    tokenizer : Tokenizer
    accelerator : accelerate.Accelerator or None
        With several processes (torchrun, accelerate launch) or a GPU.
    """

    name: str
    fingerprint: str
    folder: Path
    tokenizer: Any
    accelerator: Any = None

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes the results."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)


def open_base(
    source: ModelSource, *, threads: int | None = None, device: str | None = None
) -> Base:
    """Return what a training starts from.

    Parameters
    ----------
    source : ModelSource
        A GGUF file is converted first.
    threads : int, optional
        CPU threads of the whole process.
    device : {"auto", "cpu", "cuda"}, optional
        "auto" takes a GPU if there is one.

    Raises
    ------
    MissingDependency
        A GPU is asked for and absent, or accelerate is needed and not installed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("--device cuda: torch finds no GPU; use --device cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    accelerator = None
    if on_gpu or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            from accelerate import Accelerator  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise MissingDependency(
                'accelerate: not installed; run: pip install "steersman[train]"'
            ) from None
        accelerator = Accelerator(cpu=not on_gpu)
    folder = as_hf_folder(source)
    return Base(
        name=source.name,
        fingerprint=weights_fingerprint(source.path),
        folder=folder,
        tokenizer=open_tokenizer(folder),
        accelerator=accelerator,
    )


def steps_done(folder: Path) -> int:
    """Return the updates that a training folder holds."""
    try:
        return len((folder / "losses.jsonl").read_text().splitlines())
    except OSError:
        return 0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Losses of one update, means over its examples."""

    step: int
    loss: float
    lm: float
    ranking: float
    learning_rate: float


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


class FirstObjective(torch.nn.Module):  # type: ignore[misc,unused-ignore]
    """A model with its training loss as the forward pass, so that wrappers see all of it.

    Parameters
    ----------
    model : transformers model, or one with peft adapters
    settings : FirstTraining
    """

    def __init__(self, model: Any, settings: FirstTraining) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective of a batch (a scalar with gradients) and its two parts.

        ``lm_weight * L_LM + factor * L_rank``: the mean cross-entropy of the written-out ranking,
        and the ranking loss of the letters' logits after the opening bracket. Logits of the
        vocabulary are never held for all positions.
        """
        settings = self.settings
        device = next(self.model.parameters()).device
        ids, labels, mask = (part.to(device) for part in _padded(examples))
        model = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        embedded = base.get_input_embeddings()(ids)
        if settings.neftune and model.training:
            bound = settings.neftune / math.sqrt(ids.shape[1] * embedded.shape[-1])
            noise = torch.empty_like(embedded).uniform_(-bound, bound)
            embedded = embedded + noise * mask[..., None]
        hidden = base.get_decoder()(
            inputs_embeds=embedded, attention_mask=mask, use_cache=False
        ).last_hidden_state
        head = base.get_output_embeddings().weight
        ranking = hidden.new_zeros(())
        loss_of, _ = LOSSES[settings.loss]
        for row, example in enumerate(examples):
            letters = torch.tensor(example.letters, device=device)
            scores = head[letters] @ hidden[row, example.place]
            ranking = ranking + loss_of(scores.float(), torch.tensor(example.ranks, device=device))
        ranking = ranking / len(examples)
        lm = hidden.new_zeros(())
        if settings.lm_weight:
            lm = linear_cross_entropy(hidden, head, labels, shift=1)
        total = settings.lm_weight * lm + settings.factor * ranking
        return total, lm.detach(), ranking.detach()


def _padded(examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORE)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        labels[row, :size] = torch.tensor(example.labels)
        mask[row, :size] = 1
    return ids, labels, mask


def first_loss(
    model: Any, examples: Sequence[EncodedExample], settings: FirstTraining
) -> tuple[Tensor, float, float]:
    """Return the objective of a batch and its two parts: see :class:`FirstObjective`."""
    total, lm, ranking = FirstObjective(model, settings)(examples)
    return total, float(lm), float(ranking)


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
    team = _Team(None if base is None else base.accelerator)
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
    history = _resume(folder, job, trained, optimizer)
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
            _save(folder, job, trained, optimizer, history)
    if team.place == 0:
        _save(folder, job, trained, optimizer, history)
    model.eval()
    return history


class _Team:
    """One process alone, or several under accelerate: the few things that differ."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.size = 1 if accelerator is None else int(accelerator.num_processes)
        self.place = 0 if accelerator is None else int(accelerator.process_index)

    def prepare(self, objective: torch.nn.Module) -> Any:
        return objective if self._accelerator is None else self._accelerator.prepare(objective)

    def together(self, objective: Any, last: bool) -> Any:
        """Gradients are exchanged in the last pass of an update only."""
        if self._accelerator is None or last:
            return nullcontext()
        return self._accelerator.no_sync(objective)

    def backward(self, loss: Tensor) -> None:
        if self._accelerator is None:
            loss.backward()
        else:
            self._accelerator.backward(loss)

    def sum(self, values: Tensor) -> Tensor:
        if self.size == 1:
            return values
        accelerator = self._accelerator
        found: Tensor = accelerator.reduce(values.to(accelerator.device), "sum")
        return found.cpu()

    def any(self, said: bool) -> bool:
        return bool(self.sum(torch.tensor([float(said)]))[0])


def _save(
    folder: Path,
    job: Any,
    trained: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    history: Sequence[StepReport],
) -> None:
    """Write a checkpoint beside the old one, then put it in its place."""
    fresh, held, old = (folder / n for n in ("checkpoint.part", "checkpoint", "checkpoint.old"))
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    fresh.mkdir(parents=True)
    names = list(trained)
    save_file(
        {n: p.detach().cpu().contiguous() for n, p in trained.items()},
        fresh / "weights.safetensors",
    )
    state = optimizer.state_dict()["state"]
    moments = {
        f"{names[i]}.{key}": value.detach().cpu().contiguous()
        for i, entry in state.items()
        for key, value in entry.items()
    }
    save_file(moments, fresh / "optimizer.safetensors")
    lines = [asdict(entry) for entry in history]
    (fresh / "progress.json").write_text(json.dumps({"job": job, "history": lines}))
    if held.exists():
        os.replace(held, old)
    os.replace(fresh, held)
    shutil.rmtree(old, ignore_errors=True)
    part = folder / "losses.part"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(part, folder / "losses.jsonl")


def _resume(
    folder: Path, job: Any, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[StepReport]:
    held = folder / "checkpoint"
    if not held.exists() and (folder / "checkpoint.old").exists():
        os.replace(folder / "checkpoint.old", held)  # stopped between the two renames
    if not held.exists():
        return []
    try:
        progress = json.loads((held / "progress.json").read_text())
        weights = load_file(held / "weights.safetensors")
        moments = load_file(held / "optimizer.safetensors")
    except Exception as error:
        raise InvalidInput(f"{held}: damaged ({error}); delete it to begin anew") from None
    made = progress["job"]
    if made != job:
        settings = made.get("settings", {})
        other = [k for k, v in job["settings"].items() if settings.get(k) != v]
        other += [k for k in ("examples", "tokens", "base") if made.get(k) != job[k]]
        raise UsageError(
            f"{folder}: holds a training with another {', '.join(other)}; use another folder"
        )
    if set(weights) != set(trained):
        raise InvalidInput(f"{held}: its weights are not those of this model; use another folder")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(trained):
        entry = {
            key: moments[f"{name}.{key}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{name}.{key}" in moments
        }
        if entry:
            state[i] = entry
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return [StepReport(**line) for line in progress["history"]]


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
