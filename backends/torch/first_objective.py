"""The FIRST objective: language-model loss on the written ranking plus a ranking loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.core.errors import UsageError
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
