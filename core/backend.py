"""Finding and loading backends by name, without importing any until one is used."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import MissingDependency, UsageError, did_you_mean
from .model import Capability, Model


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Where a backend lives and what it needs.

    Attributes
    ----------
    module : str
        Module with ``open_model(source: ModelSource, **options) -> Model``,
        ``versions() -> dict[str, str]`` (cheap) and ``devices() -> list[str]``.
    requires : tuple of str
        Top-level modules that must be importable.
    install : str
        Command that installs what is missing.
    offers : Capability
        What models on this backend offer in general; the loaded model has the last word.
    """

    module: str
    requires: tuple[str, ...]
    install: str
    offers: Capability


_EVERYTHING = ~Capability.NONE

BACKENDS: Mapping[str, Backend] = {
    "llamacpp": Backend(
        module="steersman.backends.llamacpp",
        requires=("llama_cpp",),
        install='pip install "steersman[llamacpp]"',
        offers=_EVERYTHING,
    ),
    "torch": Backend(
        module="steersman.backends.torch",
        requires=("torch", "transformers", "safetensors", "tokenizers"),
        install='pip install "steersman[torch]"',
        offers=_EVERYTHING,
    ),
    "mlx": Backend(
        module="steersman.backends.mlx",
        requires=("mlx", "mlx_lm", "tokenizers"),
        install='pip install "steersman[mlx]"',
        offers=_EVERYTHING,
    ),
}

ENTRY_POINTS = "steersman.backends"


def known_backends() -> list[str]:
    """Return the names of the built-in backends and of those that installed packages add."""
    extra = {point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return [*BACKENDS, *sorted(extra - set(BACKENDS))]


def missing_modules(name: str) -> list[str]:
    """Return the modules a built-in backend needs and that are not installed."""
    if name not in BACKENDS:
        return []
    return [m for m in BACKENDS[name].requires if importlib.util.find_spec(m) is None]


def installed_backends() -> list[str]:
    """Return the backends whose packages are installed (none of them is imported)."""
    return [name for name in known_backends() if not missing_modules(name)]


def engine_for(kind: str) -> str:
    """Return the engine that "auto" stands for: the first installed one that suits the files.

    Parameters
    ----------
    kind : {"gguf", "hf"}

    Raises
    ------
    MissingDependency
        None is installed.
    """
    # A GGUF is llama.cpp's own format; on a Mac, MLX reads Hugging Face folders without copies.
    suited = ["llamacpp", "mlx", "torch"] if kind == "gguf" else ["torch", "mlx"]
    if sys.platform == "darwin" and kind == "hf":
        suited = ["mlx", "torch"]
    installed = installed_backends()
    for name in suited:
        if name in installed:
            return name
    raise MissingDependency(
        f"no engine for {kind} files is installed; "
        f'run: pip install "steersman[{suited[0]}]" (of {", ".join(known_backends())})'
    )


def backends_offering(needs: Capability) -> list[str]:
    """Return the built-in backends that in general offer all of ``needs``."""
    return [name for name, backend in BACKENDS.items() if not needs & ~backend.offers]


def backend_module(name: str) -> Any:
    """Import and return a backend's module.

    Raises
    ------
    UsageError
        No backend has this name.
    MissingDependency
        Its packages are not installed; the message holds the command that installs them.
    """
    if name in BACKENDS:
        missing = missing_modules(name)
        if missing:
            raise MissingDependency(
                f"backend {name!r}: {', '.join(missing)} not installed; "
                f"run: {BACKENDS[name].install}"
            )
        return importlib.import_module(BACKENDS[name].module)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()
    raise UsageError(f"--backend {name!r}: unknown backend{did_you_mean(name, known_backends())}")


def trainer(name: str) -> Any:
    """Import and return the torch backend's module ``train_NAME``: training runs on torch alone.

    Raises
    ------
    MissingDependency
        torch or what belongs to it is not installed.
    """
    module = backend_module("torch")
    return importlib.import_module(f"{module.__name__}.train_{name}")


def load_with(name: str, source: Any, *, adapter: Any = None, **options: Any) -> Model:
    """Open ``source`` (a ``ModelSource``) with the backend called ``name``.

    A LoRA ``adapter`` (the path of its folder) is merged into the weights first, on the way that
    all engines share.
    """
    module = backend_module(name)
    if adapter is not None:
        files = importlib.import_module("steersman.backends.files.adapter")
        source = files.with_adapter(source, adapter)
    model: Model = module.open_model(source, **options)
    return model
