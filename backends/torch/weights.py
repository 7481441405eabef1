"""Reading the safetensors of a Hugging Face folder, checked; never pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from steersman.core.errors import InvalidInput

from ..files.hf_folder import weight_files


class Weights:
    """The tensors of a folder's safetensors files, read when asked for.

    Raises
    ------
    MissingFile, InvalidInput
        The folder holds no safetensors (pickled weights are never read), or one of the files is
        damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, Any] = {}
        for file in (folder / name for name in weight_files(folder)):
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                self._where[name] = (file, handle)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str, *shape: int) -> Tensor:
        """Return a floating-point tensor of exactly this shape (memory-mapped).

        Raises
        ------
        InvalidInput
            It is missing, has another shape, or holds no floating-point numbers.
        """
        if name not in self._where:
            raise InvalidInput(f"{self.folder}: tensor {name!r} is missing")
        file, handle = self._where[name]
        tensor: Tensor = handle.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise InvalidInput(
                f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"config.json asks for {shape}"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise InvalidInput(
                f"{file}: tensor {name!r} is {tensor.dtype}; float32, float16 or bfloat16 is read"
            )
        return tensor


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{file}: not a usable safetensors file ({error})") from None
