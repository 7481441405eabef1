#!/usr/bin/env python3
"""Train a tiny block-diffusion model in minutes on one core, to try the strategy on.

    scripts/train_tiny_block.py                        # writes out/tiny-block
    steersman generate out/tiny-block --backend torch --profile block-diffusion ...

The model sorts letters: after "qhbaa...>" it writes the same letters in order. It is trained
left to right first, then adapted as NBDiff does (Tian et al., arXiv:2512.06776): a noised copy of
the answer, whose blocks see themselves both ways and everything clean before them, learns to fill
masked positions beside the usual loss, and blocks grow from 2 to 16.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

LETTERS = 12
ANSWER = 16  # positions of the answer, end tokens after the letters
EOS, MASK, FIRST = 0, 1, 2  # ids: two control tokens, then bytes in their own order
ROOT = Path(__file__).resolve().parent.parent


def task(rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its answer."""
    letters = [chr(97 + rng.randrange(26)) for _ in range(LETTERS)]
    return "".join(letters) + ">", "".join(sorted(letters))


def example(rng: random.Random) -> list[int]:
    """Return the ids of a prompt and its answer, filled up with end tokens."""
    prompt, answer = task(rng)
    ids = [FIRST + byte for byte in (prompt + answer).encode()]
    return ids + [EOS] * (LETTERS + 1 + ANSWER - len(ids))


def attention(block: int) -> Any:
    """Return which positions see which: prompt and answer, then the noised answer; bool (T, T)."""
    import torch

    clean = LETTERS + 1 + ANSWER
    seen = torch.zeros(clean + ANSWER, clean + ANSWER, dtype=torch.bool)
    seen[:clean, :clean] = torch.ones(clean, clean, dtype=torch.bool).tril()
    number = torch.arange(ANSWER) // block
    seen[clean:, : LETTERS + 1] = True
    seen[clean:, LETTERS + 1 : clean] = number[None, :] < number[:, None]
    seen[clean:, clean:] = number[None, :] == number[:, None]
    return seen


def losses(model: Any, ids: Any, block: int) -> tuple[Any, Any]:
    """Return the masked and the left-to-right loss of a batch (B, T); no noise for block 1.

    Outputs are shifted: the one at a position predicts the next. A block's first position is
    never masked, since decoding takes it from the left-to-right head.
    """
    import torch
    import torch.nn.functional as F

    begin = LETTERS + 1
    clean = begin + ANSWER
    place = torch.arange(clean)
    if block == 1:
        seen = torch.ones(clean, clean, dtype=torch.bool).tril()
        fed, masked = ids, None
    else:
        seen = attention(block)
        place = torch.cat([place, place[begin:]])
        rate = torch.rand(len(ids), 1)
        masked = torch.rand(len(ids), ANSWER) < rate
        masked &= torch.arange(ANSWER) % block > 0
        fed = torch.cat([ids, torch.where(masked, MASK, ids[:, begin:])], dim=1)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    out = model(
        input_ids=fed,
        attention_mask=bias[None, None].expand(len(ids), 1, -1, -1),
        position_ids=place[None].expand(len(ids), -1),
        use_cache=False,
    ).logits
    forward = F.cross_entropy(out[:, begin - 1 : clean - 1].flatten(0, 1), ids[:, begin:].flatten())
    if masked is None or not masked.any():
        return torch.zeros(()), forward
    chosen = masked[:, 1:]
    return F.cross_entropy(out[:, clean:-1][chosen], ids[:, begin + 1 :][chosen]), forward


def train(args: argparse.Namespace) -> Any:
    """Return a trained model."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=FIRST + 256,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    stages = [(1, args.steps), *((block, args.steps // 2) for block in (2, 4, 8, 16))]
    total = sum(steps for _, steps in stages)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.rate, total, pct_start=0.05)
    begun = time.perf_counter()
    for block, steps in stages:
        for step in range(steps):
            ids = torch.tensor([example(rng) for _ in range(args.batch)])
            masked, forward = losses(model, ids, block)
            optimiser.zero_grad()
            (masked + 0.5 * forward if block > 1 else forward).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                spent = time.perf_counter() - begun
                print(
                    f"block {block}, step {step + 1}: masked {masked.item():.3f}, "
                    f"left to right {forward.item():.3f}, {spent:.0f} s",
                    flush=True,
                )
    return model


def save(model: Any, folder: Path) -> None:
    """Write weights and a byte tokenizer with an end and a mask token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from steersman.backends.files.tokenizer import byte_of_character

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    characters = byte_of_character()
    names = ["<eos>", "<|mask|>", *sorted(characters, key=characters.__getitem__)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>"), AddedToken("<|mask|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "mask_token": "<|mask|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--out", type=Path, default=ROOT / "out" / "tiny-block")
    made.add_argument("--steps", type=int, default=400, help="left to right; half per block size")
    made.add_argument("--batch", type=int, default=48)
    made.add_argument("--layers", type=int, default=3)
    made.add_argument("--width", type=int, default=96)
    made.add_argument("--rate", type=float, default=2e-3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=1)
    args = made.parse_args()
    save(train(args), args.out)
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
