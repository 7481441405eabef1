"""Speculative sampling with a draft model: one draft, or several at once (SpecTr)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...logits import DRAW_TOKEN, Chain
from ...model import Capability, Forward, IntArray, Output
from ..rng import Rng
from ..sample import Progress
from ..sample import begin as begin_text
from ..types import Request, Step, Token
from . import draft_model
from .draft_model import NO_ROWS, Drafting, Prefix
from .kseq import KSeq, Probs
from .pace import Pace
from .rejection import acceptance_uniforms
from .tree import EMPTY, ROOT, DraftTree, Kept, ask_tree, needs, tree_of_paths
from .verify import (
    Choice,
    Rule,
    Target,
    Walk,
    deepest,
    match,
    most_nodes,
    resume_walk,
    shown,
    walk,
)


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Finished drafts as the target checks them.

    Attributes
    ----------
    tree : DraftTree
        Every draft once, common beginnings shared.
    nodes : int64 (K, L)
        Node of each draft at each depth, -1 beyond its end. Drafts that agree share nodes, and are
        still counted one by one.
    laws : mapping of node to Target
        Distribution that the tokens after a node (:data:`ROOT` too) were drawn from.
    """

    tree: DraftTree = EMPTY
    nodes: IntArray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    laws: Mapping[int, Target] = field(default_factory=dict)


NOTHING = Drafts()
MAX_NODES = 128  # each keeps a distribution over the vocabulary, 4 bytes per token of it


def drafts_of(paths: Sequence[Prefix], laws: Mapping[Prefix, Target]) -> Drafts:
    """Return drafts ready to be checked."""
    tree, nodes = tree_of_paths(paths)
    after = {ROOT: laws[()]} if len(tree) else {}
    for path, places in zip(paths, nodes.tolist(), strict=True):
        for depth in range(1, len(path)):
            after[places[depth - 1]] = laws[path[:depth]]
    return Drafts(tree=tree, nodes=nodes, laws=after)


Noted = Callable[[int, KSeq], None]
"""Told the depth and the rule of every decision among drafts."""


def kseq_rule(drafts: Drafts, noted: Noted | None = None) -> Rule:
    """Return the rule that chooses among the drafts which are still alive, by K-SEQ.

    A token from the residual that happens to be drafted goes on with those drafts: given the text
    so far, what follows in them is still drawn independently of all that was decided.
    """

    def rule(tree: DraftTree, node: int, target: Target, progress: Progress, rng: Rng) -> Choice:
        ahead = next_nodes(drafts, node)
        if not ahead:
            return match(tree, node, target, progress, rng)
        row, position = progress.request.row, len(progress.history)
        tokens = [int(tree.tokens[child]) for child in ahead]
        p, places = over_target(drafts.laws[node], target, tokens)
        kseq = KSeq.between(p, target.probs, len(tokens))
        if noted is not None:
            noted(0 if node == ROOT else int(tree.depths[node]), kseq)
        chosen = kseq.choose(
            places,
            acceptance_uniforms(rng, row, position, len(tokens)).tolist(),
            rng.uniform(row, position, draw=DRAW_TOKEN),
        )
        token = chosen.token if target.ids is None else int(target.ids[chosen.token])
        return Choice(
            token=token,
            logprob=float(np.log(target.probs[chosen.token])),
            child=tree.child(node, token),
        )

    return rule


def next_nodes(drafts: Drafts, node: int) -> list[int]:
    """Return the node that each draft through ``node`` goes on with, in the order of the drafts."""
    nodes, depth = drafts.nodes, 0 if node == ROOT else int(drafts.tree.depths[node])
    if depth >= nodes.shape[1]:
        return []
    through = nodes if node == ROOT else nodes[nodes[:, depth - 1] == node]
    return [int(child) for child in through[:, depth] if child >= 0]


def over_target(law: Target, target: Target, tokens: Sequence[int]) -> tuple[Probs, list[int]]:
    """Return the draft's probabilities over the entries of ``target``, and where ``tokens`` stand.

    Tokens that the target cannot produce are never accepted and are no part of the residual, so
    only the target's entries matter; such a token stands nowhere, at -1.
    """
    if target.ids is None:
        size = len(target.values)
        return law.full(size), list(tokens)
    size = len(target.ids)
    if law.ids is None:
        p = law.probs[target.ids]
    else:
        order = np.argsort(law.ids)
        at = np.minimum(np.searchsorted(law.ids, target.ids, sorter=order), len(law.ids) - 1)
        found = law.ids[order[at]] == target.ids
        p = np.where(found, law.probs[order[at]], 0.0)
    where = {token: place for place, token in enumerate(target.ids.tolist())}
    return p, [where.get(token, -1) for token in tokens]


@dataclass(frozen=True, kw_only=True)
class _State:
    """Where a text stands.

    ``drafting`` is set while the draft model is being asked, else ``drafts`` are being checked.
    The rest describes the caches before the call that is being asked for: the target's holds
    ``cached`` tokens of the text, and once the branch ``kept`` of its pending tree is kept, all but
    the last; the draft model's holds ``rows``.
    """

    progress: Progress
    shared: npt.NDArray[np.bool_]
    pace: Pace
    cached: int = 0
    kept: Kept | None = None
    rows: tuple[IntArray, ...] = NO_ROWS
    drafting: Drafting | None = None
    drafts: Drafts = NOTHING


@dataclass(frozen=True, kw_only=True)
class _DraftModel:
    """Rounds of drafting and checking; what the two strategies below share."""

    name: ClassVar[str]
    length: int
    adaptive: bool
    chain: Chain

    @property
    def width(self) -> int:
        """Drafts per round. Without chance all are the same, so there is only one."""
        raise NotImplementedError

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {
            "target": needs(branches=self.width > 1),
            "draft": draft_model.needs(self.width),
        }

    @property
    def max_rows(self) -> int:
        return self.width

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        shared = draft_model.shared_with_target(request, who=self.name)
        pace = Pace(
            request.models["target"],
            request.models["draft"],
            request.clock,
            drafts=self.width,
            length=self.length,
            adaptive=self.adaptive,
        )
        state = _State(progress=begin_text(request, self.chain), shared=shared, pace=pace)
        if request.max_tokens == 0:
            return state, Step(finish="length")
        prompt = Forward(keep=0, tokens=request.prompt[None])
        if request.max_tokens == 1 or not shared[request.prompt].all():
            return state, Step(ask={"target": prompt})
        # The draft model reads the prompt now, so that its time counts as the prompt's.
        ask = {"target": prompt, "draft": replace(prompt, logits="none")}
        return replace(state, rows=(request.prompt,)), Step(ask=ask)

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        if state.drafting is not None:
            return self._draft(state, state.drafting, out["draft"], rng)
        state.pace.answered()
        rule = kseq_rule(state.drafts, self._noted(state))
        checked = state.drafts.tree
        walked = walk(state.progress, checked, out["target"], self.chain, rng, rule)
        state.pace.confirmed(len(walked.tokens))
        state, ask = self._next(state, walked)
        return state, shown(walked, checked, ask)

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        """Go on after ``tokens``; ``state`` must be the latest one.

        What both caches still hold of the text is kept; the next token is drawn without a draft.
        """
        progress, cached, ask = resume_walk(state.progress, state.cached, self.chain, tokens)
        state.pace.asked(0, -1)
        after = _State(
            progress=progress,
            shared=state.shared,
            pace=state.pace,
            cached=cached,
            rows=state.rows,
        )
        return after, Step(ask={"target": ask})

    def _next(self, state: _State, walked: Walk) -> tuple[_State, Mapping[str, Forward]]:
        """Return the state after a walk and the call that begins the next round."""
        progress = walked.progress
        state = replace(
            state, progress=progress, cached=walked.cached, kept=walked.kept, drafts=NOTHING
        )
        if walked.finish is not None:
            return state, {}
        drafts, length = state.pace.choose(
            nodes=most_nodes(progress),
            depth=deepest(progress),
            behind=draft_model.behind(progress.history, state.rows),
        )
        if not state.shared.all() and not state.shared[progress.history].all():
            length = 0  # the draft model cannot read this text
        state.pace.asked(drafts, length)
        if length < 1:
            return state, {"target": ask_tree(progress.history, EMPTY, walked.kept)}
        drafting, ask = draft_model.begin(progress, state.rows, drafts=drafts, length=length)
        return replace(state, drafting=drafting), {"draft": ask}

    def _draft(
        self, state: _State, drafting: Drafting, out: Output, rng: Rng
    ) -> tuple[_State, Step]:
        state = replace(state, rows=drafting.rows)
        if drafting.drafted == 0:
            state.pace.fed()
        drafting, ask = draft_model.grow(drafting, out, self.chain, rng, state.shared)
        if ask is not None:
            return replace(state, drafting=drafting), Step(ask={"draft": ask})
        drafts = drafts_of(drafting.paths, drafting.laws)
        state = replace(state, drafting=None, drafts=drafts)
        return state, Step(
            ask={"target": ask_tree(state.progress.history, drafts.tree, state.kept)}
        )

    def _noted(self, state: _State) -> Noted | None:
        """Return what tells the pace how likely acceptance was; None where it does not matter."""
        if not self.adaptive:
            return None
        drafts = len(state.drafts.nodes)

        def noted(depth: int, kseq: KSeq) -> None:
            state.pace.saw(drafts, depth, kseq.acceptance, kseq.acceptance_of_one)

        return noted


@dataclass(frozen=True, kw_only=True)
class Speculative(_DraftModel):
    """Let a small model draft ahead; check its tokens in one call of the large one.

    The text has exactly the target's distribution after the chain, and at temperature 0 is the
    target's greedy text. A drafted token ``x`` is accepted with probability
    ``min(1, q(x) / p(x))``; the first rejected one is replaced by a draw from
    ``max(q - p, 0)``. Needs a model for the role "draft" with the same token ids.

    Parameters
    ----------
    length : int
        Tokens per draft, 1..64.
    adaptive : bool
        True: draft as much as this engine's speed and the luck so far make worthwhile, which may be
        nothing. The distribution of the text stays exact, but the same seed need not give the same
        text, since speed is never quite the same. False: always ``length`` tokens.
    chain : Chain
        Stages applied to the logits of both models, in order.

    References
    ----------
    Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
    arXiv:2211.17192; Chen et al., arXiv:2302.01318.
    """

    name: ClassVar[str] = "speculative"
    length: int = 4
    adaptive: bool = False
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        _check(self.name, "length", self.length, 64)

    @property
    def width(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class SpecTr(_DraftModel):
    """Draft several independent continuations; keep the longest acceptable beginning of any.

    The target checks all drafts as a tree in one call, and K-SEQ chooses among them at each
    position (:mod:`.kseq`), so that the text has exactly the target's distribution after the chain.
    At temperature 0 all drafts would be the same, and one is made. Needs a model for the role
    "draft" with the same token ids.

    Parameters
    ----------
    drafts : int
        Continuations per round, 1..64; 1 is speculative sampling.
    length : int
        Tokens per draft, 1..64; at most 128 drafted tokens in all.
    adaptive : bool
        True: make as many and as long drafts as this engine's speed and the luck so far make
        worthwhile, which may be none. The distribution of the text stays exact, but the same seed
        need not give the same text, since speed is never quite the same. False: always ``drafts``
        of ``length``.
    chain : Chain
        Stages applied to the logits of both models, in order.

    References
    ----------
    Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport", arXiv:2310.15141.
    """

    name: ClassVar[str] = "spectr"
    drafts: int = 8
    length: int = 8
    adaptive: bool = False
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        _check(self.name, "drafts", self.drafts, 64)
        _check(self.name, "length", self.length, 64)
        if self.drafts * self.length > MAX_NODES:
            raise UsageError(
                f"spectr: drafts * length must be at most {MAX_NODES}, "
                f"got {self.drafts} * {self.length}"
            )

    @property
    def width(self) -> int:
        return 1 if self.chain.greedy else self.drafts


def _check(name: str, key: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise UsageError(f"{name}: {key} must be in 1..{most}, got {value}")


__all__ = ["SpecTr", "Speculative"]
