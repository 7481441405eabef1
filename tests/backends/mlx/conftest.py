"""Fixtures of the tests of the mlx adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steersman.backends.mlx import open_model
from steersman.core.model import Model

from ..tiny_torch import hf_source
from .mlx_support import Opener


@pytest.fixture(scope="session")
def opened(tiny_folder: Callable[[str], Path]) -> Opener:
    """Open a tiny model once."""
    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = open_model(hf_source(tiny_folder(name)), threads=1, dtype="float32")
        return models[name]

    return get
