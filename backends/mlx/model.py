"""A language model on mlx: mlx-lm's implementation behind steersman's contract."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from steersman.core.array import array_namespace, to_numpy
from steersman.core.errors import UsageError
from steersman.core.model import Capability, IntArray, Model, ModelInfo, Tokenizer

from .session import MLXSession, check_process
from .taps import embedded

Array = Any  # mx.array


class MLXModel(Model):
    """Weights in mlx, shared by any number of threads.

    Parameters
    ----------
    net : nn.Module
        An mlx-lm model, evaluated, with the taps of :mod:`.taps` installed.
    info : ModelInfo
    tokenizer : Tokenizer
    device : mx.Device
        Where to compute.
    compute_dtype : mx.Dtype
        Of activations.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        info: ModelInfo,
        tokenizer: Tokenizer,
        device: mx.Device,
        compute_dtype: mx.Dtype,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.capabilities = ~Capability.NONE
        self.xp = array_namespace(mx.array(0))
        self.prefill_chunk = 128 if device == mx.cpu else 512
        self.compute_dtype = compute_dtype
        self._device = device
        self._net: nn.Module | None = net
        self._process = os.getpid()
        self._embedding: mx.array | None = None
        self._embedding_lock = threading.Lock()

    # -- for sessions ----------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise UsageError in a forked child or after ``close``."""
        check_process(self._process)
        if self._net is None:
            raise UsageError(f"{self.info.name}: the model is closed")

    def scope(self) -> AbstractContextManager[Any]:
        """Return a context in which mlx computes on this model's device."""
        if self._device == mx.default_device():
            return nullcontext()
        return mx.stream(self._device)

    @property
    def net(self) -> nn.Module:
        """The mlx-lm model."""
        self.check_usable()
        return self._net

    def inner(self, ids: mx.array, layers: list[Any]) -> Array:
        """Run all layers and the final norm: ids (B, n) to (B, n, D), lazy."""
        return self.net.model(ids, layers)

    def project(self, normed: mx.array) -> Array:
        """Apply the output projection to normed states (..., D): float32 logits, lazy."""
        net = self.net
        head = net.lm_head if "lm_head" in net else net.model.embed_tokens.as_linear
        logits = head(normed)
        if hasattr(net, "logits_scaling"):  # Granite
            logits = logits / net.logits_scaling
        return logits.astype(mx.float32)

    def array(self, values: Any, what: str) -> Array:
        """Return ``values``, an array of any library, as an mlx array of (..., D) floats."""
        array = values if isinstance(values, mx.array) else mx.array(to_numpy(values))
        if not mx.issubdtype(array.dtype, mx.floating):
            raise UsageError(f"{what}: expected floating-point numbers, got {array.dtype}")
        if array.ndim < 1 or array.shape[-1] != self.info.width:
            raise UsageError(f"{what}: expected (..., {self.info.width}), got {tuple(array.shape)}")
        return array

    # -- the contract ------------------------------------------------------------------------

    def session(
        self,
        *,
        max_rows: int = 1,
        needs: Capability = Capability.NONE,
        context: int | None = None,
    ) -> MLXSession:
        """Open an empty cache; see :meth:`steersman.core.model.Model.session`."""
        self.check_usable()
        if context is not None and not 1 <= context <= self.info.context:
            raise UsageError(f"session: context {context} outside 1..{self.info.context}")
        return MLXSession(
            self, max_rows=max_rows, needs=needs, context=context or self.info.context
        )

    def embed(self, tokens: IntArray | Sequence[int]) -> Array:
        """Return what the first layer gets for these ids (..., D), float32.

        With the factors that Gemma and Granite put on their embeddings, so that hidden state 0 is
        the same thing.
        """
        ids = np.asarray(tokens)
        if ids.size and ids.dtype.kind not in "iu":
            raise UsageError(f"embed: token ids must be integers, got {ids.dtype}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.info.vocab_size):
            raise UsageError(f"embed: token ids outside 0..{self.info.vocab_size - 1}")
        net = self.net
        if not ids.size:
            return mx.zeros((*ids.shape, self.info.width))
        with self.scope():
            rows = embedded(net, mx.array(ids.reshape(1, -1).astype(np.int32)))
            return _evaluated(rows.astype(mx.float32).reshape(*ids.shape, -1))

    @property
    def embedding(self) -> Array:
        """The whole embedding matrix (V, D), float32; computed once where it is not stored so."""
        with self._embedding_lock:
            if self._embedding is None:
                whole = self.embed(np.arange(self.info.vocab_size))
                stored = self.net.model.embed_tokens.weight
                same = stored.shape == whole.shape and stored.dtype == whole.dtype
                with self.scope():
                    same = same and bool(mx.array_equal(stored, whole).item())
                self._embedding = stored if same else whole
            return self._embedding

    def norm(self, hidden: Any) -> Array:
        """Apply the final norm to hidden states (..., D), float32."""
        with self.scope():
            return _evaluated(self._norm(hidden).astype(mx.float32))

    def head(self, hidden: Any) -> Array:
        """Apply the final norm and the projection: (..., D) to float32 logits (..., V)."""
        with self.scope():
            return _evaluated(self.project(self._norm(hidden)))

    def _norm(self, hidden: Any) -> Array:
        states = self.array(hidden, "head").astype(self.compute_dtype)
        return self.net.model.norm(states)

    def close(self) -> None:
        """Free the weights; sessions of this model are useless afterwards."""
        self._net = None
        self._embedding = None
        mx.clear_cache()


def _evaluated(array: mx.array) -> Array:
    """Compute now: a lazy array could not be used from another thread."""
    mx.eval(array)
    return array
