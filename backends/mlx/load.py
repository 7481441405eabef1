"""Opening a model: which way its weights come in, and the checks that make it the right one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import blas  # before mlx.core: it decides which BLAS serves it

BLAS = blas.prepare()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from steersman.core.errors import InvalidInput, MissingDependency, UsageError  # noqa: E402
from steersman.core.fingerprint import weights_fingerprint  # noqa: E402
from steersman.core.layers import (  # noqa: E402
    LayerChoice,
    check_period,
    choose_layers,
    kept_facts,
)
from steersman.core.locate import ModelSource  # noqa: E402
from steersman.core.model import ModelInfo, Tokenizer  # noqa: E402

from ..files.architectures import plan_model  # noqa: E402
from ..files.convert import as_hf_folder  # noqa: E402
from ..files.gguf import read_header  # noqa: E402
from ..files.guard import check_file  # noqa: E402
from ..files.tokenizer import open_tokenizer, read_json  # noqa: E402
from . import families, native_gguf, taps, weights  # noqa: E402
from .lazy import import_mlx_lm  # noqa: E402
from .model import MLXModel  # noqa: E402

_FLOATS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_DTYPES = ("auto", *_FLOATS, "q4", "q8")


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A source in memory: a config in transformers' spelling, weights by mlx-lm's names."""

    config: Mapping[str, Any]
    tensors: weights.Weights
    group: int | None  # weights per scale, when some are quantised
    tokenizer: Tokenizer
    where: str


def open_model(
    source: ModelSource,
    *,
    context: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    layers: LayerChoice | None = None,
) -> MLXModel:
    """Open a model; see :func:`steersman.backends.mlx.open_model`."""
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype!r}: the mlx backend has {', '.join(_DTYPES)}")
    where = _device(device)
    if threads is None and os.environ.get("STEERSMAN_THREADS", "").isdigit():
        threads = int(os.environ["STEERSMAN_THREADS"])
    used_threads = blas.set_threads(threads) if where == mx.cpu else None
    check_file(source)
    with mx.stream(where):
        opened = _read(source, dtype, where)
        config = families.mlx_config(opened.config, opened.where)
        net, kind, compute, kept = _build(opened, config, dtype, where, layers)
    trained = families.context_of(config, opened.where)
    if context is not None and not 1 <= context <= trained:
        raise UsageError(f"--ctx-size {context}: {source.name} takes 1 to {trained}")
    facts: Any = kept_facts(
        source.name,
        weights_fingerprint(source.path),
        {"blas": BLAS.name} if where == mx.cpu else {},
        kept,
    )
    info = ModelInfo(
        backend="mlx",
        path=str(source.path),
        architecture=str(config["model_type"]),
        dtype=kind,
        device=_describe(where),
        layers=len(net.model.layers),
        width=int(config["hidden_size"]),
        heads=int(config["num_attention_heads"]),
        vocab_size=int(config["vocab_size"]),
        context=context or trained,
        trained_context=trained,
        # Matrix products of other shapes round differently: cutting a prompt otherwise, or other
        # rows beside it, moves logits by about 5e-5 (measured).
        batch_invariant=False,
        threads=used_threads,
        **facts,
    )
    return MLXModel(net, info=info, tokenizer=opened.tokenizer, device=where, compute_dtype=compute)


def _device(name: str) -> mx.Device:
    if name == "auto":
        return mx.default_device()
    if name == "cpu":
        return mx.Device(mx.cpu, 0)
    if name not in ("gpu", "metal", "cuda"):
        raise UsageError(f"--device {name!r}: the mlx backend has auto, cpu, gpu")
    if not mx.device_count(mx.gpu):
        raise MissingDependency(f"--device {name!r}: this build of mlx sees no GPU; use cpu")
    return mx.Device(mx.gpu, 0)


def _describe(device: mx.Device) -> str:
    if device == mx.cpu:
        return "cpu"
    return f"gpu ({mx.device_info(device).get('device_name', 'unknown')})"


def _read(source: ModelSource, dtype: str, device: mx.Device) -> _Opened:
    # On the CPU mlx takes seconds to unpack a file's blocks; the converted folder opens faster.
    if source.kind == "gguf" and (device != mx.cpu or dtype in ("q4", "q8")):
        header = read_header(source.path)
        if native_gguf.readable(header):
            plan = plan_model(header)
            return _Opened(
                config=plan.config,
                tensors=native_gguf.tensors(header, plan),
                group=native_gguf.GROUP,
                tokenizer=open_tokenizer(header),
                where=str(source.path),
            )
    folder = as_hf_folder(source)
    path = folder / "config.json"
    config = read_json(path)
    return _Opened(
        config=config,
        tensors=weights.load_folder(folder),
        group=_group(config, str(path)),
        tokenizer=open_tokenizer(folder),
        where=str(path),
    )


def _group(config: Mapping[str, Any], where: str) -> int | None:
    """Return the group size of a folder that mlx-lm has quantised, None for others."""
    settings = config.get("quantization")
    if settings is None:
        if config.get("quantization_config"):
            raise InvalidInput(f"{where}: quantization_config is not supported on mlx")
        return None
    group = settings.get("group_size") if isinstance(settings, dict) else None
    if group not in (32, 64, 128) or settings.get("mode", "affine") != "affine":
        raise InvalidInput(f"{where}: quantization {settings!r} is not supported on mlx")
    if any(isinstance(v, dict) and v.get("group_size", group) != group for v in settings.values()):
        raise InvalidInput(f"{where}: quantization with several group sizes is not supported")
    return int(group)


def _build(
    opened: _Opened,
    config: Mapping[str, Any],
    dtype: str,
    device: mx.Device,
    layers: LayerChoice | None,
) -> tuple[nn.Module, str, mx.Dtype, tuple[int, ...] | None]:
    """Return the evaluated model, the name of its weight type, activations' type, kept layers."""
    family = families.family_of(config, opened.where)
    module = import_mlx_lm(f"models.{family.module}")
    try:
        args = module.ModelArgs.from_dict(config)
        families.check_args(args, config, opened.where)
        net = module.Model(args)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise InvalidInput(f"{opened.where}: mlx-lm cannot use this config ({error})") from None
    families.check_rope(net, config, opened.where)
    kept = choose_layers(layers, len(net.model.layers), model=opened.where)
    tensors = dict(opened.tensors)
    if hasattr(net, "sanitize"):
        tensors = net.sanitize(tensors)
    kind, compute = _convert(tensors, opened, dtype, device)
    if opened.group is not None:
        weights.quantise_like(net, tensors, opened.group)
    net.eval()
    try:
        net.load_weights(list(tensors.items()), strict=True)
        if kept is not None:  # nothing is computed yet, so what is left out costs no memory
            _keep_layers(net, config, kept, opened.where)
        weights.evaluate(net)
    except (ValueError, RuntimeError) as error:
        raise InvalidInput(f"{opened.where}: {str(error).strip().splitlines()[0]}") from None
    taps.install(net, import_mlx_lm(f"models.{family.attention}"))
    return net, kind, compute, kept


def _keep_layers(
    net: nn.Module, config: Mapping[str, Any], kept: Sequence[int], where: str
) -> None:
    """Leave an mlx-lm model only these layers; each keeps what it was built with."""
    if config["model_type"] == "gemma3_text":  # asks for the number again at every call
        period = int(config["sliding_window_pattern"])
        check_period(kept, period, where=where, why="mlx tells windows from full attention")
        if len(kept) < period:
            raise UsageError(f"layers: {where}: mlx needs at least {period} of them")
    inner = net.model
    inner.layers = [inner.layers[i] for i in kept]
    if hasattr(inner, "fa_idx"):  # llama: which layers' caches the two masks are made from
        sliding = [bool(layer.use_sliding) for layer in inner.layers]
        inner.fa_idx = sliding.index(False) if False in sliding else 0
        inner.swa_idx = sliding.index(True) if True in sliding else None


def _convert(
    tensors: weights.Weights, opened: _Opened, dtype: str, device: mx.Device
) -> tuple[str, mx.Dtype]:
    """Bring weights to the wanted type, in place; return its name and the activations' type."""
    quantised = weights.quantised_names(tensors)
    group = opened.group
    if quantised and group is not None:
        # mlx's quantised kernels are slow on the CPU (1.7 times in decoding, 20 in prefill).
        if dtype in ("q4", "q8") or (dtype == "auto" and device != mx.cpu):
            weights.widen_scales(tensors)
            bits = {
                weights.bits_of(tensors[f"{n}.weight"], tensors[f"{n}.scales"], group)
                for n in quantised
            }
            if dtype == "auto" or int(dtype[1:]) in bits:
                return "+".join(f"q{b}" for b in sorted(bits)), mx.float32
            raise UsageError(f"--dtype {dtype}: {opened.where} has {sorted(bits)} bits")
        weights.dequantise(tensors, group)
    elif dtype in ("q4", "q8"):
        raise UsageError(
            f"--dtype {dtype}: {opened.where} holds no weights that mlx can keep quantised "
            "(GGUF: Q4_0, Q4_1 and Q8_0)"
        )
    if dtype == "auto":
        kinds = {t.dtype for t in tensors.values() if t.ndim > 1}
        keep = device != mx.cpu and len(kinds) == 1
        target = kinds.pop() if keep else mx.float32
    else:
        target = _FLOATS[dtype]
    for name, tensor in tensors.items():
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise InvalidInput(f"{opened.where}: tensor {name!r} is {tensor.dtype}, not floating")
        tensors[name] = tensor.astype(target)
    return next((k for k, v in _FLOATS.items() if v == target), str(target)), target
