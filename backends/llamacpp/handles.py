"""Owners of the engine's objects: each is freed once, after everything that depends on it.

Freeing a llama_model before its contexts, or anything twice, ends the process. So nobody frees by
hand: an owner's finaliser does, when the last holder lets go, and a context (as well as every array
that looks into its memory) holds what it depends on.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from steersman.core.errors import BackendError

from . import lib
from .lib import llama

FloatArray = npt.NDArray[np.float32]


class ModelHandle:
    """Owner of a ``llama_model``."""

    def __init__(self, path: Path, *, gpu_layers: int) -> None:
        lib.start()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        lib.last_error()  # what went wrong before is not about this file
        self.pointer: int | None = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise BackendError(lib.last_error() or "the engine gave no reason")
        weakref.finalize(self, llama.llama_model_free, self.pointer)
        self.vocab: int = llama.llama_model_get_vocab(self.pointer)


class _Floats:
    """Float32 memory of a context in the form numpy takes over; keeps the context alive."""

    def __init__(self, owner: Context, address: int, shape: tuple[int, ...]) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "<f4",
            "data": (address, False),
            "shape": shape,
        }


def _release(pointer: int, _keep: object) -> None:
    llama.llama_free(pointer)


class Context:
    """Owner of a ``llama_context``, with a reusable batch.

    One thread at a time: the session that owns it sees to that.

    Parameters
    ----------
    model : ModelHandle
    cells : int
        Positions per row; of all rows together when ``unified``.
    rows : int
        Sequence ids, at most 256.
    unified : bool
        One pool of cells for all rows.
    micro_batch : int
        Tokens per graph; see ``settings`` in the model.
    flash : int
        The engine's ``flash_attn_type``.
    threads : int
    callback : ctypes callback, optional
        Evaluation callback; kept alive as long as the context.
    """

    def __init__(
        self,
        model: ModelHandle,
        *,
        cells: int,
        rows: int,
        unified: bool,
        micro_batch: int,
        flash: int,
        threads: int,
        callback: Any = None,
    ) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = cells if unified else cells * rows
        params.n_batch = 2048
        params.n_ubatch = micro_batch
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        params.kv_unified = unified
        params.swa_full = True  # a partial window silently forgets what a rollback needs
        params.no_perf = True
        if callback is not None:
            params.cb_eval = callback
        self._rows = rows
        self.pointer: int | None = llama.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise BackendError(
                f"llama.cpp: no cache of {rows} x {cells} positions: "
                f"{lib.last_error() or 'the engine gave no reason'}; use a smaller --ctx-size"
            )
        # The tuple holds the model and the callback until the context is gone.
        weakref.finalize(self, _release, self.pointer, (model, callback))
        self.memory = llama.llama_get_memory(self.pointer)
        self.n_batch = int(llama.llama_n_batch(self.pointer))
        self._vocab_size = int(llama.llama_vocab_n_tokens(model.vocab))
        self._make_batch(self.n_batch)

    def _make_batch(self, size: int) -> None:
        self.token = np.zeros(size, np.int32)
        self.pos = np.zeros(size, np.int32)
        self.seq = np.zeros(size, np.int32)
        self.flag = np.zeros(size, np.int8)
        self._count = np.ones(size, np.int32)
        # Pointer to each token's list of sequence ids; lists of one lie side by side in ``seq``.
        self._ids = self.seq.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        self._batch = llama.llama_batch()
        self._batch.pos = _pointer(self.pos, ctypes.c_int32)
        self._batch.n_seq_id = _pointer(self._count, ctypes.c_int32)
        self._batch.seq_id = _pointer(self._ids, ctypes.POINTER(ctypes.c_int32))
        self._batch.logits = _pointer(self.flag, ctypes.c_int8)
        self._token_pointer = _pointer(self.token, ctypes.c_int32)
        self._batch.token = self._token_pointer

    def decode(
        self,
        n: int,
        *,
        embeds: FloatArray | None = None,
        shared: Sequence[Sequence[int]] | None = None,
    ) -> int:
        """Run the first ``n`` entries of ``token``, ``pos``, ``seq`` and ``flag``.

        Parameters
        ----------
        n : int
            1..``n_batch``; the engine would abort the process beyond it.
        embeds : float32 array (n, D), optional
            Instead of ``token``.
        shared : list of lists of int, optional
            Sequence ids of each token instead of ``seq``.

        Returns
        -------
        int
            0, or 1 when the cache has no room (nothing has changed then).

        Raises
        ------
        BackendError
            The engine failed.
        """
        if not 1 <= n <= self.n_batch:
            raise BackendError(f"llama.cpp: {n} tokens in one call, at most {self.n_batch}")
        batch = self._batch
        batch.n_tokens = n
        if embeds is None and shared is None:
            code = llama.llama_decode(self.pointer, batch)
        else:
            code = self._decode_special(n, embeds, shared)
        if code in (0, 1):
            return int(code)
        raise BackendError(f"llama.cpp: decoding failed (code {code}): {lib.last_error()}")

    def _decode_special(
        self, n: int, embeds: FloatArray | None, shared: Sequence[Sequence[int]] | None
    ) -> int:
        batch = llama.llama_batch()
        ctypes.pointer(batch)[0] = self._batch
        if embeds is not None:
            if embeds.shape[0] != n or not embeds.flags.c_contiguous or embeds.dtype != np.float32:
                raise BackendError("llama.cpp: embeddings must be (n, D) float32, contiguous")
            batch.token = None
            batch.embd = _pointer(embeds, ctypes.c_float)
        if shared is not None:
            flat = np.array([i for ids in shared for i in ids], np.int32)
            count = np.array([len(ids) for ids in shared], np.int32)
            first = np.cumsum(count, dtype=np.uintp) - count.astype(np.uintp)
            lists = np.uintp(flat.ctypes.data) + np.uintp(4) * first
            batch.n_seq_id = _pointer(count, ctypes.c_int32)
            batch.seq_id = _pointer(lists, ctypes.POINTER(ctypes.c_int32))
        # ``embeds``, ``flat``, ``count`` and ``lists`` live in this frame until the call returns.
        return int(llama.llama_decode(self.pointer, batch))

    def logits(self, rows: int) -> FloatArray:
        """Return a view (rows, V) of the flagged positions' logits, in batch order.

        The next :meth:`decode` overwrites it; it keeps the context alive.
        """
        pointer = llama.llama_get_logits(self.pointer)
        if not pointer:
            raise BackendError("llama.cpp: returned no logits")
        address = ctypes.addressof(pointer.contents)
        return np.asarray(_Floats(self, address, (rows, self._vocab_size)))

    def set_causal(self, causal: bool) -> None:
        """Let later calls see only what stands before (True), or both ways."""
        llama.llama_set_causal_attn(self.pointer, causal)

    def remove(self, row: int, begin: int) -> bool:
        """Drop the positions of ``row`` from ``begin`` on; False when the engine cannot."""
        return bool(llama.llama_memory_seq_rm(self.memory, row, begin, -1))

    def copy(self, source: int, target: int) -> None:
        """Make ``target``, which must be empty, a copy of ``source``."""
        # Onto a row with content the engine merges both, or aborts: emptied first, always.
        if not (0 <= source < self._rows and 0 <= target < self._rows and source != target):
            raise BackendError(f"llama.cpp: cannot copy row {source} to {target}")
        llama.llama_memory_seq_rm(self.memory, target, -1, -1)
        llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def copy_to(self, other: Context) -> None:
        """Copy all rows into ``other``, an empty and larger context with the same settings."""
        size = int(llama.llama_state_get_size(self.pointer))
        buffer = np.empty(size, np.uint8)
        pointer = _pointer(buffer, ctypes.c_uint8)
        got = int(llama.llama_state_get_data(self.pointer, pointer, size))
        if not got or llama.llama_state_set_data(other.pointer, pointer, got) != got:
            raise BackendError(f"llama.cpp: the cache could not be enlarged: {lib.last_error()}")


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def check_memory(needed: int, what: str) -> None:
    """Raise BackendError when ``needed`` bytes are more than the machine has free.

    The engine allocates and touches a cache at once; the system might end the process otherwise.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise BackendError(
            f"cache: {what} need {needed >> 20} MiB, {free >> 20} MiB of memory are free; "
            "use a smaller --ctx-size or fewer rows"
        )
