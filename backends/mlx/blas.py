"""A fast BLAS for the Linux CPU build of mlx, which ships netlib's reference one.

``libmlx`` calls ``cblas_sgemm`` through the dynamic linker, so a library that exports it globally
*before* ``mlx.core`` is loaded takes its place: prefill becomes about twelve times faster. An
OpenBLAS installed on the system is used as it is. Otherwise the one inside numpy's wheel is used;
its functions carry a prefix and 64-bit integers, so a shim of a few lines is compiled once with the
system's C compiler into the cache folder. Nothing happens on macOS (Accelerate) or CUDA builds.

``STEERSMAN_MLX_BLAS`` may be ``off`` or the path of a library that exports ``cblas_sgemm``.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steersman.core.errors import InvalidInput, UsageError

ENV = "STEERSMAN_MLX_BLAS"

# numpy's OpenBLAS takes 64-bit integers; the caller passes 32-bit ones, partly on the stack, so a
# function has to stand in between. The pointer is set at run time: the shim outlives numpy updates.
_SHIM = """\
#ifdef __cplusplus
extern "C" {
#endif
typedef long long wide;
typedef void (*sgemm64)(int, int, int, wide, wide, wide, float, const float *, wide,
                        const float *, wide, float, float *, wide);
sgemm64 steersman_sgemm64 = 0;
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  steersman_sgemm64(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
#ifdef __cplusplus
}
#endif
"""
_SYSTEM = ("libopenblas.so.0", "libopenblasp.so.0")


@dataclass(frozen=True, kw_only=True)
class Blas:
    """Which BLAS serves mlx in this process.

    Attributes
    ----------
    name : str
        One line for people: the library, or why none was put in front.
    replaced : bool
        True when a library of ours comes first.
    """

    name: str
    replaced: bool = False
    set_threads: Callable[[int], object] | None = None
    get_threads: Callable[[], int] | None = None


_lock = threading.Lock()
_state: Blas | None = None


def prepare() -> Blas:
    """Put a fast BLAS in front of mlx's own; call it before anything imports ``mlx.core``.

    Runs once per process (later calls return the first answer) and takes a few milliseconds; the
    very first run on a machine may compile the shim, which takes about 0.1 s. It never fails for
    want of a library: then mlx computes with its own.

    Raises
    ------
    InvalidInput
        ``STEERSMAN_MLX_BLAS`` names a file that does not serve.
    """
    global _state
    with _lock:
        if _state is None:
            _state = _choose()
        return _state


def describe() -> str:
    """Return which BLAS serves mlx, or what :func:`prepare` has to go on; loads nothing."""
    return "chosen when mlx is first used" if _state is None else _state.name


def set_threads(threads: int | None) -> int | None:
    """Let the BLAS use ``threads`` threads (None: leave it) and return how many it uses.

    numpy shares its OpenBLAS with mlx, so this holds for numpy's matrix products too.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: must be at least 1")
    blas = prepare()
    if blas.set_threads is None or blas.get_threads is None:
        return None
    if threads is not None:
        blas.set_threads(threads)
    return int(blas.get_threads())


def _choose() -> Blas:
    wanted = os.environ.get(ENV, "")
    if wanted == "off":
        return Blas(name=f"mlx's own ({ENV}=off)")
    if not sys.platform.startswith("linux") or not _is_cpu_build():
        return Blas(name="mlx's own")
    if "mlx.core" in sys.modules:
        return Blas(name="mlx's own (mlx.core was imported before steersman could replace it)")
    if wanted:
        return _plain(wanted)
    for name in _SYSTEM:
        with contextlib.suppress(InvalidInput):
            return _plain(name)
    try:
        return _from_numpy()
    except (OSError, InvalidInput, subprocess.SubprocessError) as error:
        return Blas(name=f"mlx's own (slow: {error})")


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _plain(name: str) -> Blas:
    """Load a library that exports ``cblas_sgemm`` under that very name."""
    library = _promote(name, name)
    return Blas(
        name=name,
        replaced=True,
        set_threads=getattr(library, "openblas_set_num_threads", None),
        get_threads=getattr(library, "openblas_get_num_threads", None),
    )


def _from_numpy() -> Blas:
    folder = Path(np.__file__).resolve().parent.parent / "numpy.libs"
    found = sorted(folder.glob("libscipy_openblas64_*.so*"))
    if not found:
        raise InvalidInput(
            f"numpy brings no OpenBLAS; install libopenblas0, or set {ENV} to a library"
        )
    openblas = ctypes.CDLL(str(found[0]))  # numpy has loaded it already
    target = ctypes.cast(openblas.scipy_cblas_sgemm64_, ctypes.c_void_p).value
    shim = _shim()

    def connect(library: ctypes.CDLL) -> None:
        ctypes.c_void_p.in_dll(library, "steersman_sgemm64").value = target

    _promote(str(shim), f"numpy's {found[0].name}", connect)
    return Blas(
        name=f"OpenBLAS of numpy {np.__version__}",
        replaced=True,
        set_threads=openblas.scipy_openblas_set_num_threads64_,
        get_threads=openblas.scipy_openblas_get_num_threads64_,
    )


def _promote(
    path: str, name: str, connect: Callable[[ctypes.CDLL], None] | None = None
) -> ctypes.CDLL:
    """Load privately, try it out, and only then make its symbols visible to mlx."""
    try:
        library = ctypes.CDLL(path, mode=os.RTLD_LOCAL)
        sgemm = library.cblas_sgemm
    except (OSError, AttributeError) as error:
        raise InvalidInput(f"{ENV}: {name} does not serve as BLAS ({error})") from None
    if connect is not None:
        connect(library)
    if not _multiplies(sgemm):
        raise InvalidInput(f"{ENV}: cblas_sgemm of {name} gives wrong products")
    return ctypes.CDLL(path, mode=os.RTLD_GLOBAL)


def _multiplies(sgemm: Callable[..., object]) -> bool:
    """Whether ``sgemm`` takes 32-bit integers and multiplies correctly (a transposed case)."""
    a = np.arange(6, dtype=np.float32).reshape(3, 2)
    b = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
    c = np.full((2, 4), np.nan, np.float32)
    row_major, trans = 101, 112
    number, scalar = ctypes.c_int, ctypes.c_float

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return array.ctypes.data_as(ctypes.c_void_p)

    sgemm(
        *(number(i) for i in (row_major, trans, trans, 2, 4, 3)),
        scalar(1.0),
        *(pointer(a), number(2), pointer(b), number(3)),
        scalar(0.0),
        *(pointer(c), number(4)),
    )
    return bool((c == a.T @ b.T).all())


def _shim() -> Path:
    """Return the compiled shim, made now if it is not in the cache folder."""
    from steersman.core.paths import cache_dir

    folder = cache_dir() / "mlx"
    key = hashlib.sha256(f"{_SHIM}{platform.machine()}{platform.libc_ver()}".encode()).hexdigest()
    path = folder / f"blas-{key[:16]}.so"
    if path.exists():
        _check_owner(path)
        return path
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "c++", "g++"))), None)
    if compiler is None:
        raise InvalidInput(f"no C compiler for the BLAS shim; install one or libopenblas0 ({ENV})")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, built = Path(scratch, "shim.c"), Path(scratch, "shim.so")
        source.write_text(_SHIM)
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(source)],
            check=True,
            capture_output=True,
            timeout=60,
        )
        built.chmod(0o700)
        os.replace(built, path)  # another process may do the same: either file is whole
    return path


def _check_owner(path: Path) -> None:
    """A library that somebody else could have written is not loaded."""
    facts = path.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InvalidInput(f"{path}: not owned by you alone; delete it")
