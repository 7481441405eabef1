"""Drafts of a second, cheaper model: several independent continuations, and how each was drawn.

Drafts grow side by side, one row of the draft model's cache each; drafts that agree so far share a
row. What drew a token is kept from the very call that drew it, since the rule that checks drafts is
exact only for those numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ...array import to_numpy
from ...errors import CapabilityError
from ...logits import Chain
from ...model import Capability, Forward, IntArray, Model, Output
from ...same_tokens import shared_tokens
from ..rng import Rng
from ..sample import Progress
from ..types import Request
from .rejection import DRAW_DRAFT
from .verify import Target, target_at

Prefix = tuple[int, ...]
NO_ROWS: tuple[IntArray, ...] = (np.empty(0, np.int64),)


def needs(drafts: int) -> Capability:
    """Return what a model must offer to draft ``drafts`` continuations at once."""
    plain = Capability.LAST_LOGITS | Capability.ROLLBACK
    return plain | Capability.ROWS | Capability.FORK if drafts > 1 else plain


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Drafts that are being made.

    Attributes
    ----------
    progress : Progress
        The confirmed text that they follow.
    length : int
        Tokens per draft.
    paths : tuple of K tuples of int
        The drafts so far. One that reached an end token grows no further.
    laws : mapping
        Distribution that the token after each prefix was drawn from, on the host.
    live : tuple of (prefix, Progress)
        Prefixes in the order of the rows that were just asked for.
    rows : tuple of int64 arrays
        Tokens in each row of the draft model's cache, once the last call is made.
    """

    progress: Progress
    length: int
    paths: tuple[Prefix, ...]
    laws: Mapping[Prefix, Target] = field(default_factory=dict)
    live: tuple[tuple[Prefix, Progress], ...]
    rows: tuple[IntArray, ...]

    @property
    def drafted(self) -> int:
        """Tokens drafted so far per path, at most."""
        return max(map(len, self.paths))


def begin(
    progress: Progress, rows: Sequence[IntArray], *, drafts: int, length: int
) -> tuple[Drafting, Forward]:
    """Return fresh drafts and the first call: what the draft model has not seen of the text.

    Parameters
    ----------
    progress : Progress
        The confirmed text; at least its last token is fed.
    rows : sequence of int64 arrays
        What the rows of the draft model's cache hold.
    drafts, length : int
        At least 1.
    """
    history = progress.history
    held = [common_prefix(row, history) for row in rows]
    best = int(np.argmax(held))
    keep = min(held[best], len(history) - 1)
    state = Drafting(
        progress=progress,
        length=length,
        paths=((),) * drafts,
        live=(((), progress),),
        rows=(history,),
    )
    ask = Forward(
        keep=keep, tokens=history[None, keep:], rows=None if len(rows) == 1 else np.array([best])
    )
    return state, ask


def grow(
    state: Drafting, out: Output, chain: Chain, rng: Rng, shared: npt.NDArray[np.bool_]
) -> tuple[Drafting, Forward | None]:
    """Draw the next token of every draft; return the next call, or None when they are done.

    Parameters
    ----------
    out : Output
        The answer to the last call.
    chain : Chain
        Applied to the draft model's logits at each prefix, with the history and state of its path.
    shared : bool (V,)
        Tokens of the target that the draft model has as well; no other can be drafted.
    """
    request, depth = state.progress.request, state.drafted
    logits = fit(to_numpy(out.logits), shared)
    position = len(state.progress.history) + depth
    uniforms = rng.uniforms(request.row, position, len(state.paths), draw=DRAW_DRAFT)
    laws, paths = dict(state.laws), list(state.paths)
    grown: dict[Prefix, tuple[int, Progress]] = {}
    for row, (prefix, progress) in enumerate(state.live):
        law = laws[prefix] = target_at(progress, chain, logits[row], rng)
        for i, path in enumerate(state.paths):
            if path != prefix:
                continue
            token, logprob = law.draw(float(uniforms[i]))
            paths[i] = (*path, token)
            if token in request.eos_ids or paths[i] in grown:
                continue
            after = Progress(
                request=request,
                history=np.append(progress.history, token),
                chain=chain.observe(progress.chain, np.array([logprob])),
            )
            grown[paths[i]] = (row, after)
    state = replace(state, paths=tuple(paths), laws=laws)
    if state.drafted >= state.length or not grown:
        return state, None
    live = tuple((prefix, progress) for prefix, (_, progress) in grown.items())
    sources = [row for row, _ in grown.values()]
    ask = Forward(
        keep=position,
        tokens=np.array([[prefix[-1]] for prefix in grown]),
        rows=None if len(paths) == 1 else np.array(sources),
    )
    return replace(state, live=live, rows=tuple(p.history for _, p in live)), ask


def fit(logits: npt.NDArray[np.float32], shared: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return a copy of logits (R, V') over the target's V ids: -inf for what is not shared.

    The distributions outlive the call that made them, and engines may reuse what they return.
    """
    rows, size = logits.shape
    if size == len(shared) and shared.all():
        return np.array(logits, np.float32)
    fitted = np.full((rows, len(shared)), -np.inf, np.float32)
    both = min(size, len(shared))
    fitted[:, :both] = np.where(shared[:both], logits[:, :both], -np.inf)
    return fitted


def behind(history: IntArray, rows: Sequence[IntArray]) -> int:
    """Return how many tokens of the text the draft model has to read before it can draft."""
    return len(history) - min(max(common_prefix(r, history) for r in rows), len(history) - 1)


def common_prefix(a: IntArray, b: IntArray) -> int:
    """Return how many leading tokens two texts share."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def shared_with_target(request: Request, *, who: str) -> npt.NDArray[np.bool_]:
    """Return which tokens of the target the draft model has as well, bool (V,).

    Raises
    ------
    CapabilityError
        The models have different tokenizers.
    """
    target, draft = request.models["target"], request.models["draft"]
    shared = shared_tokens(target.tokenizer, draft.tokenizer)
    if shared.differs is not None:
        i = shared.differs
        names = (repr(m.tokenizer.token_name(i)) for m in (target, draft))
        raise CapabilityError(
            f"strategy {who}: models.draft ({_name(draft)}) has another tokenizer than the target "
            f"({_name(target)}): token {i} is {' against '.join(reversed(tuple(names)))}; "
            "give a draft model of the same family"
        )
    if not shared.ids.any():
        raise CapabilityError(
            f"strategy {who}: models.draft ({_name(draft)}) shares no token with the target "
            f"({_name(target)}); give a draft model of the same family"
        )
    return shared.ids


def _name(model: Model) -> str:
    return f"{model.info.name} on {model.info.backend}"
