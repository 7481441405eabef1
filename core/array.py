"""Array namespaces: one way to write array code for numpy, array-api-strict, torch and mlx.

``array_namespace(x)`` returns a namespace with the array-API functions. array-api-strict is used as
it is, numpy and torch through array-api-compat (numpy's own sorts take no ``descending``), and mlx
through a thin shim over ``mlx.core`` (what it adds and lacks is listed in the class).
Nothing here imports a framework: the namespace is found from the array.

Rules for array code in core:

- write on ``(..., V)``, look ``xp`` up once and pass it on;
- no boolean-mask indexing and no ``nonzero``: shapes must not depend on data;
- integer arrays from ``argmax`` and ``argsort`` are signed here on every library;
- read back to the host once per step, with :func:`to_numpy`.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = Any


# Functions that take ``device=`` in the standard; mlx arrays have no device.
_BLOCK = 256
_PLACED = frozenset(
    {"empty", "empty_like", "eye", "full_like", "linspace", "ones_like", "zeros_like"}
)


class _MLXNamespace:
    """``mlx.core`` with the array-API spellings that steersman's array code uses.

    Index results are cast to int32 (mlx gives uint32, where ``argmax - 5`` wraps around); sorts
    take ``descending``; ``astype`` takes ``copy``, ``sum`` ``dtype``, ``cumulative_sum``
    ``include_initial``, ``var`` and ``std`` ``correction``, and creation ``device``. Boolean-mask
    reading, ``nonzero`` and ``unique_*`` stay absent: their shapes depend on data.
    """

    def __init__(self, module: ModuleType) -> None:
        self._mx: Any = module
        self.bool = module.bool_
        self.__name__ = "steersman.mlx"

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._mx, name)
        if name not in _PLACED:
            return function

        def place_here(*args: Any, device: Any = None, **kwargs: Any) -> Array:
            return function(*args, **kwargs)

        return place_here

    def argmax(self, x: Array, /, *, axis: int | None = None, keepdims: bool = False) -> Array:
        return self._mx.argmax(x, axis=axis, keepdims=keepdims).astype(self._mx.int32)

    def argmin(self, x: Array, /, *, axis: int | None = None, keepdims: bool = False) -> Array:
        return self._mx.argmin(x, axis=axis, keepdims=keepdims).astype(self._mx.int32)

    def argsort(
        self, x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True
    ) -> Array:
        # mlx sorts stably, so turning the values round keeps the order of ties.
        key = self._turned(x) if descending else x
        return self._mx.argsort(key, axis=axis).astype(self._mx.int32)

    def sort(
        self, x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True
    ) -> Array:
        if not descending:
            return self._mx.sort(x, axis=axis)
        return self._turned(self._mx.sort(self._turned(x), axis=axis))

    def _turned(self, x: Array) -> Array:
        """Return values that sort the other way round; twice gives ``x`` again."""
        if x.dtype == self._mx.bool_:
            return self._mx.logical_not(x)
        # -x - 1 where -x would overflow (the least integer) or wrap round (unsigned zero).
        return -x if self._mx.issubdtype(x.dtype, self._mx.floating) else ~x

    def searchsorted(self, x1: Array, x2: Array, /, *, side: str = "left") -> Array:
        # Counting is exact for any batch shape and needs no per-row loop.
        compare = x1[..., None, :] < x2[..., :, None]
        if side == "right":
            compare = x1[..., None, :] <= x2[..., :, None]
        return self._mx.sum(compare.astype(self._mx.int32), axis=-1)

    def astype(self, x: Array, dtype: Any, /, *, copy: bool = True, device: Any = None) -> Array:
        return x.astype(dtype)

    def sum(
        self, x: Array, /, *, axis: Any = None, dtype: Any = None, keepdims: bool = False
    ) -> Array:
        x = x if dtype is None else x.astype(dtype)
        size = x.shape[-1] if x.ndim else 0
        if axis not in (-1, x.ndim - 1) or size < 4 * _BLOCK:
            return self._mx.sum(x, axis=axis, keepdims=keepdims)
        # The CPU build adds float32 one by one, which costs a vocabulary's sum two digits.
        even = size - size % _BLOCK
        blocks = self._mx.unflatten(x[..., :even], -1, (-1, _BLOCK))
        total = self._mx.sum(self._mx.sum(blocks, axis=-1), axis=-1, keepdims=keepdims)
        return total + self._mx.sum(x[..., even:], axis=-1, keepdims=keepdims)

    def var(
        self, x: Array, /, *, axis: Any = None, correction: float = 0, keepdims: bool = False
    ) -> Array:
        return self._mx.var(x, axis=axis, ddof=int(correction), keepdims=keepdims)

    def std(
        self, x: Array, /, *, axis: Any = None, correction: float = 0, keepdims: bool = False
    ) -> Array:
        return self._mx.std(x, axis=axis, ddof=int(correction), keepdims=keepdims)

    def asarray(
        self, obj: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None
    ) -> Array:
        array = obj if isinstance(obj, self._mx.array) and not copy else self._mx.array(obj)
        return array if dtype is None else array.astype(dtype)

    def zeros(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Array:
        return self._mx.zeros(shape, dtype=dtype or self._mx.float32)

    def ones(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Array:
        return self._mx.ones(shape, dtype=dtype or self._mx.float32)

    def full(self, shape: Any, value: Any, *, dtype: Any = None, device: Any = None) -> Array:
        return self._mx.full(shape, value, dtype=dtype)

    def arange(
        self,
        start: Any,
        /,
        stop: Any = None,
        step: Any = 1,
        *,
        dtype: Any = None,
        device: Any = None,
    ) -> Array:
        if stop is None:
            start, stop = 0, start
        return self._mx.arange(start, stop, step, dtype=dtype)

    def permute_dims(self, x: Array, /, axes: tuple[int, ...]) -> Array:
        return self._mx.transpose(x, axes)

    def cumulative_sum(
        self,
        x: Array,
        /,
        *,
        axis: int | None = None,
        dtype: Any = None,
        include_initial: bool = False,
    ) -> Array:
        axis = -1 if axis is None else axis
        total = self._mx.cumsum(x if dtype is None else x.astype(dtype), axis=axis)
        if not include_initial:
            return total
        shape = list(total.shape)
        shape[axis] = 1
        return self._mx.concatenate([self._mx.zeros(shape, dtype=total.dtype), total], axis=axis)

    def clip(self, x: Array, /, min: Any = None, max: Any = None) -> Array:
        return self._mx.clip(x, min, max)


@lru_cache(maxsize=1)
def _mlx_namespace() -> _MLXNamespace:
    return _MLXNamespace(sys.modules["mlx.core"])


def library_of(x: Any) -> str:
    """Return the top-level module that ``x``'s type comes from: "numpy", "torch", "mlx" ..."""
    return type(x).__module__.partition(".")[0]


def is_mlx(x: Any) -> bool:
    """Whether ``x`` is an mlx array (without importing mlx)."""
    return library_of(x) == "mlx"


def is_on_host(x: Array) -> bool:
    """Whether reading ``x`` as a NumPy array costs at most a copy within one memory.

    True for numpy and array-api-strict, for torch tensors on the CPU, and for mlx, whose arrays
    live in memory that the host shares.
    """
    if isinstance(x, np.ndarray) or is_mlx(x):
        return True
    return getattr(device_of(x), "type", "cpu") == "cpu"


def wide_dtype(x: Array) -> Any:
    """Return the float type to accumulate in beside ``x``: float64 where its device has one.

    mlx (no float64 on its GPU) and torch on Apple GPUs accumulate in float32.
    """
    xp = array_namespace(x)
    if is_mlx(x) or getattr(device_of(x), "type", "") == "mps":
        return xp.float32
    return xp.float64


def library_module(x: Array) -> Any:
    """Return the already imported top-level module of ``x``'s library (never imports one)."""
    return sys.modules["mlx.core" if is_mlx(x) else library_of(x)]


@lru_cache(maxsize=1)
def _numpy_namespace() -> Any:
    import array_api_compat.numpy  # copies all of numpy, f2py included: slow, so not before needed

    return array_api_compat.numpy


def array_namespace(*arrays: Array) -> Any:
    """Return the array namespace of ``arrays`` (about 1 µs; look it up once per step).

    Raises
    ------
    TypeError
        The arrays belong to different libraries or to none that is known.
    """
    first = arrays[0]
    if type(first) is np.ndarray:
        return _numpy_namespace()
    if is_mlx(first):
        return _mlx_namespace()
    import array_api_compat

    return array_api_compat.array_namespace(*arrays)


def to_numpy(x: Array) -> npt.NDArray[Any]:
    """Return ``x`` as a NumPy array on the host; the one deliberate device-to-host copy."""
    if isinstance(x, np.ndarray):
        return x
    if is_mlx(x):
        mx = sys.modules["mlx.core"]
        if x.dtype in (mx.bfloat16,):
            x = x.astype(mx.float32)
        return np.array(x)
    if hasattr(x, "detach"):
        x = x.detach()
        if str(x.dtype) == "torch.bfloat16":
            x = x.float()
        return np.asarray(x.cpu())
    return np.asarray(x)


def device_of(x: Array) -> Any:
    """Return the device to create new arrays on beside ``x``; None where there is no choice."""
    if is_mlx(x):
        return None
    import array_api_compat

    return array_api_compat.device(x)


def asarray_like(values: Any, like: Array, *, dtype: Any = None) -> Array:
    """Return host ``values`` as an array of the library and on the device of ``like``."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, dtype=dtype)
    xp = array_namespace(like)
    if is_mlx(like):
        return xp.asarray(values, dtype=dtype)
    return xp.asarray(values, dtype=dtype, device=device_of(like))
