"""Checkpoints of a training: weights that are trained, the optimizer's state, and the losses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman.core.errors import InvalidInput, UsageError


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Losses of one update, means over its examples."""

    step: int
    loss: float
    lm: float
    ranking: float
    learning_rate: float


def steps_done(folder: Path) -> int:
    """Return the updates that a training folder holds."""
    try:
        return len((folder / "losses.jsonl").read_text().splitlines())
    except OSError:
        return 0


def save_checkpoint(
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


def resume_checkpoint(
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
