"""Models from the Hugging Face hub: which files of a repository, and what its cache holds.

Weights come as GGUF or safetensors only; code and pickles in a repository are never fetched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import InvalidInput, MissingDependency, MissingFile, SteersmanError, UsageError

DEFAULT_QUANT = "Q4_K_M"
# Tried in this order where a repository has no Q4_K_M and none was asked for.
_NEXT_BEST = ("Q4_K_S", "Q4_1", "Q4_0", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "F16", "F32")
_WANTED = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def is_offline() -> bool:
    """Whether ``$HF_HUB_OFFLINE`` forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def choose_gguf(repo: str, files: Sequence[str], quant: str | None) -> str | None:
    """Return the GGUF file of a repository to use; None where it has none.

    Parameters
    ----------
    repo : str
        For messages.
    files : sequence of str
        All files of the repository.
    quant : str or None
        Quantisation wanted, such as ``"Q8_0"``; None for Q4_K_M or the nearest to it.

    Raises
    ------
    MissingFile
        There are GGUF files, but none of this quantisation.
    UsageError
        The file is split into several.
    """
    weights = [
        file
        for file in files
        if file.lower().endswith(".gguf")
        and not re.search(r"mmproj|imatrix", os.path.basename(file), re.IGNORECASE)
    ]
    if not weights:
        return None
    for wanted in [quant] if quant else [DEFAULT_QUANT, *_NEXT_BEST]:
        pattern = re.compile(rf"(^|[-._/]){re.escape(wanted)}([-.]|$)", re.IGNORECASE)
        found = sorted((f for f in weights if pattern.search(f)), key=lambda f: (len(f), f))
        if found:
            break
    else:
        if quant:
            names = ", ".join(sorted(weights)[:12])
            raise MissingFile(f"--model {repo}:{quant}: no such quantisation; it has {names}")
        found = sorted(weights, key=lambda f: (len(f), f))
    if _SPLIT.search(found[0]):
        raise UsageError(
            f"--model {repo}: {found[0]} is one of several pieces; "
            "join them with llama-gguf-split --merge and give the file"
        )
    return found[0]


def fetch(repo: str, quant: str | None, *, offline: bool) -> tuple[Literal["gguf", "hf"], Path]:
    """Return the files of a hub repository; the hub is asked only for what the cache lacks.

    Raises
    ------
    MissingFile
        No such repository, no access, or it is not cached and the hub cannot be asked.
    """
    name = f"{repo}:{quant}" if quant else repo
    cached = _cached(repo, quant)
    if cached is not None:
        return cached
    if offline or is_offline():
        raise MissingFile(
            f"--model {name}: no such file or folder, not in the hub's cache, "
            "and the hub is not asked (offline)"
        )
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingDependency(
            "huggingface-hub is not installed; run: pip install huggingface-hub"
        ) from None
    try:
        return _download(hub, repo, quant)
    except errors.GatedRepoError:
        raise MissingFile(
            f"--model {name}: access must be granted on the hub first; then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise MissingFile(f"--model {name}: no such file, folder or hub repository") from None
    except SteersmanError:
        raise
    except Exception as error:  # the hub client raises many kinds for one cause
        raise MissingFile(
            f"--model {name}: no such file or folder, not in the hub's cache, "
            f"and the hub cannot be reached ({type(error).__name__})"
        ) from None


def _download(hub: Any, repo: str, quant: str | None) -> tuple[Literal["gguf", "hf"], Path]:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = not sys.stderr.isatty()
            kwargs.pop("name", None)  # the hub's own addition
            super().__init__(*args, **kwargs)

    # model_info asks once; listing the files would try five times when there is no network.
    siblings = hub.HfApi().model_info(repo, timeout=10).siblings or []
    files = [sibling.rfilename for sibling in siblings]
    chosen = choose_gguf(repo, files, quant)
    if chosen is not None:
        return "gguf", Path(hub.hf_hub_download(repo, chosen, tqdm_class=Bar))
    if quant:
        raise UsageError(f"--model {repo}:{quant}: it has no GGUF files; leave out :{quant}")
    if "config.json" not in files or not any(f.endswith(".safetensors") for f in files):
        raise InvalidInput(f"--model {repo}: it has neither GGUF nor safetensors weights")
    return "hf", Path(hub.snapshot_download(repo, allow_patterns=list(_WANTED), tqdm_class=Bar))


def hub_cache() -> Path:
    """Return the hub's cache folder, found as huggingface_hub finds it."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def _snapshots(repo_folder: Path) -> list[Path]:
    """Return the cached snapshots of a repository, the one that ``main`` names first."""
    snapshots = sorted(repo_folder.glob("snapshots/*"), key=lambda p: p.name)
    with contextlib.suppress(OSError):
        main = (repo_folder / "refs" / "main").read_text().strip()
        snapshots.sort(key=lambda p: p.name != main)
    return snapshots


def _cached(repo: str, quant: str | None) -> tuple[Literal["gguf", "hf"], Path] | None:
    for snapshot in _snapshots(hub_cache() / f"models--{repo.replace('/', '--')}"):
        files = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
        chosen = choose_gguf(repo, files, quant)
        if chosen is not None:
            return "gguf", snapshot / chosen
        if not quant and _is_whole(snapshot, files):
            return "hf", snapshot
    return None


def _is_whole(snapshot: Path, files: Sequence[str]) -> bool:
    """Whether a cached safetensors snapshot holds every file that its index names."""
    if "config.json" not in files or "tokenizer.json" not in files:
        return False
    if "model.safetensors.index.json" not in files:
        return any(file.endswith(".safetensors") for file in files)
    try:
        index = json.loads((snapshot / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return set(index["weight_map"].values()) <= set(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def cached_models() -> Iterator[tuple[str, Path, int]]:
    """Yield (name, path, bytes) of every usable model in the hub's cache; nothing is opened."""
    for folder in sorted(hub_cache().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in _snapshots(folder)[:1]:
            files = [path for path in snapshot.rglob("*") if path.is_file()]
            gguf = sorted(path for path in files if path.suffix == ".gguf")
            for path in gguf:
                yield f"{repo}:{path.stem}", path, path.stat().st_size
            weights = [path for path in files if path.suffix == ".safetensors"]
            if weights and not gguf and (snapshot / "config.json").is_file():
                yield repo, snapshot, sum(path.stat().st_size for path in weights)
