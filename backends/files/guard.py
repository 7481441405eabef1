"""Checks of model files from outside, before an engine opens them in this process.

A GGUF file whose hash steersman does not ship is first read in a child process with limits on
memory and time: by our own strict reader, then, where llama.cpp is installed, by llama.cpp itself
(vocabulary only). A file that makes either of them fail, crash or run on ends in one line here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from steersman.core.errors import InvalidInput, MissingFile, SteersmanError, UsageError
from steersman.core.fingerprint import remember, remembered, stamp
from steersman.core.locate import ModelSource

from .gguf import read_header
from .hf_folder import check_hf_folder

SECONDS = 60  # wall time of the child; processor time is limited to half of it
MEMORY = 4 << 30  # beyond the size of the file
_ERRORS: dict[str, type[SteersmanError]] = {
    kind.__name__: kind for kind in (InvalidInput, MissingFile, UsageError)
}


def check_file(source: ModelSource) -> None:
    """Refuse a model file that is damaged or hostile.

    A verdict is remembered until the file or the installed llama.cpp changes; the first look takes
    about half a second.

    Parameters
    ----------
    source : ModelSource
        Trusted files are accepted without a look.

    Raises
    ------
    InvalidInput
        What is wrong with the file, in one line.
    MissingFile
        It is not there.
    """
    if source.kind == "hf":
        check_hf_folder(source.path)
        return
    if source.trusted:
        return
    try:
        key = f"{stamp(source.path)}|{_llama_cpp_version()}"
    except (OSError, ValueError):
        raise MissingFile(f"{source.path}: no such file") from None
    if remembered("verdicts").get(key) is True:
        return
    if sys.executable:
        _check_in_child(source.path)
    else:  # embedded without an interpreter to start: our own reader keeps to its limits anyway
        read_header(source.path)
    remember("verdicts", key, True)


def _llama_cpp_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("llama-cpp-python")
    return ""


def _check_in_child(path: Path) -> None:
    # -P keeps the current folder off the import path; the child needs no device and no credentials.
    command = [sys.executable, "-P", "-m", "steersman.backends.files.guard", str(path)]
    env = {k: v for k, v in os.environ.items() if "TOKEN" not in k and "SECRET" not in k}
    env |= {"CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InvalidInput(f"{path}: reading its header took more than {SECONDS} s") from None
    verdict = _last_json(done.stdout)
    if done.returncode == 0 and verdict.get("ok") is True:
        return
    if "message" in verdict:
        raise _ERRORS.get(str(verdict.get("kind")), InvalidInput)(str(verdict["message"]))
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-done.returncode).name
    raise InvalidInput(f"{path}: opening it in a test process failed ({how}); the file is unsafe")


def _last_json(output: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, IndexError):
        value = json.loads(output.splitlines()[-1])
        if isinstance(value, dict):
            return value
    return {}


# -- in the child ----------------------------------------------------------------------------


def _limit(path: Path) -> None:
    try:
        import resource
    except ImportError:  # Windows: only the time limit of the parent holds
        return
    size = os.path.getsize(path) if path.is_file() else 0
    for what, limit in (
        (resource.RLIMIT_AS, MEMORY + size),
        (resource.RLIMIT_CPU, SECONDS // 2),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 1 << 16),
    ):
        hard = resource.getrlimit(what)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses some of them
            resource.setrlimit(what, (soft, soft))


def _open_with_llama_cpp(path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        return
    import llama_cpp

    said: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, data: Any) -> None:
        if level >= 4:  # errors
            said.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(log, None)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        reason = " ".join(said[0].split())[:200] if said else "no reason given"
        raise InvalidInput(f"{path}: llama.cpp cannot open it: {reason}")
    llama_cpp.llama_model_free(model)


def _main(path: Path) -> None:
    _limit(path)
    try:
        read_header(path)
        _open_with_llama_cpp(path)
        verdict: dict[str, Any] = {"ok": True}
    except SteersmanError as error:
        verdict = {"kind": type(error).__name__, "message": str(error)}
    except MemoryError:
        verdict = {
            "kind": "InvalidInput",
            "message": f"{path}: its header asks for too much memory",
        }
    print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
