"""Prompt lookup: guess that the text goes on as it did where its last tokens stood before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...errors import UsageError
from ...logits import Chain
from ...model import Capability, Forward, IntArray, Output
from ..rng import Rng
from ..sample import Progress, begin
from ..types import Request, Step, Token
from .budget import Budget, Rates, curve_of
from .tree import EMPTY, DraftTree, chain_tree, needs
from .verify import ask_target, deepest, most_nodes, resume_walk, shown, walk

_PRIOR = {1: 0.2, 2: 0.35, 3: 0.5, 4: 0.6, 5: 0.75, 6: 0.9}  # acceptance by length of the match


def find_match(text: IntArray, shortest: int, longest: int) -> tuple[int, int] | None:
    """Return where the text's last tokens stood before: the place after them, and how many agree.

    Among the places where the most tokens agree (``longest`` count as the most), the last one is
    taken. None where fewer than ``shortest`` agree.

    Parameters
    ----------
    text : int64 (T,)
    shortest, longest : int
        1 <= shortest <= longest.
    """
    last = len(text) - 1
    if last < 1:
        return None
    ends = np.flatnonzero(text[:last] == text[last])
    length = 1 if len(ends) else 0
    while length and length < longest:
        longer = ends[ends >= length]
        longer = longer[text[longer - length] == text[last - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if length < shortest:
        return None
    return int(ends[-1]) + 1, length


def copied(text: IntArray, start: int, count: int) -> IntArray:
    """Return ``count`` tokens from ``start`` on; what runs past the end repeats the period."""
    period = len(text) - start
    return text[start + np.arange(count) % period]


@dataclass(frozen=True, kw_only=True)
class _State:
    progress: Progress
    tree: DraftTree  # what the call on its way checks
    guess: IntArray  # what was drafted; ``tree`` holds the beginning of it
    agree: int  # how many tokens agreed where the guess came from
    cached: int
    budget: Budget
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Copy from the prompt and the text so far, and let the target check the copy in one call.

    Where the text's last ``shortest`` tokens or more stood before, what followed them there is the
    draft. A drafted token stands if plain sampling would have drawn it: the text is that of plain
    sampling with the same seed, token for token on an engine whose logits do not depend on how
    many positions a call holds.

    Parameters
    ----------
    length : int
        Most tokens drafted at once, 1..63.
    shortest, longest : int
        Tokens that must agree, and beyond which it does not matter how many do; 1..64.
    adaptive : bool
        True: draft as many tokens as this engine's speed and the luck so far make worthwhile,
        which may be none. False: always draft ``length``.
    chain : Chain
        Stages applied to the logits, in order.

    References
    ----------
    Yang et al., "Inference with Reference: Lossless Acceleration of Large Language Models",
    arXiv:2304.04487; Saxena, "Prompt lookup decoding", 2023.
    """

    length: int = 15
    shortest: int = 2
    longest: int = 8
    adaptive: bool = True
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 63:
            raise UsageError(f"prompt_lookup: length must be in 1..63, got {self.length}")
        if not 1 <= self.shortest <= 64:
            raise UsageError(f"prompt_lookup: shortest must be in 1..64, got {self.shortest}")
        if not self.shortest <= self.longest <= 64:
            raise UsageError(
                f"prompt_lookup: longest must be in {self.shortest}..64, got {self.longest}"
            )

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": needs(branches=False)}

    @property
    def max_rows(self) -> int:
        return 1

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        state = _State(
            progress=begin(request, self.chain),
            tree=EMPTY,
            guess=EMPTY.tokens,
            agree=0,
            cached=0,
            budget=Budget(
                curve_of(request.models["target"], "chain"),
                request.clock,
                adaptive=self.adaptive,
            ),
            rates=Rates(),
        )
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        budget, rates = state.budget, state.rates
        budget.entered()
        walked = walk(state.progress, state.tree, out["target"], self.chain, rng)
        budget.confirmed(len(walked.tokens))
        self._learn(state, [token.id for token in walked.tokens])
        progress = walked.progress
        guess, agree = EMPTY.tokens, 0
        if walked.finish is None:
            guess, agree = self._guess(progress)
        gains, chance = [], 1.0
        for i in range(len(guess)):
            kind = min(agree + i, max(_PRIOR))
            chance *= rates.rate(kind, _PRIOR[kind])
            gains.append(chance)
        tree = chain_tree(guess[: budget.choose(gains)])
        budget.asked(1 + len(tree))
        after = replace(
            state, progress=progress, tree=tree, guess=guess, agree=agree, cached=walked.cached
        )
        return after, shown(walked, state.tree, ask_target(walked, tree))

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        progress, cached, ask = resume_walk(state.progress, state.cached, self.chain, tokens)
        state.budget.asked(0)
        after = replace(
            state, progress=progress, tree=EMPTY, guess=EMPTY.tokens, agree=0, cached=cached
        )
        return after, Step(ask={"target": ask})

    def _guess(self, progress: Progress) -> tuple[IntArray, int]:
        found = find_match(progress.history, self.shortest, self.longest)
        room = min(self.length, deepest(progress), most_nodes(progress))
        if found is None or room < 1:
            return EMPTY.tokens, 0
        start, agree = found
        return copied(progress.history, start, room), agree

    def _learn(self, state: _State, tokens: list[int]) -> None:
        """Compare the guess, also the part that was not asked about, with what was drawn."""
        for i, (guessed, token) in enumerate(zip(state.guess.tolist(), tokens)):
            state.rates.observe(min(state.agree + i, max(_PRIOR)), 1.0, float(guessed == token))
            if guessed != token:
                break
