"""What both ways of computing share: the model's pure functions and the session."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch import Tensor

from steersman.core.errors import BackendError, UsageError
from steersman.core.model import (
    Capability,
    IntArray,
    Model,
    ModelInfo,
    Output,
    Plan,
    Session,
    Tokenizer,
)

from .cache import KVCache, Layout, whole_blocks


@dataclass
class Captured:
    """What one call collects on its way through the layers.

    Attributes
    ----------
    want_hidden, want_attentions : frozenset of int
    hidden : dict of layer to packed (T, D)
    attentions : dict of layer to float32 (B, H, n, stop)
    """

    want_hidden: frozenset[int]
    want_attentions: frozenset[int]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)


class TorchModel(Model):
    """A loaded model on one device.

    Subclasses implement the step through the layers (:meth:`_step`) and the four pure pieces
    around it. Parameters are shared by all sessions and threads and are never written.

    Notes
    -----
    Sessions compute under ``torch.inference_mode``; what they return are ordinary tensors without
    gradient. For gradients, open the model with ``path="hf"`` and use :attr:`module`.
    """

    capabilities = ~Capability.NONE
    xp = array_api_compat.torch
    strict = False  # whether the same bits are asked for however a prompt is cut

    def __init__(
        self, info: ModelInfo, tokenizer: Tokenizer, device: torch.device, compute: torch.dtype
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.device = device
        self.compute = compute  # dtype of hidden states and of the cache

    # -- pieces -----------------------------------------------------------------------------

    @abstractmethod
    def _step(self, layout: Layout, cache: KVCache, x: Tensor, captured: Captured) -> Tensor:
        """Run packed embeddings (T, D) through all layers; return (T, D) before the final norm."""

    @abstractmethod
    def _lookup(self, ids: Tensor) -> Tensor:
        """Return scaled embeddings (..., D) of device ids, in the compute dtype."""

    @abstractmethod
    def _norm(self, x: Tensor) -> Tensor:
        """Apply the final norm to (T, D)."""

    @abstractmethod
    def _project(self, x: Tensor) -> Tensor:
        """Apply the output projection to normed (T, D); float32 (T, V)."""

    @property
    def module(self) -> Any:
        """The ``torch.nn.Module`` that holds the parameters, for training; ``path="hf"`` only."""
        raise UsageError("model.module: open the model with path='hf' to reach its parameters")

    # -- the contract -----------------------------------------------------------------------

    def session(
        self,
        *,
        max_rows: int = 1,
        needs: Capability = Capability.NONE,
        context: int | None = None,
    ) -> TorchSession:
        limit = self.info.context
        if context is not None and not 1 <= context <= limit:
            raise UsageError(f"session: context {context} outside 1..{limit}")
        return TorchSession(self, max_rows=max_rows, needs=needs, context=context or limit)

    def embed(self, tokens: IntArray | Sequence[int]) -> Tensor:
        ids = np.asarray(tokens)
        if ids.size and ids.dtype.kind not in "iu":
            raise UsageError(f"embed: tokens must be integers, got {ids.dtype}")
        size = self.info.vocab_size
        # Checked here: on CUDA an id out of range would kill the process's GPU context.
        bad = ids[(ids < 0) | (ids >= size)]
        if bad.size:
            raise UsageError(f"embed: token {int(bad.flat[0])} outside 0..{size - 1}")
        with torch.no_grad():
            return self._lookup(torch.as_tensor(ids.astype(np.int64), device=self.device)).float()

    @property
    def embedding(self) -> Tensor:
        with torch.no_grad():
            return self._lookup(torch.arange(self.info.vocab_size, device=self.device)).float()

    def norm(self, hidden: Any) -> Tensor:
        with torch.no_grad():
            x = self._hidden(hidden)
            return self._norm(x.reshape(-1, x.shape[-1])).float().view(x.shape)

    def head(self, hidden: Any) -> Tensor:
        with torch.no_grad():
            x = self._hidden(hidden)
            flat = self._head(x.reshape(-1, x.shape[-1]))
            return flat.view(*x.shape[:-1], flat.shape[-1])

    def _head(self, x: Tensor) -> Tensor:
        return self._project(self._norm(x))

    def _hidden(self, hidden: Any) -> Tensor:
        x = torch.as_tensor(hidden).detach().to(self.device, self.compute)
        if x.ndim == 0 or x.shape[-1] != self.info.width:
            raise UsageError(f"head: hidden {tuple(x.shape)}, expected (..., {self.info.width})")
        return x


class TorchSession(Session):
    """Rows in preallocated buffers that grow; lengths are kept here, outside the layers.

    A call that fails, or is interrupted, leaves the rows as they were, cut to what the call was
    going to keep of them: slots behind that may have been written already.
    """

    model: TorchModel

    def __init__(
        self, model: TorchModel, *, max_rows: int, needs: Capability, context: int
    ) -> None:
        super().__init__(model, max_rows=max_rows, needs=needs, context=context)
        limit = whole_blocks(context) if model.strict else context
        self._cache = KVCache(model.info.layers, 1, limit, model.compute)
        self._next = self._cache
        self._written = False

    def _run(self, plan: Plan) -> Output:
        self._written = False
        try:
            return self._compute(plan)
        except BaseException as error:
            self._next = self._cache
            if plan.identity and self._written:
                self._cut(plan.base)
            if isinstance(error, RuntimeError):
                first = str(error).strip().split("\n")[0]
                raise BackendError(f"torch on {self.model.device}: {first}") from error
            raise

    def _compute(self, plan: Plan) -> Output:
        model = self.model
        with torch.inference_mode():
            embeds = None if plan.embeds is None else self._soft_tokens(plan)
            cache = self._arrange(plan)
            if plan.width == 0:
                return Output()
            layout = Layout(plan, model.device, strict=model.strict)
            captured = Captured(frozenset(plan.hidden), frozenset(plan.attentions))
            x = model._lookup(layout.ids()) if embeds is None else layout.pack(embeds)
            self._written = True
            x = model._step(layout, cache, x, captured)
        # Outside inference mode, so that the results are ordinary tensors that may be written to.
        with torch.no_grad():
            logits = None
            if plan.logits == "last":
                logits = model._head(layout.last(x))
            elif plan.logits == "all":
                logits = layout.unpack(model._head(x))
            hidden = {i: _own(layout.unpack(h)) for i, h in captured.hidden.items()}
            attentions = {i: _own(a[..., : layout.end]) for i, a in captured.attentions.items()}
        return Output(logits=logits, hidden=hidden, attentions=attentions)

    def _soft_tokens(self, plan: Plan) -> Tensor:
        x = torch.as_tensor(plan.embeds).detach().to(self.model.device, self.model.compute)
        # A NaN would stay in the cache and, even masked, reach every later position.
        if not bool(torch.isfinite(x).all()):
            raise UsageError("forward: embeds hold a NaN or an infinity")
        return x

    def _arrange(self, plan: Plan) -> KVCache:
        """Return the buffers with rows and paths in place; other rows go to new buffers."""
        if not plan.identity:
            self._next = self._cache.gather(plan.rows, plan.base, plan.path)
        elif plan.path is not None:
            self._written = True
            self._cache.compact(plan.base, plan.path)
        return self._next

    def _record(self, plan: Plan) -> None:
        super()._record(plan)
        self._cache = self._next

    def _cut(self, keep: IntArray) -> None:
        self._rows = [row[:n] for row, n in zip(self._rows, keep, strict=True)]
        self._tree = None
        self._tree_base = keep.copy()

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now."""
        return self._cache.nbytes

    def close(self) -> None:
        super().close()
        self._cache = self._next = KVCache(0, 1, 1, self.model.compute)


def _own(x: Tensor) -> Tensor:
    """Return float32 that belongs to the caller (never a view of what the session computed)."""
    return x.float() if x.dtype != torch.float32 else x.clone()
