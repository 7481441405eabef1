"""llama.cpp: GGUF files on the CPU (or whatever device the engine was built for)."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from steersman.core.errors import MissingDependency, UsageError, did_you_mean
from steersman.core.locate import ModelSource

if TYPE_CHECKING:
    from steersman.core.layers import LayerChoice

    from .model import LlamaModel

__all__ = ["open_model", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of the packages this backend stands on; imports none of them."""
    found = {}
    for package in ("llama-cpp-python",):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[str]:
    """Return the devices that the installed engine can use; imports it."""
    import llama_cpp

    found = ["cpu"]
    if llama_cpp.llama_supports_gpu_offload():
        found.append("gpu (offload is built in)")
    return found


def open_model(
    source: ModelSource,
    *,
    context: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    layers: LayerChoice | None = None,
    **options: Any,
) -> LlamaModel:
    """Load a GGUF file.

    Parameters
    ----------
    source : ModelSource
    context : int, optional
        Most positions per row; the smaller of 8,192 and what the model was trained for if None.
        Caches grow on demand, so memory is used for what is in them.
    dtype : {"auto"}
        llama.cpp computes in the file's own types.
    device : {"auto", "cpu", "gpu"}
    threads : int, optional
        ``$STEERSMAN_THREADS``, else the physical cores that are free when the model is loaded.
    setting : {"reproducible", "fast"}
        "reproducible" (the default) gives the same logits however a prompt is cut into calls, as
        far as the weight types allow: ``info.batch_invariant`` says what was found. "fast" is the
        engine's own choice, with prompts read about 1.2 times as fast.
    layers : int, str or sequence of int, optional
        Keep only these layers, renumbered from 0 (:mod:`steersman.core.layers`). The engine cannot
        leave layers out, so a file without them is written once, into the cache.

    Raises
    ------
    MissingFile, InvalidInput
        There is no such file, or it is damaged or not a decoder.
    MissingDependency
        A GPU is asked for and the installed engine was built without one.
    UsageError
        An option cannot be used as given.
    """
    from steersman.backends.files.gguf import read_header
    from steersman.backends.files.gguf_layers import block_count, with_layers
    from steersman.backends.files.guard import check_file
    from steersman.core.layers import choose_layers

    from . import lib
    from .model import SETTINGS, LlamaModel, context_option, load_handle
    from .threads import LoadMeter, choose_threads

    setting = options.pop("setting", "reproducible")
    if options:
        name = next(iter(options))
        raise UsageError(
            f"{name}: unknown option of llamacpp{did_you_mean(name, ['setting', 'layers'])}"
        )
    if setting not in SETTINGS:
        raise UsageError(f"setting {setting!r}: unknown{did_you_mean(str(setting), SETTINGS)}")
    context = context_option(context)
    if dtype != "auto":
        raise UsageError(
            f"dtype {dtype!r}: llama.cpp computes in the file's own types; "
            "choose another file, or the torch or mlx backend"
        )
    if source.kind != "gguf":
        raise UsageError(
            f"{source.path}: llama.cpp needs a GGUF file; open this folder with the torch or mlx "
            "backend, or convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    meter = LoadMeter()
    if not source.trusted:
        check_file(source)
    header = read_header(source.path)
    kept = None
    if layers is not None:
        kept = choose_layers(layers, block_count(header), model=source.name)
        if kept is not None:
            header = read_header(with_layers(source, kept))
    if not lib.check_layout():
        raise MissingDependency(
            "llama-cpp-python: this version lays out tensors differently; "
            'run: pip install "llama-cpp-python==0.3.36"'
        )
    offload = bool(lib.llama.llama_supports_gpu_offload())
    if device not in ("auto", "cpu", "gpu"):
        raise UsageError(
            f"device {device!r}: unknown{did_you_mean(device, ['auto', 'cpu', 'gpu'])}"
        )
    if device == "gpu" and not offload:
        raise MissingDependency(
            "device 'gpu': the installed llama-cpp-python was built for the CPU only; "
            "rebuild it with CMAKE_ARGS for your GPU, or use device 'cpu'"
        )
    on_gpu = offload and device != "cpu"
    handle = load_handle(header.path, gpu_layers=-1 if on_gpu else 0)
    count, reason = choose_threads(threads, meter)
    return LlamaModel(
        handle,
        header,
        source=source,
        kept=kept,
        setting=SETTINGS[setting],
        context=context,
        device="gpu" if on_gpu else "cpu",
        threads=count,
        reason=reason,
    )
