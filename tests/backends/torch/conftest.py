"""Fixtures of the tests of the torch adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steersman.backends.torch import open_model
from steersman.core.model import Model

from ..tiny_torch import hf_source
from .torch_support import Opener


@pytest.fixture(scope="session")
def opened(tiny_folder: Callable[[str], Path]) -> Opener:
    """Open a tiny model, once for each set of options."""
    models: dict[Any, Model] = {}

    def get(name: str, path: str = "auto", **options: Any) -> Model:
        key = (name, path, *sorted(options.items()))
        if key not in models:
            source = hf_source(tiny_folder(name))
            models[key] = open_model(source, path=path, threads=1, **options)
        return models[key]

    return get
