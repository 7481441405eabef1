"""DoLa: contrast the last layer's distribution with an earlier layer's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..array import array_namespace, asarray_like, to_numpy
from ..errors import UsageError
from ..logits import Chain
from ..model import Array, Capability, Forward, Output
from ..ops import js_divergence, log_softmax
from .rng import Rng
from .sample import Progress, appended, begin, draw
from .types import Request, Step


@dataclass(frozen=True, kw_only=True)
class _State:
    progress: Progress
    candidates: tuple[int, ...]
    fed: bool  # whether the prompt but its last token is in the cache


@dataclass(frozen=True, kw_only=True)
class DoLa:
    """Decode by contrasting layers, to favour what the upper layers add.

    Among the candidate ("premature") layers the one whose distribution is farthest from the last
    layer's, by Jensen-Shannon divergence, is chosen anew for each token. Tokens that the last
    layer finds at least ``relative_top`` times as likely as its best are scored
    ``log p_last - log p_premature``; the others are removed. The chain then works on these scores.

    Parameters
    ----------
    layers : {"low", "high"} or list of int
        Candidates: every second layer of the lower or upper half ("low" starts at 2 when input and
        output embeddings may be tied, where layer 0 would only repeat the input token), or layer
        numbers in the convention of ``Forward.hidden``, 0..L-1.
    relative_top : float in [0, 1]
        Plausibility threshold; 0 keeps every token.
    chain : Chain
        Stages applied to the contrasted scores. The paper uses a repetition penalty of 1.2.

    Notes
    -----
    An early layer's distribution here is ``softmax(head(hidden))``, where ``head`` includes the
    final norm ("logit lens"); the paper's code projects without the norm, which leaves early
    layers on another scale.

    References
    ----------
    Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language
    Models", arXiv:2309.03883.
    """

    layers: Literal["low", "high"] | tuple[int, ...] = "low"
    relative_top: float = 0.1
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            if self.layers not in ("low", "high"):
                raise UsageError(
                    f"dola: layers must be low, high or a list of numbers, got {self.layers!r}"
                )
        elif not self.layers:
            raise UsageError("dola: layers must name at least one layer")
        if not 0 <= self.relative_top <= 1:
            raise UsageError(f"dola: relative_top must be in [0, 1], got {self.relative_top}")

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS | Capability.HIDDEN | Capability.HEAD}

    @property
    def max_rows(self) -> int:
        return 1

    def candidates(self, depth: int) -> tuple[int, ...]:
        """Return the candidate layers of a model with ``depth`` layers."""
        if isinstance(self.layers, str):
            half = depth // 2
            begin, end = (2, half) if self.layers == "low" else (half, depth)
            return tuple(range(begin, end, 2)) or (0,)
        outside = [i for i in self.layers if not 0 <= i < depth]
        if outside:
            raise UsageError(f"dola: layer {outside[0]} outside 0..{depth - 1}")
        return tuple(self.layers)

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        depth = request.models["target"].info.layers
        state = _State(
            progress=begin(request, self.chain),
            candidates=self.candidates(depth),
            fed=len(request.prompt) > 1,
        )
        if request.max_tokens == 0:
            return state, Step(finish="length")
        if not state.fed:
            return state, Step(ask={"target": self._next(state)})
        # Hidden states are wanted at the last position only, so the rest goes first, without.
        ask = Forward(keep=0, tokens=request.prompt[None, :-1], logits="none")
        return state, Step(ask={"target": ask})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        if state.fed:
            return replace(state, fed=False), Step(ask={"target": self._next(state)})
        model, logits = state.progress.request.models["target"], out["target"].logits
        assert logits is not None
        early = [
            model.head(out["target"].hidden[layer][:, -1, :])[0, ...] for layer in state.candidates
        ]
        xp = array_namespace(*early)
        scores = contrast_layers(logits[0, ...], xp.stack(early), self.relative_top)
        token, progress = draw(
            state.progress, self.chain, scores[None, ...], rng, raw=logits, name="dola"
        )
        if progress.request.logprobs is not None:
            raw = log_softmax(logits)[0, token.id]
            token = replace(token, raw_logprob=float(to_numpy(raw)))
        state = replace(state, progress=progress)
        return state, appended(progress, token, {"target": self._next(state)})

    @staticmethod
    def _next(state: _State) -> Forward:
        history = state.progress.history
        return Forward(keep=len(history) - 1, tokens=history[None, -1:], hidden=state.candidates)


def contrast_layers(last: Array, early: Array, relative_top: float) -> Array:
    """Return DoLa's scores of one position.

    Parameters
    ----------
    last : float array (V,)
        Logits of the last layer.
    early : float array (C, V)
        Logits of the candidate layers.
    relative_top : float in [0, 1]
        Tokens less likely than this share of the best one get -inf; 0 keeps all.

    Returns
    -------
    float array (V,)
        ``log p_last - log p_early`` for the candidate farthest from ``last``.
    """
    xp = array_namespace(last, early)
    final, lenses = log_softmax(last), log_softmax(early)
    divergence = js_divergence(xp.broadcast_to(final[None, :], lenses.shape), lenses)
    chosen = xp.take(lenses, xp.reshape(xp.argmax(divergence), (1,)), axis=0)[0, ...]
    if relative_top == 0:
        return final - chosen
    floor = xp.max(final) + math.log(relative_top)
    return xp.where(final >= floor, final - chosen, asarray_like(-np.inf, final, dtype=final.dtype))
