"""STAND: guess what the target says next from what it said after the same few tokens before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ...errors import UsageError
from ...logits import Chain
from ...logits.stage import check_integer
from ...model import Capability, Forward, Output
from ..rng import Rng
from ..sample import Progress, begin
from ..types import Request, Step, Token
from .budget import Budget, Rates, curve_of
from .grow import NOTHING, Draft, Order, drawn, grow, likeliest
from .memory import Memory, memory_of
from .ngram import WIDTH, NgramTable
from .rejection import DRAW_DRAFT
from .tree import EMPTY, DraftTree, needs
from .verify import Walk, ask_target, deepest, most_nodes, rejection, resume_walk, shown, walk


@dataclass(frozen=True, kw_only=True)
class _State:
    progress: Progress
    draft: Draft  # what was drafted
    tree: DraftTree  # the beginning of it that the call on its way checks
    cached: int
    budget: Budget
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class STAND:
    """Draft a tree from a table of the target's own earlier distributions; check it in one call.

    The table maps the last 4, 3 or 2 tokens to the running mean of what the target's distribution
    was after them, its ten likeliest tokens. It fills while the target speaks, so it helps where
    texts repeat themselves, and most where several texts answer the same prompt.

    Parameters
    ----------
    nodes : int
        Most tokens drafted at once, 1..63.
    depth : int
        Longest path of the tree, 1..63.
    branches : int
        Most alternatives after one token, 1..10. With 1 the draft is a chain, which needs no TREE.
    verify : {"match", "rejection"}
        "match": the likeliest tokens of the table are drafted, and one stands if plain sampling
        would have drawn it. The text is that of plain sampling with the same seed, token for token
        on an engine whose logits do not depend on how many positions a call holds. "rejection":
        drafts are drawn at random without replacement and go through recursive rejection, as in
        the paper. The text has the same distribution, but which text it is depends on the table
        and, with ``adaptive``, on the engine's speed.
    share : {"model", "request"}
        Which texts share a table: all of this process with the same model and chain, or none.
    prompt : bool
        Let the prompt's own n-grams propose what followed them, where the table knows nothing.
    adaptive : bool
        True: draft as many tokens as this engine's speed and the luck so far make worthwhile,
        which may be none. False: always draft ``nodes``, as far as the table reaches.
    entries : int
        Entries that a table holds, 1,000..5,000,000; three per token, 0.3 to 1 KiB each.
    chain : Chain
        Stages applied to the logits, in order.

    References
    ----------
    "Accelerated Test-Time Scaling with Model-Free Speculative Sampling", arXiv:2506.04708.
    """

    nodes: int = 15
    depth: int = 12
    branches: int = 4
    verify: Literal["match", "rejection"] = "match"
    share: Literal["model", "request"] = "model"
    prompt: bool = True
    adaptive: bool = True
    entries: int = 200_000
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        check_integer("stand", "nodes", self.nodes, 1, 63)
        check_integer("stand", "depth", self.depth, 1, 63)
        check_integer("stand", "branches", self.branches, 1, WIDTH)
        check_integer("stand", "entries", self.entries, 1000, 5_000_000)
        for key, known in (("verify", ("match", "rejection")), ("share", ("model", "request"))):
            if getattr(self, key) not in known:
                raise UsageError(
                    f"stand: {key} must be {' or '.join(known)}, got {getattr(self, key)!r}"
                )

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": needs(branches=self.branches > 1)}

    @property
    def max_rows(self) -> int:
        return self.nodes if self.branches > 1 else 1

    @property
    def _draws(self) -> bool:
        """Whether drafts are drawn at random and may be rejected by chance."""
        return self.verify == "rejection" and not self.chain.greedy

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        model = request.models["target"]
        if self.share == "model":
            memory = memory_of(model, self.chain, self.entries)
        else:
            memory = Memory(table=NgramTable(self.entries))
        if self.prompt:
            memory.table.seed(request.prompt.tolist())
        curve = curve_of(model, "tree" if self.branches > 1 else "chain")
        state = _State(
            progress=begin(request, self.chain),
            draft=NOTHING,
            tree=EMPTY,
            cached=0,
            budget=Budget(curve, request.clock, adaptive=self.adaptive),
            memory=memory,
        )
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        budget = state.budget
        budget.entered()
        options = {"rule": rejection(state.draft.sources)} if self._draws else {}
        walked = walk(state.progress, state.tree, out["target"], self.chain, rng, **options)
        budget.confirmed(len(walked.tokens))
        self._learn(state, walked)
        draft, tree = NOTHING, EMPTY
        if walked.finish is None:
            draft = self._draft(state, walked.progress, rng)
            asked = len(draft.tree) if self._draws else budget.choose(draft.gains)
            tree = draft.tree.first(asked)
        budget.asked(1 + len(tree))
        after = replace(
            state, progress=walked.progress, draft=draft, tree=tree, cached=walked.cached
        )
        return after, shown(walked, state.tree, ask_target(walked, tree))

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        progress, cached, ask = resume_walk(state.progress, state.cached, self.chain, tokens)
        state.budget.asked(0)
        after = replace(state, progress=progress, draft=NOTHING, tree=EMPTY, cached=cached)
        return after, Step(ask={"target": ask})

    def _draft(self, state: _State, progress: Progress, rng: Rng) -> Draft:
        budget, memory, row = state.budget, state.memory, progress.request.row
        position = len(progress.history)
        nodes = min(self.nodes, most_nodes(progress))
        order: Order = likeliest
        if self._draws:
            # How many tokens to draft is settled before any is drawn: see ``drawn``.
            chance = memory.rates.rate(_ROUND, 0.5)
            nodes = min(nodes, budget.choose([chance**i for i in range(1, nodes + 1)]))
            noise = rng.uniforms(row, position, (nodes + 1) * WIDTH, draw=DRAW_DRAFT)
            order = drawn(np.maximum(noise, 1e-300).reshape(-1, WIDTH))
        return grow(
            memory.table,
            memory.rates,
            progress.history,
            order,
            nodes=nodes,
            depth=min(self.depth, deepest(progress)),
            branches=self.branches,
            floor=0.0 if self._draws else budget.floor,
            sources=self._draws,
        )

    def _learn(self, state: _State, walked: Walk) -> None:
        """Enter what the target said into the table, and how the draft fared into the rates."""
        text, start = walked.progress.history, len(state.progress.history)
        for i, target in enumerate(walked.targets):
            before = text[max(0, start + i - 4) : start + i].tolist()
            state.memory.table.observe(before, *target.top(WIDTH))
        rates = state.memory.rates
        state.draft.learn(rates, walked.nodes, [token.id for token in walked.tokens])
        if self._draws and len(state.tree):
            _learn_round(rates, walked, state.tree)


_ROUND = "a drafted token of a round"


def _learn_round(rates: Rates, walked: Walk, tree: DraftTree) -> None:
    for depth in range(min(len(walked.tokens), tree.depth)):
        rates.observe(_ROUND, 1.0, float(depth < len(walked.accepted)))
