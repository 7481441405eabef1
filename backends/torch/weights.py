"""Reading the safetensors of a Hugging Face folder, checked; never pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from steersman.core.errors import InvalidInput, MissingFile

from ..files.tokenizer import read_json

MAX_TENSORS = 1 << 16


class Weights:
    """The tensors of a folder's safetensors files, read when asked for.

    Raises
    ------
    InvalidInput
        The folder holds no safetensors (pickled ``.bin`` weights are never read), or one of the
        files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, Any] = {}
        for file in _files(folder):
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                self._where[name] = (file, handle)
            if len(self._where) > MAX_TENSORS:
                raise InvalidInput(f"{folder}: more than {MAX_TENSORS} tensors")

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


def _files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise InvalidInput(f"{index}: weight_map is missing")
        names = sorted({str(name) for name in table.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InvalidInput(f"{index}: {name!r} is not the name of a safetensors file")
            if not (folder / name).is_file():
                raise MissingFile(f"{folder / name}: no such file, but {index.name} names it")
        return [folder / name for name in names]
    pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
    if pickled:
        raise InvalidInput(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when read; "
            "convert them to safetensors"
        )
    raise MissingFile(f"{folder}: no model.safetensors")


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{file}: not a usable safetensors file ({error})") from None
