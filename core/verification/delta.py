"""How hidden states change over a span: one teacher-forced pass, two positions looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..array import array_namespace, to_numpy
from ..decode.loop import prompt_chunks
from ..errors import BackendError, Cancelled, ContextOverflow
from ..model import Array, Capability, Forward, IntArray, Model, Session
from .span import Span, TraceRule

Floats = npt.NDArray[np.float32]


@dataclass
class DeltaReader:
    """Reads traces with one session of a model. Not for use by two threads at once.

    Traces that share their tokens up to the first position, as samples for one problem do, share
    that part's computation.

    Parameters
    ----------
    model : Model
        With hidden states.
    rule : TraceRule
    cancelled : callable
        Polled between calls, each of which takes ``model.prefill_chunk`` tokens at most.
    """

    model: Model
    rule: TraceRule
    cancelled: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        needs = Capability.HIDDEN
        if self.rule.final_norm:
            needs |= Capability.HEAD
        self.model.require(needs, who="clue")
        self._session: Session | None = None
        self._begun: IntArray | None = None
        self._first: Floats | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose states are compared; the embedding is none of them."""
        depth = self.model.info.layers
        return tuple(range(1, depth + 1)) if self.rule.layers == "all" else (depth,)

    def read(self, span: Span) -> Floats:
        """Return the states at the last position minus those at the first one.

        Parameters
        ----------
        span : Span

        Returns
        -------
        float32 array (layers, D)

        Raises
        ------
        ContextOverflow
            The trace does not fit into the context.
        Cancelled
        BackendError
            A state is not finite.
        """
        session, tokens = self._ready(), span.tokens
        if len(tokens) > session.context:
            raise ContextOverflow(
                f"clue: a trace has {len(tokens)} tokens up to the end of its span and the context "
                f"holds {session.context}; raise --ctx-size or cut traces with --max-tokens"
            )
        begun = tokens[: span.start + 1]
        if self._begun is None or not np.array_equal(begun, self._begun):
            self._begun = None
            session = self._emptied(session)
            self._feed(session, 0, begun[:-1])
            self._first = self._state(session, len(begun) - 1, begun[-1])
            self._begun = begun.copy()
        elif Capability.ROLLBACK not in self.model.capabilities:
            session = self._emptied(session)
            self._feed(session, 0, begun)
        assert self._first is not None
        self._feed(session, len(begun), tokens[len(begun) : -1])
        delta = self._state(session, len(tokens) - 1, tokens[-1]) - self._first
        if not np.isfinite(delta).all():
            raise BackendError(
                f"clue: {self.model.info.name} on {self.model.info.backend} gave hidden states "
                "that are not finite; try another --dtype"
            )
        return delta

    def _ready(self) -> Session:
        if self._session is None:
            self._session = self.model.session(needs=Capability.HIDDEN)
        return self._session

    def _emptied(self, session: Session) -> Session:
        if session.lengths[0] and Capability.ROLLBACK not in self.model.capabilities:
            session.close()
            self._session = None
            return self._ready()
        if session.lengths[0]:
            session.forward(Forward(keep=0, logits="none"))
        return session

    def _feed(self, session: Session, keep: int, tokens: IntArray) -> None:
        if not len(tokens):
            return
        for chunk in prompt_chunks(session, Forward(keep=keep, tokens=tokens[None], logits="none")):
            if self.cancelled():
                self._begun = None
                raise Cancelled("clue: cancelled")
            session.forward(chunk)

    def _state(self, session: Session, keep: int, token: Any) -> Floats:
        ask = Forward(
            keep=keep, tokens=np.array([[token]], np.int64), logits="none", hidden=self.layers
        )
        hidden = session.forward(ask).hidden
        rows: list[Array] = [hidden[layer][0, -1, :] for layer in self.layers]
        if self.rule.final_norm:
            rows[-1] = self.model.norm(rows[-1])
        xp = array_namespace(*rows)
        wide = [xp.astype(row, xp.float32) for row in rows]
        return np.asarray(to_numpy(xp.stack(wide)), np.float32)

    def close(self) -> None:
        """Free the cache; the model stays open."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self._begun = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
