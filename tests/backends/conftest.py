"""Fixtures of the tests of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny_torch import write_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model, made once."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch").set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else write_tiny(name, path)

    return folder
