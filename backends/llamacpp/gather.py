"""What a call returns, collected from packed buffers into the shapes of the contract."""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.core.array import to_numpy
from steersman.core.errors import BackendError
from steersman.core.model import Output, Plan

from .cache import Cache
from .capture import Capture
from .entries import Entries
from .handles import FloatArray
from .rows import Row
from .weights import Weights


class Gather:
    """Collects the output of one plan.

    Attributes
    ----------
    every : bool
        All positions must be flagged: the engine drops the others before the end of its last
        layer.
    """

    def __init__(
        self,
        plan: Plan,
        rows: list[Row],
        cache: Cache,
        capture: Capture | None,
        weights: Weights,
        layers: int,
    ) -> None:
        self._plan, self._rows, self._cache = plan, rows, cache
        self._capture = capture if plan.hidden or plan.attentions else None
        self._weights = weights
        self.every = layers in plan.hidden or layers - 1 in plan.attentions
        self._full = bool((plan.counts == plan.width).all())
        self._logits: FloatArray | None = None
        self._hidden: dict[int, FloatArray] = {}
        self._attention: dict[int, FloatArray] = {}

    @property
    def apart(self) -> bool:
        """Whether rows must be computed one by one.

        The engine reorders tokens of several rows inside a graph, so what is read from graphs must
        come from one row at a time; and a block with full attention must be one micro-batch.
        """
        return self._capture is not None or not self._plan.causal

    def take(self, entries: Entries) -> None:
        """Run entries and keep what is wanted of them."""
        plan, capture = self._plan, self._capture
        if capture is not None:
            capture.begin(plan.hidden, plan.attentions)
        for first, view in self._cache.feed(entries):
            self._take_logits(entries, first, view)
        if capture is not None:
            capture.end()
            self._take_hidden(entries, capture)
            self._take_attention(entries, capture)

    def _take_logits(self, entries: Entries, first: int, view: FloatArray) -> None:
        plan = self._plan
        if plan.logits == "none":
            return
        shape: tuple[int, ...] = (plan.batch, view.shape[-1])
        if plan.logits == "last" and not self.every and len(view) == plan.batch:
            self._logits = view  # one call, every row: no copy
            return
        if plan.logits == "all":
            shape = (plan.batch, plan.width, view.shape[-1])
        if self._logits is None:
            self._logits = (np.empty if plan.logits == "all" and self._full else np.zeros)(
                shape, np.float32
            )
        assert entries.rows is not None and entries.columns is not None
        places = np.flatnonzero(entries.flag)[first : first + len(view)]
        rows, columns = entries.rows[places], entries.columns[places]
        if plan.logits == "all":
            if self._full:  # flagged positions are consecutive: one plain copy
                begin = int(rows[0]) * plan.width + int(columns[0])
                self._logits.reshape(-1, view.shape[-1])[begin : begin + len(view)] = view
            else:
                self._logits[rows, columns] = view
        else:
            last = columns == plan.counts[rows] - 1
            self._logits[rows[last]] = view[last]

    def _take_hidden(self, entries: Entries, capture: Capture) -> None:
        assert entries.rows is not None and entries.columns is not None
        plan = self._plan
        for layer in plan.hidden:
            if layer == 0:
                values = (
                    entries.embeds
                    if entries.embeds is not None
                    else self._weights.embed(np.asarray(entries.tokens))
                )
            else:
                pieces = capture.hidden[layer]
                values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            if len(values) != len(entries):
                raise BackendError(
                    f"llama.cpp: {len(values)} hidden states of layer {layer} "
                    f"for {len(entries)} positions"
                )
            if layer not in self._hidden:
                shape = (plan.batch, plan.width, values.shape[-1])
                self._hidden[layer] = np.zeros(shape, np.float32)
            self._hidden[layer][entries.rows, entries.columns] = values

    def _take_attention(self, entries: Entries, capture: Capture) -> None:
        if not self._plan.attentions:
            return
        assert entries.rows is not None
        plan, i = self._plan, int(entries.rows[0])
        end = int(plan.end[i])
        for layer in plan.attentions:
            at = 0
            places: Any = slice(0, end)  # a row with a stream of its own lies in order
            if self._cache.shared:
                places = self._cache.places(layer, self._rows[i].seq, int(plan.start[i]))
                if len(places) != end:
                    raise BackendError(f"llama.cpp: {len(places)} cells for {end} positions")
            for piece in capture.weights[layer]:
                heads, n, cells = piece.shape
                if layer not in self._attention:
                    self._attention[layer] = np.zeros(
                        (plan.batch, heads, plan.width, int(plan.end.max())), np.float32
                    )
                whole = np.zeros((heads, n, end), np.float32)
                if isinstance(places, slice):
                    seen = min(end, cells)
                    whole[..., :seen] = piece[..., :seen]
                else:
                    inside = places < cells
                    whole[..., inside] = piece[..., places[inside]]
                if np.abs(whole.sum(axis=-1) - 1).max() > 1e-3:
                    raise BackendError(
                        f"llama.cpp: attention of layer {layer} looks at unknown cells"
                    )
                self._attention[layer][i, :, at : at + n, :end] = whole
                at += n
            if at != len(entries):
                raise BackendError(
                    f"llama.cpp: attention of layer {layer} for {at} of {len(entries)} positions"
                )

    def output(self) -> Output:
        """Return what was collected."""
        return Output(logits=self._logits, hidden=self._hidden, attentions=self._attention)


def finite(embeds: Any) -> bool:
    """Whether soft tokens hold no NaN and no infinity."""
    return bool(np.isfinite(to_numpy(embeds)).all())
