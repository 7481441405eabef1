"""A LoRA adapter merged into a model's weights, once, into the cache; every engine then opens it.

Adapters come in the format of the peft library: a folder with ``adapter_config.json`` and
``adapter_model.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.core.errors import InvalidInput
from steersman.core.fingerprint import file_sha256
from steersman.core.locate import ModelSource
from steersman.core.paths import cache_dir

from .architectures import plan_model
from .gguf import GGML_TYPES, read_header
from .gguf_layers import copied, metadata_of
from .gguf_write import OutTensor, write_gguf
from .guard import check_file
from .hf_folder import Entry, check_safetensors, read_floats, weight_files
from .made import made_folder
from .tokenizer import read_json

FORMAT = 1  # raise it when files must be made anew
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 4 << 30
_PREFIX = "base_model.model."
_F16 = next(number for number, (name, *_) in GGML_TYPES.items() if name == "F16")
# What changes the arithmetic of an adapter, and its plain value.
_PLAIN: Mapping[str, Any] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "bias": "none",
}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is added to some weights: ``scale * up @ down``.

    Attributes
    ----------
    folder : Path
    scale : float
    entries : mapping of weight name to (down, up)
        Where ``down`` (rank, columns) and ``up`` (rows, rank) lie; names as in Hugging Face models.
    sha256 : str
        Of config and weights.
    """

    folder: Path
    scale: float
    entries: Mapping[str, tuple[Entry, Entry]]
    sha256: str

    def change(self, name: str) -> Floats:
        """Return what is added to the weight ``name`` (rows, columns)."""
        down, up = (read_floats(self.folder / WEIGHTS, entry) for entry in self.entries[name])
        return np.float32(self.scale) * (up @ down)

    def check(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raise InvalidInput if the adapter does not fit weights of these shapes."""
        for name, (down, up) in self.entries.items():
            shape = (up.shape[0], down.shape[1])
            if name not in shapes:
                raise InvalidInput(
                    f"{self.folder}: changes {name}, which {where} lacks; made for another model?"
                )
            if shapes[name] != shape:
                raise InvalidInput(
                    f"{self.folder}: {name} is {shapes[name]} in {where}, the adapter is for "
                    f"{shape}; made for another model?"
                )


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter's settings and where its weights lie.

    Raises
    ------
    MissingFile, InvalidInput
        It is not there, damaged, or of a kind that cannot be merged exactly.
    """
    config = read_json(folder / CONFIG)
    entries = check_safetensors(folder / WEIGHTS)
    if (folder / WEIGHTS).stat().st_size > MAX_BYTES:
        raise InvalidInput(f"{folder / WEIGHTS}: larger than {MAX_BYTES >> 30} GiB")
    if config.get("peft_type") != "LORA":
        raise InvalidInput(f"{folder}: peft_type {config.get('peft_type')!r}; LORA is read")
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise InvalidInput(f"{folder / CONFIG}: {key} {config[key]!r} cannot be merged")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise InvalidInput(f"{folder / CONFIG}: r and lora_alpha must be numbers")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    pairs: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B") or len(entry.shape) != 2:
            raise InvalidInput(f"{folder / WEIGHTS}: {key} {entry.shape} is no part of a LoRA")
        pairs.setdefault(f"{name.removeprefix(_PREFIX)}.weight", {})[part] = entry
    found = {}
    for name, pair in pairs.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise InvalidInput(f"{folder / WEIGHTS}: {name}: its two parts do not fit")
        found[name] = (pair["lora_A"], pair["lora_B"])
    digest = hashlib.sha256()
    for file in (CONFIG, WEIGHTS):
        digest.update(file_sha256(folder / file).encode())
    return Adapter(folder=folder, scale=scale, entries=found, sha256=digest.hexdigest())


def with_adapter(source: ModelSource, folder: Path) -> ModelSource:
    """Return the model with a LoRA adapter merged in, made once into the cache.

    Parameters
    ----------
    source : ModelSource
    folder : Path
        Of the adapter, in peft's format.

    Returns
    -------
    ModelSource
        Of the same kind. In a GGUF file the changed weights are kept as float16, all others with
        their own bytes; in a folder they are float32.

    Raises
    ------
    MissingFile, InvalidInput
        The adapter is damaged, or does not fit this model.
    UsageError
        The architecture's names are not known.
    """
    adapter = read_adapter(folder)
    check_file(source)
    label = f"{source.name}+{folder.resolve().name}"
    base = _digest(source)

    def usable(note: Mapping[str, Any]) -> bool:
        made = (note["format"], note["source"], note["adapter"])
        return made == (FORMAT, base, adapter.sha256)

    note = {"format": FORMAT, "source": base, "adapter": adapter.sha256}
    key = hashlib.sha256(f"{base} {adapter.sha256}".encode()).hexdigest()
    parent = cache_dir() / "adapted"
    if source.kind == "gguf":
        made = made_folder(
            parent, label, key, usable=usable,
            need=lambda: 4 * source.path.stat().st_size,
            fill=lambda work: ({"model.gguf": _gguf(source, adapter, work / "model.gguf")}, note),
        )  # fmt: skip
        return replace(source, name=label, path=made / "model.gguf", sha256="")
    made = made_folder(
        parent, label, key, usable=usable,
        need=lambda: 2 * sum((source.path / n).stat().st_size for n in weight_files(source.path)),
        fill=lambda work: (_hf(source, adapter, work), note),
    )  # fmt: skip
    return replace(source, name=label, path=made, sha256="")


def _digest(source: ModelSource) -> str:
    if source.kind == "gguf":
        return file_sha256(source.path)
    digest = hashlib.sha256()
    for name in ("config.json", *sorted(weight_files(source.path))):
        digest.update(file_sha256(source.path / name).encode())
    return digest.hexdigest()


def _gguf(source: ModelSource, adapter: Adapter, path: Path) -> str:
    header = read_header(source.path)
    plan = plan_model(header)
    adapter.check({name: t.shape for name, t in plan.tensors.items()}, source.name)
    changed = {plan.tensors[name].source: name for name in adapter.entries}

    def merged(name: str) -> OutTensor:
        tensor = plan.tensors[name]

        def pieces() -> Iterator[memoryview]:
            values = tensor.restore(tensor.read(header) + adapter.change(name))
            yield _finite(values.astype("<f2"), adapter, name).reshape(-1).view("u1").data

        size = 2 * math.prod(tensor.shape)
        return OutTensor(
            name=tensor.source, shape=tensor.shape, type=_F16, nbytes=size, pieces=pieces
        )

    entries, metadata = metadata_of(header)
    tensors = [
        merged(changed[name]) if name in changed else copied(header, info, name)
        for name, info in header.tensors.items()
    ]
    return write_gguf(
        path, entries=entries, metadata=metadata, tensors=tensors, alignment=header.alignment
    )


def _hf(source: ModelSource, adapter: Adapter, work: Path) -> dict[str, str]:
    """Write the folder with merged weights; return its files' hashes."""
    files = {n: check_safetensors(source.path / n) for n in weight_files(source.path)}
    shapes = {name: e.shape for found in files.values() for name, e in found.items()}
    adapter.check(shapes, source.name)
    for path in source.path.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != "steersman.json":
            shutil.copyfile(path, work / path.name)
    for name, found in files.items():
        _merge_file(source.path / name, found, adapter, work / name)
    return {path.name: file_sha256(path) for path in sorted(work.iterdir())}


def _merge_file(path: Path, found: Mapping[str, Entry], adapter: Adapter, out: Path) -> None:
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in found.items():
        merged = name in adapter.entries
        size = 4 * math.prod(entry.shape) if merged else entry.end - entry.begin
        dtype = "F32" if merged else entry.dtype
        head[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in found.items():
            if name in adapter.entries:
                values = read_floats(path, entry) + adapter.change(name)
                file.write(_finite(values.astype("<f4"), adapter, name).tobytes())
            else:
                size = entry.end - entry.begin
                file.write(np.memmap(path, np.uint8, "r", entry.begin, (size,)).data)
        file.flush()
        os.fsync(file.fileno())


def _finite(values: npt.NDArray[Any], adapter: Adapter, name: str) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        raise InvalidInput(f"{adapter.folder}: {name} would hold numbers that are not finite")
    return values
