"""Fixtures of the tests of the llama.cpp adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steersman.backends.llamacpp import open_model

from .llamacpp_support import TEXT, source


@pytest.fixture(scope="session")
def ids(llamacpp_model: Any) -> list[int]:
    found: list[int] = llamacpp_model.tokenizer.encode(TEXT)
    assert len(found) > 60
    return found


@pytest.fixture
def another(llamacpp_model: Any) -> Iterator[Any]:
    path = Path(llamacpp_model.info.path)
    with open_model(source(path), threads=1, context=256) as model:
        yield model
