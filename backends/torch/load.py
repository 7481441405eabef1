"""From a source and options to a model: device, threads, folder, path, weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from steersman.core.errors import MissingDependency, UsageError, did_you_mean
from steersman.core.fingerprint import weights_fingerprint
from steersman.core.layers import LayerChoice, choose_layers, kept_facts
from steersman.core.locate import ModelSource
from steersman.core.model import Forward, ModelInfo, Tokenizer

from ..files.convert import as_hf_folder
from ..files.tokenizer import open_tokenizer, read_json
from .build import build_native
from .config import Keys, architecture, read_config, why_not_native
from .linear import HalfStored
from .model import TorchModel
from .native import NativeModel

DTYPES = ("auto", "float32", "bfloat16", "float16", "q4")
_STRICT = ("float32", "float16")
PATHS = ("auto", "native", "hf")
SETTINGS = ("reproducible", "fast")


def open_model(
    source: ModelSource,
    *,
    context: int | None,
    dtype: str,
    device: str,
    threads: int | None,
    path: str,
    setting: str,
    layers: LayerChoice | None = None,
) -> TorchModel:
    """Open a model; see :func:`steersman.backends.torch.open_model`."""
    _one_of("--dtype", dtype, DTYPES)
    _one_of("path", path, PATHS)
    _one_of("setting", setting, SETTINGS)
    place = pick_device(device)
    set_threads(threads)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    _check_dtype(dtype, place, source)
    folder = as_hf_folder(source)
    file = folder / "config.json"
    values = read_json(file)
    architecture(file, values)  # so that a missing name is told as such
    reason = why_not_native(values)
    stored = dtype == "q4" or (dtype == "float16" and place.type == "cpu")
    if reason is not None and (path == "native" or stored):
        what = "path 'native'" if path == "native" else f"--dtype {dtype}"
        raise UsageError(f"{source.path}: {what} cannot be used: {reason}")
    if path == "hf" and stored:
        raise UsageError(f"--dtype {dtype}: not with path 'hf', which knows float32 and bfloat16")
    native = path == "native" or (path == "auto" and reason is None)
    strict = setting == "reproducible" and native and place.type == "cpu" and dtype in _STRICT
    tokenizer: Tokenizer = open_tokenizer(folder)
    info = _info(source, file, values, dtype=dtype, place=place, context=context, native=native)
    kept = choose_layers(layers, info.layers, model=source.name)
    if kept is not None:
        facts: Any = kept_facts(info.name, info.fingerprint, info.extra, kept)
        info = replace(info, layers=len(kept), **facts)
    if native:
        model: TorchModel = build_native(
            source,
            folder,
            read_config(file, values),
            info,
            tokenizer,
            place,
            kept=kept,
            strict=strict,
        )
    else:
        from .hf import HFModel, keep_layers, load_module  # imports transformers, one second

        compute = getattr(torch, dtype)
        module = load_module(folder, place, compute)
        if kept is not None:
            keep_layers(module, kept, str(source.path))
        hf = HFModel(info, tokenizer, place, compute, module)
        hf.check()
        model = hf
    # Otherwise a token alone takes other kernels, and a short probe may miss it (in
    # bfloat16 many logits of one layer round to the same bits).
    model.info = replace(model.info, batch_invariant=strict and _batch_invariant(model))
    return model


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value!r}: unknown{did_you_mean(value, known)}")


def pick_device(name: str) -> torch.device:
    """Return the device called "auto", "cpu", "cuda" or "cuda:N".

    Raises
    ------
    UsageError
        No device is called so.
    MissingDependency
        torch sees no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or name == "cpu:":
        raise UsageError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise MissingDependency(
                f"--device {name}: torch {torch.__version__} sees {count} CUDA devices; "
                "use --device cpu, or install a CUDA build of torch"
            )
        return torch.device("cuda", int(index or 0))
    return torch.device("cpu")


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads: the option, else ``$STEERSMAN_THREADS``, else leave torch's choice.

    The setting is global to the process and applies to every model on torch.
    """
    text = os.environ.get("STEERSMAN_THREADS", "") if threads is None else str(threads)
    if not text:
        return
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise UsageError(f"--threads {text!r}: expected 1..1024")
    torch.set_num_threads(int(text))


def _check_dtype(dtype: str, place: torch.device, source: ModelSource) -> None:
    if dtype == "q4":
        if place.type != "cpu":
            raise UsageError("--dtype q4: CPU only; use bfloat16 on CUDA")
        if source.kind != "gguf":
            raise UsageError(f"--dtype q4: {source.path} is no GGUF file with Q4_0 or Q4_1 blocks")
    if dtype == "float16" and place.type == "cpu" and not HalfStored.supported():
        raise MissingDependency(
            "--dtype float16: this torch build has no FBGEMM; use float32 or bfloat16"
        )


def _info(
    source: ModelSource,
    file: Path,
    values: Mapping[str, Any],
    *,
    dtype: str,
    place: torch.device,
    context: int | None,
    native: bool,
) -> ModelInfo:
    text = values.get("text_config")
    keys = Keys(file, text if isinstance(text, dict) and "hidden_size" not in values else values)
    names = {
        "layers": ("num_hidden_layers", "n_layer"),
        "width": ("hidden_size", "n_embd"),
        "heads": ("num_attention_heads", "n_head"),
        "vocab_size": ("vocab_size",),
        "trained_context": ("max_position_embeddings", "n_positions", "n_ctx"),
    }
    sizes = {}
    for field, choices in names.items():
        key = next((key for key in choices if key in keys.values), choices[0])
        sizes[field] = keys.integer(key)
    trained = sizes["trained_context"]
    if context is not None and not 1 <= context <= trained:
        raise UsageError(
            f"--ctx-size {context}: {source.name} was trained on 1..{trained} positions; "
            "beyond them its answers are noise"
        )
    return ModelInfo(
        name=source.name,
        backend="torch",
        path=str(source.path),
        architecture=architecture(file, values),
        dtype=dtype,
        device=str(place),
        context=context or trained,
        batch_invariant=False,
        threads=torch.get_num_threads() if place.type == "cpu" else None,
        fingerprint=weights_fingerprint(source.path),
        extra={"path": "native" if native else "hf"},
        **sizes,
    )


def _batch_invariant(model: TorchModel) -> bool:
    """Whether one token alone, and one in a batch, gives the bits it gives inside a prompt.

    A short probe: the first layer and the head only, 133 tokens, which is more than attention's
    first block of keys. True says no more than that.
    """
    length = min(model.info.context, 133)
    if not isinstance(model, NativeModel) or length < 33:
        return False
    small = model.only((0,))
    ids = [[(7 * i) % model.info.vocab_size for i in range(length)]]
    with small.session(max_rows=2) as session:
        whole = session.forward(Forward(keep=0, tokens=ids)).logits
        for a, b in pairwise(sorted({0, 30, 32, length - 1})):
            session.forward(Forward(keep=a, tokens=[ids[0][a:b]], logits="none"))
        alone = session.forward(Forward(keep=length - 1, tokens=[ids[0][-1:]])).logits
    return bool(torch.equal(whole, alone))
