"""Existing logits processors as stages of the chain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..array import Array, array_namespace, asarray_like, library_of, to_numpy
from ..errors import BackendError, UsageError
from ..model import IntArray
from .stage import Context, Stage

CONVENTIONS = ("transformers", "mlx", "llamacpp")

_MODULES = {"transformers": "torch", "mlx": "mlx.core"}


def apply_processor(
    function: Callable[[Any, Any], Any], logits: Array, tokens: IntArray, convention: str
) -> Array:
    """Return what ``function(token_ids, logits)`` makes of one row.

    Parameters
    ----------
    function : callable
    logits : float array (1, V)
    tokens : int64 (T,)
        Prompt and generated tokens.
    convention : {"transformers", "mlx", "llamacpp"}
        Which library the function was written for:

        - ``transformers``: torch tensors, token ids int64 (1, T), logits (1, V);
        - ``mlx`` (mlx-lm): mlx arrays, token ids (T,), logits (1, V);
        - ``llamacpp`` (llama-cpp-python): NumPy arrays, token ids (T,), logits (V,).

    Returns
    -------
    float array (1, V)
        In the library and on the device of ``logits``, which stay as they are even if the function
        writes into what it is given.
    """
    if convention == "llamacpp":
        given_ids: Any = np.array(tokens, np.int64)
        given: Any = np.array(to_numpy(logits)[0], np.float32)
    else:
        # Whoever made the function has imported its library, so this imports nothing.
        module = sys.modules[_MODULES[convention]]
        same = library_of(logits) == _MODULES[convention].partition(".")[0]
        host = None if same else np.array(to_numpy(logits), np.float32)
        if convention == "transformers":
            given = logits.clone() if host is None else module.from_numpy(host)
            given_ids = module.tensor(np.array(tokens[None], np.int64), device=given.device)
        else:
            given = module.array(logits if host is None else host)
            given_ids = module.array(np.asarray(tokens, np.int32))
    result = function(given_ids, given)
    shape = tuple(getattr(result, "shape", ()))
    if shape != tuple(given.shape):
        raise BackendError(
            f"processor: {function!r} returned shape {shape} for logits {tuple(given.shape)}"
        )
    if library_of(result) == library_of(logits):
        return array_namespace(logits).reshape(result, tuple(logits.shape))
    values = np.array(to_numpy(result), np.float32).reshape(tuple(logits.shape))
    return asarray_like(values, logits, dtype=logits.dtype)


@dataclass(frozen=True, kw_only=True)
class Processor(Stage):
    """A function ``(token_ids, logits) -> logits`` from transformers, mlx-lm or llama-cpp-python.

    It runs on any engine; where the function's library is not the engine's, logits travel through
    the host. Each row is given on its own, as histories differ in length. Profiles cannot name
    one: it is built in Python, or comes from a package as a stage of its own.

    Parameters
    ----------
    function : callable
    convention : {"transformers", "mlx", "llamacpp"}
        Shapes and library that the function expects, see :func:`apply_processor`.
    """

    name: ClassVar[str] = "processor"
    changes_argmax: ClassVar[bool] = True
    by_id: ClassVar[bool] = True
    needs_history: ClassVar[bool] = True
    function: Callable[[Any, Any], Any]
    convention: str = "transformers"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UsageError(f"{self.name}: function must be callable, got {self.function!r}")
        if self.convention not in CONVENTIONS:
            raise UsageError(
                f"{self.name}: convention must be one of {', '.join(CONVENTIONS)}, "
                f"got {self.convention!r}"
            )
        module = _MODULES.get(self.convention)
        if module is not None and module not in sys.modules:
            raise UsageError(
                f"{self.name}: convention {self.convention!r} needs {module} to be imported first"
            )

    def __call__(self, logits: Array, context: Context) -> Array:
        rows = [
            apply_processor(self.function, logits[row : row + 1, :], tokens, self.convention)
            for row, tokens in enumerate(context.history)
        ]
        return rows[0] if len(rows) == 1 else array_namespace(logits).concat(rows, axis=0)
