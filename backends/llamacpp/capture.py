"""Hidden states and attention weights, read from the graph while it is computed.

The engine calls :class:`Capture` for every node of a graph: first to ask whether the node is
wanted, then, if so, with its data ready. A call with several micro-batches runs several graphs;
the pieces arrive in order.

Flash attention never stores its weights, so they are computed again from what that node reads:
queries, the cached keys, and the mask (which holds causality, windows and draft trees alike).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.core.errors import BackendError

from . import lib
from .handles import FloatArray
from .lib import llama

_CACHE_LAYER = re.compile(rb"cache_k_l(\d+)")


class Capture:
    """Evaluation callback of one context.

    Between calls nothing is wanted; :meth:`begin` says what the next one should collect.

    Parameters
    ----------
    track : bool
        Also record the cell in which each new token is stored.

    Attributes
    ----------
    function : ctypes callback
        For ``llama_context_params.cb_eval``.
    """

    def __init__(self, *, track: bool = False) -> None:
        self._flash = lib.op_code(b"FLASH_ATTN_EXT")
        self._set_rows = lib.op_code(b"SET_ROWS")
        self._track = track
        self._names: dict[bytes, int] = {}
        self._attention: frozenset[int] = frozenset()
        self.hidden: dict[int, list[FloatArray]] = {}
        self.weights: dict[int, list[FloatArray]] = {}
        self._places: dict[int, list[int]] = {}
        self._pools: dict[int, int] = {}  # address of a list of cells -> its first layer
        self._newest = -1
        self.pool_of: dict[int, int] = {}
        self.error: BaseException | None = None
        self.function = llama.ggml_backend_sched_eval_callback(self._call)

    def begin(self, hidden: tuple[int, ...] = (), attentions: tuple[int, ...] = ()) -> None:
        """Want these layers from the next call (hidden state i is the output of layer i - 1)."""
        self._names = {b"l_out-%d" % (i - 1): i for i in hidden if i > 0}
        self._attention = frozenset(attentions)
        self.hidden = {i: [] for i in self._names.values()}
        self.weights = {i: [] for i in attentions}
        self._places = {}
        self.error = None

    def take_places(self) -> dict[int, list[int]]:
        """Return the cells of the tokens computed since this was last asked, and forget them.

        Layers with a sliding window have a pool of cells apart from the others; a pool goes by the
        number of its first layer, and ``pool_of`` gives the pool of each layer.
        """
        places, self._places = self._places, {}
        return places

    def end(self) -> None:
        """Want nothing any more; raise what went wrong in the callback."""
        self._names, self._attention = {}, frozenset()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _call(self, address: int, ask: bool, _data: object) -> bool:
        # An exception that leaves here would only be printed, and the engine would go on with
        # stale numbers and call it success.
        try:
            if self.error is None:
                return self._ask(address) if ask else self._take(address)
        except BaseException as error:
            self.error = error
        return not ask  # the data phase continues the graph, the asking phase wants nothing

    def _ask(self, address: int) -> bool:
        node = lib.Tensor.from_address(address)
        if self._attention and node.op == self._flash:
            return _layer(node) in self._attention
        if self._names and node.name in self._names:
            return True
        if self._track and node.op == self._set_rows:
            match = _CACHE_LAYER.match(node.name)
            if match:
                self._note_places(int(match[1]), node.src[1])
        return False

    def _note_places(self, layer: int, cells: int) -> None:
        if layer <= self._newest:  # a new graph: addresses may mean something else now
            self._pools = {}
        self._newest = layer
        pool = self._pools.setdefault(cells, layer)
        self.pool_of[layer] = pool
        if pool == layer:
            self._places.setdefault(pool, []).extend(_read(cells).reshape(-1).tolist())

    def _take(self, address: int) -> bool:
        node = lib.Tensor.from_address(address)
        if node.op == self._flash:
            self.weights[_layer(node)].append(_attention(node))
        else:
            self.hidden[self._names[node.name]].append(_read(address).reshape(-1, node.ne[0]))
        return True


def _layer(node: Any) -> int:
    match = _CACHE_LAYER.match(lib.Tensor.from_address(node.src[1]).name)
    return int(match[1]) if match else -1


def _read(address: int) -> npt.NDArray[Any]:
    """Return a tensor's values, shape slowest dimension first, whatever its strides."""
    tensor = lib.Tensor.from_address(address)
    kinds: dict[int, Any] = {
        lib.F32: np.float32,
        lib.F16: np.float16,
        lib.I32: np.int32,
        lib.I64: np.int64,
    }
    if tensor.type not in kinds:
        raise BackendError(f"llama.cpp: node {tensor.name!r} has type {tensor.type}")
    dtype = np.dtype(kinds[tensor.type])
    raw = np.empty(lib.ggml_nbytes(address), np.uint8)
    lib.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    return np.lib.stride_tricks.as_strided(
        raw[: raw.nbytes // dtype.itemsize * dtype.itemsize].view(dtype),
        tuple(reversed(tensor.ne)),
        tuple(reversed(tensor.nb)),
    )


def _attention(node: Any) -> FloatArray:
    """Return softmax weights (H, n, cells) of a flash-attention node for one row of tokens."""
    if node.src[4]:
        raise BackendError("llama.cpp: attention with sinks has no plain softmax weights")
    query = _read(node.src[0])[0]  # (H, n, d)
    key = _read(node.src[1])[0].astype(np.float32)  # (Hkv, cells, d)
    mask = _read(node.src[3])[0, 0].astype(np.float32)  # (n or more, cells)
    scale, bias, cap = np.array(node.op_params[:3], np.int32).view(np.float32)
    if bias:
        raise BackendError("llama.cpp: attention with position biases is not supported")
    heads, n, width = query.shape
    group = heads // key.shape[0]
    score = query.reshape(key.shape[0], group * n, width) @ key.transpose(0, 2, 1)
    score = score.reshape(heads, n, -1)
    if cap:
        score = cap * np.tanh(score * (scale / cap))
    else:
        score *= scale
    score += mask[:n]
    score -= score.max(axis=-1, keepdims=True)
    np.exp(score, out=score)
    weights: FloatArray = score / score.sum(axis=-1, keepdims=True)
    return weights
