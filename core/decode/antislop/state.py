"""What antislop remembers between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...model import IntArray
from ..types import Request, Step, Token
from .matching import Hit, Matcher
from .rules import Rule
from .transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class Spot:
    """What has been decided at one position.

    Attributes
    ----------
    factors : mapping of token id to float
        Products of all factors that hits at this position have brought.
    tries : int
        Tokens drawn again here.
    allowed : frozenset of Rule
        Rules that may be broken here from now on.
    """

    factors: Mapping[int, float] = field(default_factory=dict)
    tries: int = 0
    allowed: frozenset[Rule] = frozenset()


@dataclass(frozen=True, kw_only=True)
class State:
    """The text, what has been decided about it, and what the next answer is for."""

    request: Request
    matcher: Matcher
    inner: Any
    text: Transcript = field(default_factory=Transcript)
    since: int = 0  # characters that were searched before the last token came
    shown: int = 0  # tokens that the caller's text holds
    same: int = 0  # how many of them are the text's
    waiting: tuple[Token, ...] = ()  # of the inner strategy's edit, not looked at yet
    then: Step = field(default_factory=Step)  # the inner strategy's step without its edit
    hit: Hit | None = None  # what the answer that is awaited will decide
    refilled: bool = False  # the inner strategy resumes when the answer is there
    cached: int = 0  # positions that the target's cache holds for certain
    moved: bool = False  # the cache is not as the inner strategy left it
    spots: Mapping[int, Spot] = field(default_factory=dict)
    slow: frozenset[Rule] = frozenset()
    spent: int = 0  # tokens drawn, those that went included
    rewinds: int = 0

    @property
    def allowed(self) -> frozenset[tuple[int, Rule]]:
        return frozenset((at, rule) for at, spot in self.spots.items() for rule in spot.allowed)

    @property
    def ids(self) -> IntArray:
        """Prompt and text."""
        generated = np.array([token.id for token in self.text.tokens], np.int64)
        return np.concatenate([self.request.prompt, generated])


def allow(state: State, hit: Hit, note: dict[str, Any], why: str | None) -> State:
    """Let a hit stand; ``why`` says what prevents going back, None that its rule accepts it."""
    spot = state.spots.get(hit.token, Spot())
    spot = replace(spot, allowed=spot.allowed | {hit.rule})
    fact: dict[str, Any] = {"to": hit.token, "rule": hit.rule.text}
    if why is None:
        note.setdefault("accepted", fact)
    else:
        note.setdefault("suppressed", fact | {"why": why})
    return replace(state, spots={**state.spots, hit.token: spot})
