"""One cache on an mlx model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from steersman.core.errors import BackendError, SteersmanError, UsageError
from steersman.core.model import Capability, Output, Plan, Session

from .cache import SlotCache
from .taps import Record, recording

if TYPE_CHECKING:
    from .model import MLXModel

Array = Any  # mx.array


class MLXSession(Session):
    """A cache of one or more rows; see :class:`steersman.core.model.Session`.

    Everything that a call returns or caches is evaluated before it returns: lazy mlx arrays cannot
    cross threads, evaluated ones can, so a session may be handed from thread to thread.
    """

    model: MLXModel

    def __init__(self, model: MLXModel, *, max_rows: int, needs: Capability, context: int) -> None:
        super().__init__(model, max_rows=max_rows, needs=needs, context=context)
        self._cache = SlotCache(model.info.layers)

    def _run(self, plan: Plan) -> Output:
        self.model.check_usable()
        saved = self._cache.save()
        try:
            with self.model.scope():
                return self._forward(plan)
        except SteersmanError:
            self._cache.restore(saved)
            raise
        except (RuntimeError, ValueError, MemoryError) as error:
            self._cache.restore(saved)
            raise BackendError(f"mlx: the call failed: {error}") from error
        except BaseException:
            self._cache.restore(saved)
            raise

    def _forward(self, plan: Plan) -> Output:
        cache = self._cache
        cache.edit(plan)
        if not plan.width:
            mx.eval(cache.arrays())
            return Output()
        cache.stage(plan)
        record = Record(
            want_hidden=frozenset(plan.hidden),
            want_attentions=frozenset(plan.attentions),
            embeds=self._embeds(plan),
        )
        with recording(record):
            last = self.model.inner(self._ids(plan), cache.layers)
        logits = self._logits(plan, last)
        hidden = {i: record.hidden[i].astype(mx.float32) for i in plan.hidden}
        attentions = self._attentions(plan, record)
        # The last layers' states hang on nothing when no logits are asked for.
        mx.eval(logits, hidden, attentions, cache.arrays())
        cache.commit()
        return Output(logits=logits, hidden=hidden, attentions=attentions)

    def _ids(self, plan: Plan) -> mx.array:
        """Ids, 0 where there is padding (-1 would be the last token) or a soft token."""
        if plan.tokens is None:
            return mx.zeros((plan.batch, plan.width), mx.int32)
        return mx.array(np.maximum(plan.tokens, 0).astype(np.int32))

    def _embeds(self, plan: Plan) -> Array | None:
        if plan.embeds is None:
            return None
        embeds = self.model.array(plan.embeds, "forward: embeds").astype(self.model.compute_dtype)
        if not mx.isfinite(embeds).all().item():
            # Once cached, even a masked NaN would reach every later token: 0 * NaN is NaN.
            raise UsageError("forward: embeds hold NaN or infinity")
        return embeds

    def _logits(self, plan: Plan, last: mx.array) -> Array | None:
        if plan.logits == "none":
            return None
        if plan.logits == "all":
            return self.model.project(last)
        if (plan.counts == plan.width).all():
            last = last[:, -1:]
        else:
            index = np.maximum(plan.counts - 1, 0).astype(np.int32)
            last = mx.take_along_axis(last, mx.array(index)[:, None, None], axis=1)
        return self.model.project(last)[:, 0]

    def _attentions(self, plan: Plan, record: Record) -> dict[int, mx.array]:
        if not plan.attentions:
            return {}
        order = self._cache.order()
        if order is None:
            return {i: record.attentions[i] for i in plan.attentions}
        index = mx.array(order.astype(np.int32))[:, None, None, :]
        return {i: mx.take_along_axis(record.attentions[i], index, axis=3) for i in plan.attentions}

    def close(self) -> None:
        """Free the cache."""
        super().close()
        self._cache = SlotCache(0)


def check_process(opened_in: int) -> None:
    """Refuse work in a forked child: mlx's worker threads did not survive the fork.

    Raises
    ------
    UsageError
        The calling process is not the one that loaded the model.
    """
    if os.getpid() != opened_in:
        raise UsageError(
            "mlx: this process was forked after the model was loaded, where mlx would wait for "
            "ever; start processes with the 'spawn' method and load the model there"
        )
