"""MLX backend: every capability on Apple GPUs, and on CPU or CUDA where mlx runs under Linux.

mlx-lm's implementations of the models compute; the cache, the masks and the looking inside are our
own. GGUF files of Q4_0, Q4_1 and Q8_0 blocks are read without conversion.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from steersman.core.errors import UsageError

if TYPE_CHECKING:
    from steersman.core.layers import LayerChoice
    from steersman.core.locate import ModelSource

    from .model import MLXModel


def devices() -> list[str]:
    """Return the devices that mlx can use; imports it."""
    from .blas import prepare

    prepare()
    import mlx.core as mx

    found = ["cpu"]
    if mx.metal.is_available():
        found.append("metal")
    elif hasattr(mx, "cuda") and mx.cuda.is_available():
        found.append("cuda")
    return found


def open_model(
    source: ModelSource,
    *,
    context: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    setting: str = "reproducible",
    layers: LayerChoice | None = None,
) -> MLXModel:
    """Open a GGUF file or a Hugging Face folder.

    Parameters
    ----------
    source : ModelSource
    context : int, optional
        Most positions per row, up to the trained context, which is the default.
    dtype : {"auto", "float32", "bfloat16", "float16", "q4", "q8"}
        "auto" is float32 on CPU; on a GPU the file's own type, quantised blocks included. "q4" and
        "q8" keep the file's own 4- or 8-bit weights packed (slow on CPU).
    device : {"auto", "cpu", "gpu", "metal", "cuda"}
    threads : int, optional
        Threads of the BLAS on the CPU build, which numpy shares; default ``$STEERSMAN_THREADS``,
        else what the BLAS chose.
    setting : {"reproducible", "fast"}
        The same here: matrix products of other shapes round differently in mlx, so logits move by
        about 5e-5 with the way a prompt is cut, and ``info.batch_invariant`` is False.
    layers : int, str or sequence of int, optional
        Keep only these layers, renumbered from 0 (:mod:`steersman.core.layers`).

    Raises
    ------
    UsageError
        An option is unknown, or cannot be used with this model.
    MissingDependency
        mlx-lm or the device is not there.
    MissingFile, InvalidInput
        The folder or file is not what it should be, or not a model that mlx-lm computes rightly.
    """
    if setting not in ("reproducible", "fast"):
        raise UsageError(f"setting {setting!r}: unknown; known: reproducible, fast")
    from .load import open_model as load

    return load(source, context=context, dtype=dtype, device=device, threads=threads, layers=layers)


def versions() -> dict[str, str]:
    """Return the versions of the packages this backend computes with, without importing them.

    ``blas`` says what multiplies matrices once a model was opened in this process.
    """
    out = {}
    for name in ("mlx", "mlx-lm", "tokenizers"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    from . import blas

    out["blas"] = blas.describe()
    return out
