"""Embedding table, final norm and output projection, computed by ggml on the file's own bytes.

The weights stay quantised: a small graph per call runs the same kernels as the engine, on tensors
that point into the memory-mapped file, so ``head(hidden[L])`` equals the engine's logits bit for
bit and costs no second copy of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.backends.files.gguf import GGUFHeader, TensorInfo
from steersman.core.errors import BackendError

from . import lib
from .handles import FloatArray

_ROWS = 32  # positions per graph of the head: bounds the memory for large vocabularies
_TABLE_ROWS = 4096
_SLACK = 4 << 20  # graph, tensor headers and the kernels' scratch space


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Which tensors and constants make up the final norm and the projection.

    Attributes
    ----------
    rms : bool
        Root-mean-square norm; otherwise a layer norm.
    softcap : float
        ``c * tanh(logits / c)`` is applied where positive.
    """

    norm: TensorInfo
    norm_bias: TensorInfo | None
    output: TensorInfo
    output_bias: TensorInfo | None
    rms: bool
    epsilon: float
    softcap: float


class Weights:
    """Reads and applies single tensors of a GGUF file. Safe to share between threads.

    Parameters
    ----------
    header : GGUFHeader
    width, vocab_size : int
        What the engine says; a file whose tensors disagree gives no table or head.
    threads : int
    """

    def __init__(self, header: GGUFHeader, *, width: int, vocab_size: int, threads: int) -> None:
        self.width, self.vocab_size = width, vocab_size
        self._threads = threads
        self._file: npt.NDArray[np.uint8] = np.memmap(header.path, np.uint8, "r")
        tensors = header.tensors
        table = tensors.get("token_embd.weight")
        usable = lib.ggml_graph_compute_with_ctx is not None
        fits = table is not None and table.shape == (vocab_size, width)
        self.table = table if usable and fits else None
        self.head_spec = self._find_head(header) if usable else None
        self.scale = 1.0

    def close(self) -> None:
        """Let go of the file."""
        self._file = np.empty(0, np.uint8)
        self.table = self.head_spec = None
        self.__dict__.pop("embedding", None)

    def _find_head(self, header: GGUFHeader) -> HeadSpec | None:
        tensors, arch = header.tensors, header.architecture
        norm = tensors.get("output_norm.weight")
        output = tensors.get("output.weight") or self.table
        if norm is None or norm.shape != (self.width,) or norm.type != lib.F32:
            return None
        if output is None or output.shape != (self.vocab_size, self.width):
            return None
        biases = [tensors.get(f"{name}.bias") for name in ("output_norm", "output")]
        if any(bias is not None and bias.type != lib.F32 for bias in biases):
            return None
        rms = header.get(f"{arch}.attention.layer_norm_rms_epsilon", float)
        plain = header.get(f"{arch}.attention.layer_norm_epsilon", float)
        if rms is None and plain is None:
            return None
        return HeadSpec(
            norm=norm,
            norm_bias=biases[0],
            output=output,
            output_bias=biases[1],
            rms=rms is not None,
            epsilon=plain if rms is None else rms,
            softcap=header.get(f"{arch}.final_logit_softcapping", float, 0.0),
        )

    # -- what the model offers -------------------------------------------------------------

    def rows(self, ids: npt.NDArray[Any]) -> FloatArray:
        """Return unscaled rows (..., D) of the embedding table."""
        if self.table is None:
            raise BackendError("llama.cpp: the file has no embedding table of the usual form")
        flat = np.ascontiguousarray(ids, np.int32).reshape(-1)
        out = np.empty((len(flat), self.width), np.float32)
        for begin in range(0, len(flat), _TABLE_ROWS):
            part = flat[begin : begin + _TABLE_ROWS]
            with _Graph(part.size * (self.width * 4 + 8) + _SLACK) as graph:
                index = graph.new(lib.I32, part.size)
                graph.fill(index, part)
                rows = lib.ggml_get_rows(graph.context, self._tensor(graph, self.table), index)
                out[begin : begin + len(part)] = graph.run(rows, part.size, self._threads)
        return out.reshape(*np.shape(ids), self.width)

    def embed(self, ids: npt.NDArray[Any]) -> FloatArray:
        """Return rows (..., D) in the scale that soft tokens take."""
        rows = self.rows(ids)
        if self.scale != 1.0:
            rows *= np.float32(self.scale)
        return rows

    @cached_property
    def embedding(self) -> FloatArray:
        """The whole table (V, D), scaled; made at first use and kept."""
        return self.embed(np.arange(self.vocab_size))

    def norm(self, hidden: FloatArray) -> FloatArray:
        """Apply the final norm to (n, D)."""
        return self._apply(hidden, self.width, lambda graph, spec, x: x)

    def head(self, hidden: FloatArray) -> FloatArray:
        """Apply final norm and projection: (n, D) to (n, V)."""

        def project(graph: _Graph, spec: HeadSpec, x: int) -> int:
            y = lib.ggml_mul_mat(graph.context, self._tensor(graph, spec.output), x)
            if spec.output_bias is not None:
                y = lib.ggml_add(graph.context, y, self._tensor(graph, spec.output_bias))
            return int(y)

        logits = self._apply(hidden, self.vocab_size, project)
        cap = self.head_spec.softcap if self.head_spec is not None else 0.0
        if cap > 0:
            logits = np.float32(cap) * np.tanh(logits / np.float32(cap))
        return logits

    def _apply(
        self,
        hidden: FloatArray,
        width: int,
        then: Callable[[_Graph, HeadSpec, int], int],
    ) -> FloatArray:
        spec = self.head_spec
        if spec is None:
            raise BackendError("llama.cpp: the file has no final norm and projection we know")
        flat = np.ascontiguousarray(hidden, np.float32).reshape(-1, self.width)
        pieces = []
        for begin in range(0, len(flat), _ROWS):
            part = flat[begin : begin + _ROWS]
            size = len(part) * 4 * (2 * width + 12 * self.width) + _SLACK
            with _Graph(size) as graph:
                x = graph.new(lib.F32, self.width, len(part))
                graph.fill(x, part)
                norm = lib.ggml_rms_norm if spec.rms else lib.ggml_norm
                x = norm(graph.context, x, spec.epsilon)
                x = lib.ggml_mul(graph.context, x, self._tensor(graph, spec.norm))
                if spec.norm_bias is not None:
                    x = lib.ggml_add(graph.context, x, self._tensor(graph, spec.norm_bias))
                y = graph.run(then(graph, spec, x), len(part), self._threads)
            pieces.append(y)
        if not pieces:
            return np.empty((0, width), np.float32)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _tensor(self, graph: _Graph, info: TensorInfo) -> int:
        """Return a ggml tensor whose data are the file's bytes."""
        data = self._file[info.offset : info.offset + info.nbytes]
        if len(data) != info.nbytes:
            raise BackendError(f"llama.cpp: {info.name} is cut short, or the model is closed")
        return graph.borrow(info.type, info.shape, data)


class _Graph:
    """One ggml computation: a scratch memory of ``size`` bytes, freed on leaving.

    The arrays that :meth:`run` returns look into that memory and keep it.
    """

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size, np.uint8)
        self._kept: list[object] = []
        self._buffers: list[int] = []
        self.context = lib.ggml_init(
            lib.InitParams(self._memory.nbytes, self._memory.ctypes.data, False)
        )
        if not self.context:
            raise BackendError("llama.cpp: no scratch memory for a computation")

    def __enter__(self) -> _Graph:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.ggml_free(self.context)
        for buffer in self._buffers:
            lib.ggml_backend_buffer_free(buffer)

    def new(self, kind: int, *shape: int) -> int:
        """Return a new tensor of 1 or 2 dimensions, fastest first."""
        if len(shape) == 1:
            return int(lib.ggml_new_tensor_1d(self.context, kind, shape[0]))
        return int(lib.ggml_new_tensor_2d(self.context, kind, *shape))

    def borrow(self, kind: int, shape: tuple[int, ...], data: npt.NDArray[np.uint8]) -> int:
        """Return a tensor on someone else's bytes; ``shape`` is row-major."""
        if data.ctypes.data % 32:  # the kernels assume aligned tensors
            aligned = np.empty(len(data) + 32, np.uint8)
            begin = -aligned.ctypes.data % 32
            aligned[begin : begin + len(data)] = data
            data = aligned[begin : begin + len(data)]
        self._kept.append(data)
        lib.ggml_set_no_alloc(self.context, True)
        tensor = self.new(kind, *reversed(shape))
        lib.ggml_set_no_alloc(self.context, False)
        if lib.ggml_nbytes(tensor) != len(data):
            raise BackendError(f"llama.cpp: a tensor of {len(data)} bytes has the wrong size")
        buffer = lib.ggml_backend_cpu_buffer_from_ptr(data.ctypes.data, len(data))
        self._buffers.append(buffer)
        if lib.ggml_backend_tensor_alloc(buffer, tensor, data.ctypes.data):
            raise BackendError("llama.cpp: a tensor could not be mapped")
        return tensor

    def fill(self, tensor: int, values: npt.NDArray[Any]) -> None:
        """Write ``values`` into a tensor of this graph's own memory."""
        if lib.ggml_nbytes(tensor) != values.nbytes:
            raise BackendError("llama.cpp: values do not fit their tensor")
        self._view(tensor, values.nbytes)[:] = np.ascontiguousarray(values).view(np.uint8).ravel()

    def run(self, result: int, rows: int, threads: int) -> FloatArray:
        """Compute and return float32 (rows, ...)."""
        plan = lib.ggml_new_graph(self.context)
        lib.ggml_build_forward_expand(plan, result)
        status = lib.ggml_graph_compute_with_ctx(self.context, plan, threads)
        if status:
            raise BackendError(f"llama.cpp: a computation failed (status {status})")
        view = self._view(result, lib.ggml_nbytes(result))
        return view.view(np.float32).reshape(rows, -1)

    def _view(self, tensor: int, size: int) -> npt.NDArray[np.uint8]:
        begin = lib.ggml_get_data(tensor) - self._memory.ctypes.data
        return self._memory[begin : begin + size]
