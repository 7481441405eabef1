"""What a training starts from, and with whom it shares the work."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.backends.files.convert import as_hf_folder
from steersman.backends.files.tokenizer import open_tokenizer
from steersman.core.errors import MissingDependency
from steersman.core.fingerprint import weights_fingerprint
from steersman.core.locate import ModelSource


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


class Team:
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
