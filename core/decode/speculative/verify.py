"""The target's side of speculation: what the chain leaves at each node, and the walk down the tree.

Every quantity is computed where the walk stands and nowhere else: the chain sees the history of
that node, stages with a state of their own (mirostat) get the state of that path, and a node that
the walk does not reach costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...array import to_numpy
from ...logits import DRAW_TOKEN, Chain
from ...logits.candidates import (
    FloatRow,
    Inputs,
    check_left,
    check_peak,
    draw_row,
    narrow,
    run_row,
    split_greedy,
)
from ...model import Forward, IntArray, Output
from ...ops import logsumexp, top_k
from ..rng import Rng
from ..sample import Progress, resumed
from ..types import Edit, Step, Token
from .rejection import Probs, acceptance_uniforms, draw, recursive_rejection
from .tree import ROOT, DraftTree, Kept, ask_again, ask_tree, kept_branch, node_logits


@dataclass(frozen=True)
class Target:
    """The distribution of the next token after the chain, on the host.

    Attributes
    ----------
    values : float32 (n,)
        Logits after the chain.
    ids : int64 (n,) or None
        Their tokens, most likely first; None: the whole vocabulary in order.
    """

    values: FloatRow
    ids: IntArray | None

    @cached_property
    def probs(self) -> Probs:
        """Probabilities (n,) of ``values``."""
        weights = np.exp(self.values.astype(np.float64) - float(self.values.max()))
        probs: Probs = weights / weights.sum()
        return probs

    def draw(self, uniform: float) -> tuple[int, float]:
        """Return the token that plain sampling draws with ``uniform``, and its log-probability."""
        return draw_row(self.values, self.ids, uniform)

    def prob(self, token: int) -> float:
        """Return the probability of one token."""
        if self.ids is None:
            return float(self.probs[token])
        found = np.flatnonzero(self.ids == token)
        return float(self.probs[found[0]]) if len(found) else 0.0

    def full(self, size: int) -> Probs:
        """Return the probabilities of all ``size`` tokens of the vocabulary."""
        if self.ids is None:
            return self.probs
        full = np.zeros(size)
        full[self.ids] = self.probs
        return full

    def top(self, n: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the ``n`` most likely tokens that can be drawn, and their probabilities."""
        if self.ids is not None:
            ids, probs = self.ids[:n], self.probs[:n]
        else:
            values, ids = top_k(self.values, n)
            top = float(values[0])
            probs = np.exp(values.astype(np.float64) - top) / math.exp(
                float(logsumexp(self.values)) - top
            )
        pairs = [(i, p) for i, p in zip(ids.tolist(), probs.tolist()) if p > 0]
        return tuple(i for i, _ in pairs), tuple(p for _, p in pairs)


def target_at(progress: Progress, chain: Chain, logits: FloatRow, rng: Rng) -> Target:
    """Return the target's distribution after the text of ``progress``.

    Parameters
    ----------
    progress : Progress
        Its history ends with the node's own path, its chain state is that of the path.
    chain : Chain
        The stages draw the random numbers that plain sampling draws at this position.
    logits : float32 (V,)
        The node's logits on the host; see :func:`host_logits`.

    Raises
    ------
    BackendError
        The logits are not usable, or the chain leaves no token.
    """
    row, position = progress.request.row, len(progress.history)

    def uniforms(which: int, key: int) -> float:
        return rng.uniform(row + which, position, draw=key)

    check_peak(float(logits.max()), 0)
    if not chain.fused:
        left = chain.apply(
            logits[None], uniforms=uniforms, history=[progress.history], state=progress.chain
        )
        values, ids = narrow(to_numpy(left)[0])
        check_left(values, 0)
        return Target(values, ids)
    stages, greedy = split_greedy(chain.active, chain.greedy)
    inputs = Inputs(history=[progress.history], state=progress.chain, uniforms=uniforms)
    values, ids = run_row(logits, None, stages, inputs, 0, len(logits))
    check_left(values, 0)
    if greedy:
        best = int(values.argmax())
        only = best if ids is None else int(ids[best])
        return Target(np.zeros(1, np.float32), np.array([only], np.int64))
    return Target(values, ids)


def host_logits(out: Output) -> npt.NDArray[np.float32]:
    """Return logits (1 + N, V) of the root and the nodes, copied to the host once."""
    return np.asarray(to_numpy(node_logits(out)), np.float32)


def grown(
    progress: Progress, chain: Chain, logits: FloatRow, token: int, logprob: float, rng: Rng
) -> tuple[Token, Progress]:
    """Return ``token`` as a Token and the progress of the text that it was appended to.

    Parameters
    ----------
    logits : float32 (V,)
        Logits that predict the token, for its raw log-probability.
    logprob : float
        Its log-probability under the distribution after the chain.
    """
    request = progress.request
    raw, trace = None, None
    top: tuple[tuple[int, float], ...] = ()
    if request.logprobs is not None:
        total = float(logsumexp(logits))
        raw = float(logits[token]) - total
        most, where = top_k(logits, request.logprobs) if request.logprobs else (logits[:0], ())
        top = tuple((int(i), float(v) - total) for i, v in zip(where, most))
    if request.trace is not None:
        (trace,) = chain.explain(
            logits[None],
            uniforms=lambda _, key: rng.uniform(request.row, len(progress.history), draw=key),
            history=[progress.history],
            state=progress.chain,
            n=request.trace,
            tokens=[token],
        )
    made = Token(
        id=token,
        raw_logprob=raw,
        logprob=None if request.logprobs is None else logprob,
        top=top,
        trace=trace,
    )
    after = Progress(
        request=request,
        history=np.append(progress.history, token),
        chain=chain.observe(progress.chain, np.array([logprob])),
    )
    return made, after


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a rule chose after one node.

    Attributes
    ----------
    token : int
    logprob : float
        Under the target's distribution after the chain.
    child : int or None
        Child of the node that the walk goes on with; None ends the walk.
    """

    token: int
    logprob: float
    child: int | None


Rule = Callable[[DraftTree, int, Target, Progress, Rng], Choice]


def match(tree: DraftTree, node: int, target: Target, progress: Progress, rng: Rng) -> Choice:
    """Draw the token as plain sampling does; go on if it was drafted.

    The random number is the one that plain sampling uses at this position, so the text is that of
    plain sampling whatever was drafted.
    """
    position = len(progress.history)
    uniform = rng.uniform(progress.request.row, position, draw=DRAW_TOKEN)
    token, logprob = target.draw(uniform)
    return Choice(token=token, logprob=logprob, child=tree.child(node, token))


def rejection(drafts: Mapping[int, tuple[IntArray, Probs]]) -> Rule:
    """Return the rule of recursive rejection for children drawn without replacement.

    ``drafts`` holds, for every node with children (:data:`ROOT` too), the tokens and probabilities
    that the children were drawn from.
    """

    def rule(tree: DraftTree, node: int, target: Target, progress: Progress, rng: Rng) -> Choice:
        children = tree.children(node)
        if not children:
            return match(tree, node, target, progress, rng)
        row, position = progress.request.row, len(progress.history)
        tokens, probs = drafts[node]
        ids, t, d = _over_both(target, tokens, probs)
        places = [int(np.searchsorted(ids, tree.tokens[child])) for child in children]
        uniforms = acceptance_uniforms(rng, row, position, len(children))
        accepted, rest = recursive_rejection(t, d, places, uniforms)
        if accepted is not None:
            child, place = children[accepted], places[accepted]
        else:
            place = draw(rest, rng.uniform(row, position, draw=DRAW_TOKEN))
            child = None
        return Choice(token=int(ids[place]), logprob=math.log(t[place]), child=child)

    return rule


def _over_both(target: Target, tokens: IntArray, probs: Probs) -> tuple[IntArray, Probs, Probs]:
    """Return ids in rising order that hold both supports, and both distributions over them."""
    if target.ids is None:
        d = np.zeros(len(target.probs))
        d[tokens] = probs
        return np.arange(len(d)), target.probs, d
    ids = np.union1d(target.ids, tokens)
    t, d = np.zeros(len(ids)), np.zeros(len(ids))
    t[np.searchsorted(ids, target.ids)] = target.probs
    d[np.searchsorted(ids, tokens)] = probs
    return ids, t, d


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What one call to the target confirmed.

    Attributes
    ----------
    progress : Progress
        The text with all new tokens, an end token included.
    tokens : tuple of Token
        At least one; the last one may be an end token.
    nodes : tuple of int
        The node that each token was chosen after; the first is :data:`ROOT`.
    targets : tuple of Target
        The distribution that each token was drawn from.
    accepted : tuple of int
        The nodes whose tokens were confirmed, from the first token downwards.
    finish : str or None
        "eos", "length", or None when the text goes on.
    kept : Kept or None
        For the next :func:`ask_tree`.
    """

    progress: Progress
    tokens: tuple[Token, ...]
    nodes: tuple[int, ...]
    targets: tuple[Target, ...]
    accepted: tuple[int, ...]
    finish: str | None
    kept: Kept | None

    @property
    def cached(self) -> int:
        """How many tokens of the text are in the cache, a pending tree not counted."""
        return len(self.progress.history) - 1 if self.kept is None else self.kept.base


def resume_walk(
    progress: Progress, cached: int, chain: Chain, tokens: Sequence[Token]
) -> tuple[Progress, int, Forward]:
    """Return the text ``tokens`` after the prompt, how much of it is cached, and the call for it.

    Parameters
    ----------
    progress : Progress
        The text until now.
    cached : int
        As for :func:`.ask_again`.
    """
    after = resumed(progress, chain, tokens)
    ask = ask_again(progress.history, cached, after.history)
    return after, int(np.asarray(ask.keep)), ask


def walk(
    progress: Progress, tree: DraftTree, out: Output, chain: Chain, rng: Rng, rule: Rule = match
) -> Walk:
    """Go down the tree as far as ``rule`` accepts, and one token further.

    Parameters
    ----------
    progress : Progress
        The text that ``tree`` was drafted after.
    out : Output
        The answer to :func:`ask_tree`.
    """
    request, logits = progress.request, host_logits(out)
    begun, node = progress, ROOT
    tokens: list[Token] = []
    nodes: list[int] = []
    targets: list[Target] = []
    accepted: list[int] = []
    finish = None
    while finish is None:
        row = logits[node + 1]
        target = target_at(progress, chain, row, rng)
        choice = rule(tree, node, target, progress, rng)
        token, progress = grown(progress, chain, row, choice.token, choice.logprob, rng)
        tokens.append(token)
        nodes.append(node)
        targets.append(target)
        if choice.child is not None:
            accepted.append(choice.child)
        if token.id in request.eos_ids:
            finish = "eos"
        elif progress.count >= request.max_tokens:
            finish = "length"
        elif choice.child is None:
            break
        else:
            node = choice.child
    return Walk(
        progress=progress,
        tokens=tuple(tokens),
        nodes=tuple(nodes),
        targets=tuple(targets),
        accepted=tuple(accepted),
        finish=finish,
        kept=kept_branch(begun.history, tree, nodes[-1]),
    )


def most_nodes(progress: Progress) -> int:
    """Return how many nodes may follow the text without overrunning the context."""
    return max(0, progress.request.context - len(progress.history))


def deepest(progress: Progress) -> int:
    """Return how deep a draft may be: one token comes for free after the last accepted one."""
    return max(0, progress.request.max_tokens - progress.count - 1)


def shown(walked: Walk, tree: DraftTree, ask: Mapping[str, Forward]) -> Step:
    """Return the step that shows what was confirmed, and goes on with ``ask`` if the text does."""
    tokens = walked.tokens[:-1] if walked.finish == "eos" else walked.tokens
    edit = None
    if tokens:
        edit = Edit(keep=walked.progress.count - len(walked.tokens), tokens=tokens)
    note = {}
    if len(tree):
        drafted = enumerate(tree.tokens.tolist())
        note = {
            "drafted": len(tree),
            "accepted": len(walked.accepted),
            "rejected": [token for i, token in drafted if i not in walked.accepted][:32],
        }
    if walked.finish is not None:
        return Step(edit=edit, finish=walked.finish, note=note)
    return Step(ask=ask, edit=edit, note=note)


def ask_target(walked: Walk, tree: DraftTree) -> Mapping[str, Forward]:
    """Return the call that checks ``tree`` after what was confirmed."""
    return {"target": ask_tree(walked.progress.history, tree, walked.kept)}


__all__ = [
    "Choice",
    "Rule",
    "Target",
    "Walk",
    "ask_target",
    "deepest",
    "grown",
    "host_logits",
    "match",
    "most_nodes",
    "rejection",
    "shown",
    "target_at",
    "walk",
]
