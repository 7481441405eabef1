"""The array libraries that formulas are tested on."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest


class Library:
    """One array library under test: ``lib.xp`` is its namespace, ``lib(values)`` makes an array."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "numpy":
            self.xp: Any = importlib.import_module("array_api_compat.numpy")
        elif name == "strict":
            self.xp = pytest.importorskip("array_api_strict")
        elif name == "torch":
            pytest.importorskip("torch").set_num_threads(1)
            self.xp = importlib.import_module("array_api_compat.torch")
        else:
            mx = pytest.importorskip("mlx.core")
            from steersman.core.array import array_namespace

            self.xp = array_namespace(mx.array(0))

    def __call__(self, values: Any, dtype: Any = np.float32) -> Any:
        array = np.asarray(values, dtype)
        if self.name == "mlx" and array.dtype == np.float64:
            array = array.astype(np.float32)
        if self.name == "mlx" and array.dtype == np.int64:
            array = array.astype(np.int32)
        return self.xp.asarray(array.copy())
