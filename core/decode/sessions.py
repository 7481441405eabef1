"""The caches of one conversation, kept between turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np

from ..errors import CapabilityError
from ..model import Capability, Forward, IntArray, Model, Session
from .types import Strategy


class Sessions:
    """One session per role, opened when a strategy first needs it.

    Keep one of these per conversation: the next turn then starts from the longest prefix that the
    cache already holds, whichever strategy made it. Not for use by two threads at once.

    Parameters
    ----------
    models : Model or mapping of role to Model
        A single model takes the role "target".
    context : int, optional
        Positions per row, below the models' own.
    """

    def __init__(self, models: Model | Mapping[str, Model], *, context: int | None = None) -> None:
        self.models: dict[str, Model] = (
            {"target": models} if isinstance(models, Model) else dict(models)
        )
        self._context = context
        self._open: dict[str, Session] = {}

    @property
    def target(self) -> Model:
        """The model that speaks."""
        return self.models["target"]

    @property
    def context(self) -> int:
        """Positions that one row of every open session can hold."""
        sizes = [session.context for session in self._open.values()]
        return min(sizes, default=self._context or self.target.info.context)

    @property
    def used(self) -> int:
        """Tokens in the target's cache (its longest row)."""
        session = self._open.get("target")
        return int(session.lengths.max()) if session is not None else 0

    def prepare(self, strategy: Strategy[Any], *, name: str) -> Mapping[str, Session]:
        """Return a session per role that ``strategy`` requires.

        A session that cannot serve it (too few rows, other capabilities) is replaced by one that
        can; its cached prefix is then computed anew.

        Raises
        ------
        CapabilityError
            A role has no model, or its model lacks something; nothing has run yet.
        """
        for role, needs in strategy.requires.items():
            if role not in self.models:
                raise missing_role(f"strategy {name}", role)
            self.models[role].require(needs, who=f"strategy {name}", role=role)
        for role, needs in strategy.requires.items():
            session, rows = self._open.get(role), strategy.max_rows
            if session is not None and (
                needs & ~session.needs & ~_ALWAYS or session.max_rows < strategy.max_rows
            ):
                # What earlier turns needed stays, so that going to and fro reopens nothing.
                needs |= session.needs
                rows = max(rows, session.max_rows)
                session.close()
                session = None
            if session is None:
                self._open[role] = self.models[role].session(
                    max_rows=rows, needs=needs, context=self._context
                )
        return {role: self._open[role] for role in strategy.requires}

    def use(self, models: Mapping[str, Model]) -> None:
        """Go on with these models by role; the cache of a role stays while its model does."""
        for role in [role for role in self._open if models.get(role) is not self.models[role]]:
            self._open.pop(role).close()
        self.models = dict(models)

    def close(self) -> None:
        """Free every cache; the models stay open."""
        for session in self._open.values():
            session.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def missing_role(who: str, role: str) -> CapabilityError:
    """Return the error that says how to give a role a model."""
    flag = "--draft-model NAME" if role == "draft" else f"--model-for {role}=NAME"
    return CapabilityError(
        f"{who}: needs a model for role {role!r}; give one with {flag}, "
        f"or under models.{role} of the profile"
    )


_ALWAYS = Capability.LAST_LOGITS | Capability.ALL_LOGITS | Capability.ROLLBACK


def reuse_prefix(session: Session, ask: Forward) -> tuple[Forward, int]:
    """Return ``ask`` shortened by what the cache already holds, and how many tokens that saves.

    Only a plain prompt is shortened: one row from position 0 of which nothing but the last logits
    are wanted. At least its last token is always computed, since logits are not cached. Any other
    prompt starts from an empty row, and gives up the rows that an earlier text has left.
    """
    plain = (
        ask.tokens is not None
        and ask.rows is None
        and ask.parents is None
        and ask.causal
        and ask.logits != "all"
        and not ask.hidden
        and not ask.attentions
        and not np.any(ask.keep)
    )
    fresh: Any = ask.tokens if ask.tokens is not None else ask.embeds
    if fresh is None:
        return ask, 0
    if not plain or len(fresh) != 1:
        if ask.rows is None and len(fresh) != session.batch and not np.any(ask.keep):
            ask = replace(ask, rows=np.zeros(len(fresh), np.int64))
        return ask, 0
    tokens: IntArray = np.asarray(fresh, np.int64)
    held = [session.common_prefix(tokens[0], row) for row in range(session.batch)]
    row = int(np.argmax(held))
    keep = min(held[row], tokens.shape[1] - 1)
    if keep < session.lengths[row] and Capability.ROLLBACK not in session.model.capabilities:
        keep = 0
    rows = None if session.batch == 1 else np.array([row])
    return (
        Forward(keep=keep, tokens=tokens[:, keep:], rows=rows, logits=ask.logits),
        keep,
    )
