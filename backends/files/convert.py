"""GGUF to a Hugging Face folder, once, into the cache.

The weights are dequantised to float32, which is exact; torch and mlx read the folder from then on.
A folder appears whole or not at all, and is found again by the hash of the file it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from steersman.core.fingerprint import file_sha256
from steersman.core.locate import ModelSource
from steersman.core.paths import cache_dir

from . import gguf_tokenizer
from .architectures import ModelPlan, TensorPlan, plan_model
from .gguf import GGUFHeader, StringArray, read_header
from .made import made_folder, write_json

FORMAT = 1  # raise it when a conversion must be made anew


def converted_dir() -> Path:
    """Return the folder that holds all conversions."""
    return cache_dir() / "converted"


def as_hf_folder(source: ModelSource) -> Path:
    """Return a folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    A source that is such a folder already is checked and returned as it is. A GGUF file is
    converted the first time (about 4 bytes of disk per weight) and found in the cache afterwards.
    Two processes that want the same file wait for each other.

    Parameters
    ----------
    source : ModelSource

    Returns
    -------
    Path
        Besides the files above it holds ``tokenizer_config.json`` (with the chat template),
        ``generation_config.json`` (with all ids that end a generation) and ``steersman.json``
        (where it came from).

    Raises
    ------
    UsageError
        The architecture is opened only by the llamacpp backend.
    InvalidInput
        The file is damaged or not acceptable.
    SteersmanError
        The disk is too full.
    """
    from .guard import check_file

    check_file(source)
    if source.kind == "hf":
        return source.path
    digest = file_sha256(source.path)
    return made_folder(
        converted_dir(),
        source.name,
        digest,
        usable=lambda note: (note["format"], note["source"]["sha256"]) == (FORMAT, digest),
        need=lambda: sum(map(_nbytes, plan_model(read_header(source.path)).tensors.values())),
        fill=lambda work: _convert(source, digest, work),
    )


def _convert(source: ModelSource, digest: str, work: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the files into ``work``; return their hashes and the note."""
    header = read_header(source.path)
    plan = plan_model(header)
    hashes = {"model.safetensors": _write_weights(work / "model.safetensors", header, plan)}
    hashes |= _write_texts(work, header, plan)
    return hashes, {
        "format": FORMAT,
        "source": {"name": source.path.name, "sha256": digest, "size": header.file_size},
        "architecture": header.architecture,
    }


def _nbytes(tensor: TensorPlan) -> int:
    size = 4
    for dim in tensor.shape:
        size *= dim
    return size


def _write_weights(path: Path, header: GGUFHeader, plan: ModelPlan) -> str:
    """Write ``model.safetensors`` tensor by tensor, so that memory holds one at a time.

    Returns the file's SHA-256. Format: https://huggingface.co/docs/safetensors
    """
    from tqdm import tqdm

    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in plan.tensors.items():
        end = at + _nbytes(tensor)
        entries[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    bar = tqdm(
        total=at,
        desc=f"converting {header.path.name}",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with bar, path.open("wb") as file:
        for block in (len(head).to_bytes(8, "little"), head):
            digest.update(block)
            file.write(block)
        for tensor in plan.tensors.values():
            data = tensor.read(header).astype("<f4", copy=False).reshape(-1).view("u1").data
            digest.update(data)
            file.write(data)
            bar.update(data.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_texts(work: Path, header: GGUFHeader, plan: ModelPlan) -> dict[str, str]:
    """Write config and tokenizer files; return their SHA-256 by name."""
    tokens = header.need("tokenizer.ggml.tokens", StringArray)
    ends = gguf_tokenizer.end_ids(header)
    special = {
        name: gguf_tokenizer.special_id(header, key)
        for name, key in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
    }
    ids: dict[str, Any] = {
        "bos_token_id": special["bos"],
        "eos_token_id": ends,
        "pad_token_id": special["pad"],
    }
    write_json(work / "config.json", {**plan.config, **ids})
    write_json(work / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    gguf_tokenizer.build_tokenizer(header).save(str(work / "tokenizer.json"), pretty=False)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": gguf_tokenizer.adds_bos(header),
        "clean_up_tokenization_spaces": False,
        "model_max_length": plan.config["max_position_embeddings"],
    }
    config |= {f"{name}_token": tokens[i] for name, i in special.items() if i is not None}
    template = header.get("tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    write_json(work / "tokenizer_config.json", config)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    return {name: hashlib.sha256((work / name).read_bytes()).hexdigest() for name in names}
