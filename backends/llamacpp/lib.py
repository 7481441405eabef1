"""The parts of libllama and libggml that the adapter calls, bound through ctypes.

``llama_cpp`` (the low-level wrapper) covers ``llama_*``; what it lacks of ``ggml_*`` is declared
here, from the same shared libraries, so that both see one set of tensors. Importing this module
loads the engine and silences its log.
"""

from __future__ import annotations

import collections
import ctypes
import threading
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as llama
from llama_cpp._ctypes_extensions import load_shared_library

__all__ = ["llama", "llama_cpp"]

_P = ctypes.c_void_p
_FOLDER = Path(llama_cpp.__file__).parent / "lib"
_base = load_shared_library("ggml-base", _FOLDER)
try:
    _cpu = load_shared_library("ggml-cpu", _FOLDER)
except FileNotFoundError:  # builds that choose among CPU variants at run time name it otherwise
    _cpu = None


class Tensor(ctypes.Structure):
    """``struct ggml_tensor``; :func:`check_layout` compares it with the loaded library."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _P),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _P * 10),
        ("view_src", _P),
        ("view_offs", ctypes.c_size_t),
        ("data", _P),
        ("name", ctypes.c_char * 64),
        ("extra", _P),
        ("padding", ctypes.c_char * 8),
    )


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", _P),
        ("no_alloc", ctypes.c_bool),
    )


def _declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype = result
    function.argtypes = list(arguments)
    return function


ggml_init = _declare(_base, "ggml_init", _P, InitParams)
ggml_free = _declare(_base, "ggml_free", None, _P)
ggml_set_no_alloc = _declare(_base, "ggml_set_no_alloc", None, _P, ctypes.c_bool)
ggml_new_tensor_2d = _declare(
    _base, "ggml_new_tensor_2d", _P, _P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
)
ggml_new_tensor_1d = _declare(_base, "ggml_new_tensor_1d", _P, _P, ctypes.c_int, ctypes.c_int64)
ggml_set_name = _declare(_base, "ggml_set_name", _P, _P, ctypes.c_char_p)
ggml_get_data = _declare(_base, "ggml_get_data", _P, _P)
ggml_nbytes = _declare(_base, "ggml_nbytes", ctypes.c_size_t, _P)
ggml_rms_norm = _declare(_base, "ggml_rms_norm", _P, _P, _P, ctypes.c_float)
ggml_norm = _declare(_base, "ggml_norm", _P, _P, _P, ctypes.c_float)
ggml_mul = _declare(_base, "ggml_mul", _P, _P, _P, _P)
ggml_add = _declare(_base, "ggml_add", _P, _P, _P, _P)
ggml_mul_mat = _declare(_base, "ggml_mul_mat", _P, _P, _P, _P)
ggml_get_rows = _declare(_base, "ggml_get_rows", _P, _P, _P, _P)
ggml_new_graph = _declare(_base, "ggml_new_graph", _P, _P)
ggml_build_forward_expand = _declare(_base, "ggml_build_forward_expand", None, _P, _P)
ggml_graph_compute_with_ctx = _cpu and _declare(
    _cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, _P, _P, ctypes.c_int
)
ggml_backend_cpu_buffer_from_ptr = _declare(
    _base, "ggml_backend_cpu_buffer_from_ptr", _P, _P, ctypes.c_size_t
)
ggml_backend_buffer_free = _declare(_base, "ggml_backend_buffer_free", None, _P)
ggml_backend_tensor_alloc = _declare(_base, "ggml_backend_tensor_alloc", ctypes.c_int, _P, _P, _P)
ggml_backend_tensor_get = _declare(
    _base, "ggml_backend_tensor_get", None, _P, _P, ctypes.c_size_t, ctypes.c_size_t
)
_ggml_op_name = _declare(_base, "ggml_op_name", ctypes.c_char_p, ctypes.c_int)

F32, F16, I32, I64 = 0, 1, 26, 27


def check_layout() -> bool:
    """Return whether :class:`Tensor` matches the loaded library (checked on a real tensor)."""
    memory = ctypes.create_string_buffer(1 << 16)
    address = -(-ctypes.addressof(memory) // 64) * 64
    context = ggml_init(InitParams((1 << 16) - 64, address, False))
    try:
        pointer = ggml_new_tensor_2d(context, F32, 3, 5)
        ggml_set_name(pointer, b"layout")
        seen = Tensor.from_address(pointer)
        return (
            seen.name == b"layout"
            and seen.data == ggml_get_data(pointer)
            and (seen.type, list(seen.ne), list(seen.nb)) == (F32, [3, 5, 1, 1], [4, 12, 60, 60])
            and ggml_nbytes(pointer) == 60
        )
    finally:
        ggml_free(context)


def op_code(name: bytes) -> int | None:
    """Return the number of a graph operation in the loaded library, such as ``b"SET_ROWS"``."""
    for code in range(256):
        found = _ggml_op_name(code)
        if found == name:
            return code
        # The table ends with an operation called NONE only at 0; "?" or NULL ends it elsewhere.
        if code and (found is None or found == b"NONE"):
            return None
    return None


# -- log ----------------------------------------------------------------------------------------

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_errors: collections.deque[str] = collections.deque(maxlen=8)


def _forward_log(level: int, text: bytes | None, _data: object) -> None:
    # Creating a context alone logs hundreds of lines; only errors are kept, for our messages.
    if level == _ERROR and text:
        _errors.append(text.decode("utf-8", "replace"))


def last_error() -> str:
    """Return and forget what the engine last complained about, as one short printable line."""
    text = " ".join(_errors[-1].split()) if _errors else ""
    _errors.clear()
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


_log = llama.llama_log_callback(_forward_log)  # kept: the engine calls it for good
llama.llama_log_set(_log, None)

_started = threading.Lock()
_is_started = False


def start() -> None:
    """Initialise the engine once per process."""
    global _is_started
    with _started:
        if not _is_started:
            llama.llama_backend_init()
            _is_started = True
