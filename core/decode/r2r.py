"""R2R: a small model writes; a large one is asked for the tokens where their ways would part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..array import to_numpy
from ..errors import UsageError
from ..logits import Chain
from ..logits.stage import check_number
from ..model import Capability, Forward, Output
from ..ops import entropy
from ..routing import Router
from ..routing.features import step_features
from ..routing.router import read_router
from ..same_tokens import same_tokens
from .rng import Rng
from .sample import Progress, appended, begin, draw, resumed
from .types import Request, Step, Token

DRAW_ROUTE = 4000  # key of the number that the random router draws
LIMITS: Mapping[str, float] = {"entropy": 0.45, "random": 0.9}


@dataclass(frozen=True, kw_only=True)
class _State:
    progress: Progress
    fed: bool = False  # the prompt but its last token is in the small model's cache
    behind: int = 0  # first position that the large model has not read
    score: float = 0.0  # the router's verdict on the token that the large model is asked for
    routed: int = 0
    proposed: int | None = None


@dataclass(frozen=True, kw_only=True)
class R2R:
    """Let the role "small" write, and the target draw those tokens that a router marks.

    Every token begins with a step of the small model. The router looks at it before the token is
    committed: from ``threshold`` on the target reads everything that was written since its last
    call and draws the token instead. Both draw with the same chain and the same random numbers.
    The text is a mixture of both models; it follows neither distribution exactly.

    Parameters
    ----------
    router : {"entropy", "neural", "random"}, optional
        Default: neural if there is a ``router_file``, else entropy.
        "neural": a trained network on the small model's logits, its hidden state and the embedding
        of its token; needs ``router_file``. "entropy": the entropy of the small model's untouched
        distribution, in nats; needs logits only. "random": a baseline, with ``threshold`` as the
        share of tokens that are *not* routed.
    router_file : str, optional
        Made by ``steersman train r2r``; only the neural router reads it. In a profile the path is
        relative to the profile's file.
    threshold : float, optional
        Route from this score on. Default: the file's; 0.45 nats for "entropy", 0.9 for "random".
    max_share : float in [0, 1]
        Most tokens, as a share of those written, that may go to the target; 1 sets no limit.
    chain : Chain

    Notes
    -----
    The large model's first call reads the prompt, so a text that never needs it never pays for it.
    Its calls extend its cache by all tokens since the last one; nothing is ever rolled back.
    ``max_share`` is ours.

    References
    ----------
    Fu et al., "R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token
    Routing", arXiv:2505.21600.
    """

    router: Literal["entropy", "neural", "random"] | None = None
    router_file: str | None = field(default=None, metadata={"path": True})
    threshold: float | None = None
    max_share: float = 1.0
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        if self.router not in (None, "entropy", "neural", "random"):
            raise UsageError(f"r2r: router must be entropy, neural or random, got {self.router!r}")
        if self.router == "neural" and self.router_file is None:
            raise UsageError(
                "r2r: router: neural needs router_file; make one with steersman train r2r"
            )
        if self.threshold is not None:
            check_number("r2r", "threshold", self.threshold, 0, 1e6)
        check_number("r2r", "max_share", self.max_share, 0, 1)

    @property
    def kind(self) -> str:
        """Which router decides."""
        return self.router or ("entropy" if self.router_file is None else "neural")

    @property
    def requires(self) -> Mapping[str, Capability]:
        small = Capability.LAST_LOGITS
        if self.kind == "neural":
            small |= Capability.HIDDEN | Capability.HEAD
        return {"target": Capability.LAST_LOGITS, "small": small}

    @property
    def max_rows(self) -> int:
        return 1

    @cached_property
    def loaded(self) -> Router | None:
        """The trained router, read from its file when first needed."""
        return read_router(Path(str(self.router_file))) if self.kind == "neural" else None

    @property
    def limit(self) -> float:
        """The score from which a token is routed."""
        if self.threshold is not None:
            return self.threshold
        if self.loaded is not None:
            return self.loaded.threshold
        return LIMITS[self.kind]

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        small, target = request.models["small"], request.models["target"]
        if not same_tokens(small.tokenizer, target.tokenizer):
            raise UsageError(
                f"r2r: {small.info.name} and {target.info.name} have different tokens; "
                "choose a small model of the same family"
            )
        if self.loaded is not None:
            self.loaded.check(small.info, target.info, where=str(self.router_file))
        state = _State(progress=begin(request, self.chain))
        if request.max_tokens == 0:
            return state, Step(finish="length")
        if len(request.prompt) == 1 or self.kind != "neural":
            state = replace(state, fed=True)
            ask = Forward(keep=0, tokens=request.prompt[None], hidden=self._layers(request))
        else:
            # The hidden state is wanted at the last position only, so the rest goes first.
            ask = Forward(keep=0, tokens=request.prompt[None, :-1], logits="none")
        return state, Step(ask={"small": ask})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        if not state.fed:
            return replace(state, fed=True), Step(ask={"small": self._feed(state.progress)})
        if "target" in out:
            return self._large(state, out["target"], rng)
        answer = out["small"]
        token, progress = draw(state.progress, self.chain, answer.logits, rng)
        score = self._score(state.progress, answer, token, rng)
        written = state.progress.count + 1
        if score >= self.limit and state.routed + 1 <= self.max_share * written:
            ids = state.progress.history
            ask = Forward(keep=state.behind, tokens=ids[None, state.behind :])
            state = replace(state, score=score, behind=len(ids), proposed=token.id)
            return state, Step(ask={"target": ask})
        note = {"routed": "small", "score": round(score, 4)}
        return self._commit(replace(state, progress=progress), token, note)

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        progress = resumed(state.progress, self.chain, tokens)
        behind = min(state.behind, len(progress.history) - 1)
        state = replace(state, progress=progress, behind=behind, fed=True)
        return state, Step(ask={"small": self._feed(progress)})

    def _large(self, state: _State, answer: Output, rng: Rng) -> tuple[_State, Step]:
        token, progress = draw(state.progress, self.chain, answer.logits, rng)
        note = {"routed": "target", "score": round(state.score, 4), "proposed": state.proposed}
        state = replace(state, progress=progress, routed=state.routed + 1)
        return self._commit(state, token, note)

    def _commit(self, state: _State, token: Token, note: Mapping[str, Any]) -> tuple[_State, Step]:
        step = appended(state.progress, token, {"small": self._feed(state.progress)})
        return state, replace(step, note=note)

    def _layers(self, request: Request) -> tuple[int, ...]:
        return (request.models["small"].info.layers,) if self.kind == "neural" else ()

    def _feed(self, progress: Progress) -> Forward:
        ids = progress.history
        hidden = self._layers(progress.request)
        return Forward(keep=len(ids) - 1, tokens=ids[None, -1:], hidden=hidden)

    def _score(self, before: Progress, answer: Output, token: Token, rng: Rng) -> float:
        logits = answer.logits
        assert logits is not None
        if self.kind == "entropy":
            return float(to_numpy(entropy(logits[:1, :]))[0])
        if self.kind == "random":
            row, position = before.request.row, len(before.history)
            return rng.uniform(row, position, draw=DRAW_ROUTE)
        assert self.loaded is not None
        model = before.request.models["small"]
        hidden = answer.hidden[model.info.layers][0, -1, :]
        features = step_features(model, logits[0, :], hidden, token.id, top=self.loaded.shape.top)
        return self.loaded.probability(*features)
