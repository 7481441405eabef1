"""PyTorch backend: every capability on CPU and CUDA, for Hugging Face folders and GGUF files.

Two ways to compute stand behind the same session. ``native`` is a hand-written step for the Llama
family (fused projections, own key/value buffers, no modules); ``hf`` runs the transformers model of
any other architecture with our cache, masks and hooks, and serves as the oracle of the first.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steersman.core.layers import LayerChoice
    from steersman.core.locate import ModelSource

    from .model import TorchModel


def devices() -> list[str]:
    """Return the devices that torch can use; imports it."""
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            found.append(f"cuda:{i} ({properties.name}, {memory:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def open_model(
    source: ModelSource,
    *,
    context: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    path: str = "auto",
    setting: str = "reproducible",
    layers: LayerChoice | None = None,
) -> TorchModel:
    """Open a Hugging Face folder, or a GGUF file by way of its converted folder.

    Parameters
    ----------
    source : ModelSource
    context : int, optional
        Most positions per row, up to the trained context, which is the default.
    dtype : {"auto", "float32", "bfloat16", "float16", "q4"}
        "auto" is float32 on CPU and bfloat16 on CUDA. "float16" on CPU keeps weights in half
        precision and computes in float32 (x86 only). "q4" (CPU) keeps a GGUF's own Q4_0 and Q4_1
        blocks as they are.
    device : {"auto", "cpu", "cuda", "cuda:N"}
    threads : int, optional
        CPU threads of the whole process (``torch.set_num_threads`` is global); default
        ``$STEERSMAN_THREADS``, else what torch chose.
    path : {"auto", "native", "hf"}
        Which implementation computes; "auto" takes the native one where it knows the architecture.
    setting : {"reproducible", "fast"}
        "reproducible" gives the same bits however a prompt is cut into calls and whatever else is
        in the batch, where this engine can (native path on CPU, float32 or float16);
        ``info.batch_invariant`` says whether a probe found it to hold. "fast" lets a token alone
        take faster kernels; its logits then differ by about 3e-5 in float32.
    layers : int, str or sequence of int, optional
        Keep only these layers, renumbered from 0 (:mod:`steersman.core.layers`).

    Raises
    ------
    UsageError
        An option is unknown, or cannot be used with this model.
    MissingDependency
        The device is not there.
    MissingFile, InvalidInput
        The folder or file is not what it should be.
    """
    from .load import open_model as load

    return load(
        source,
        context=context,
        dtype=dtype,
        device=device,
        threads=threads,
        path=path,
        setting=setting,
        layers=layers,
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages this backend computes with, without importing them."""
    out = {}
    for name in ("torch", "transformers", "tokenizers", "safetensors"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out
