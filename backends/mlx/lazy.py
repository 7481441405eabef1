"""Importing single modules of mlx-lm without its package, which pulls in transformers (seconds)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

from steersman.core.errors import MissingDependency

_lock = threading.RLock()


class _LazyPackage(ModuleType):
    """The package ``mlx_lm``, whose ``__init__`` runs when somebody asks for one of its names."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__version__", "__all__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _lock:
            if type(self) is _LazyPackage:
                # First, because __init__ imports its own submodules.
                self.__class__ = ModuleType  # type: ignore[assignment]
                spec = self.__spec__
                assert spec is not None and spec.loader is not None
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    self.__class__ = _LazyPackage
                    raise
        return getattr(self, name)


def import_mlx_lm(name: str) -> ModuleType:
    """Import ``mlx_lm.<name>`` and what it needs, but not mlx-lm's top level.

    Anyone who imports ``mlx_lm`` afterwards gets the real package.
    """
    with _lock:
        if "mlx_lm" not in sys.modules:
            spec = importlib.util.find_spec("mlx_lm")
            if spec is None:
                raise MissingDependency(
                    'mlx-lm is not installed; run: pip install "steersman[mlx]"'
                )
            package = importlib.util.module_from_spec(spec)
            package.__class__ = _LazyPackage
            sys.modules["mlx_lm"] = package
        return importlib.import_module(f"mlx_lm.{name}")
