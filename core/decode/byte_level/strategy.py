"""Byte by byte: draw from the exact law of the next byte of one model, or of several together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from ...errors import UsageError
from ...logits import Chain
from ...logits.logit_bias import LogitBias
from ...logits.processor import Processor
from ...model import Capability, Forward, IntArray, Output, Tokenizer
from ..rng import Rng
from ..types import Edit, Request, Step, Token
from .begin import begin_covers, text_after
from .covers import Covers
from .law import mixture, sharpened
from .parts import Settings
from .score import needs_of, symbols_of
from .vocabulary import FloatArray, unfinished

ROLES = ("target", "second", "third", "fourth")


def settings_of(strategy: Any, name: str) -> Settings:
    """Return the settings in a strategy's fields, after checking them.

    Raises
    ------
    UsageError
        One is out of range.
    """
    if strategy.validity not in ("exact", "fast"):
        raise UsageError(f"{name}: validity must be exact or fast, got {strategy.validity!r}")
    if not 0 <= strategy.negligible <= 0.1:
        raise UsageError(f"{name}: negligible must be in [0, 0.1], got {strategy.negligible}")
    if not 1 <= strategy.rows <= 64:
        raise UsageError(f"{name}: rows must be in 1..64, got {strategy.rows}")
    return Settings(
        exact=strategy.validity == "exact", negligible=strategy.negligible, rows=strategy.rows
    )


def second_prompt(
    prompt: IntArray, tokenizer: Tokenizer, other: Tokenizer
) -> tuple[IntArray, bytes]:
    """Return a prompt of ``tokenizer`` as ids of ``other``, and the bytes of an unfinished end.

    Control tokens that the other vocabulary knows by the same name are translated, others left
    out: a base model has no use for another model's turn marks.
    """
    names = {other.token_name(i): i for i in other.special_ids}
    ids: list[int] = []
    if other.add_bos and other.bos_id is not None:
        ids.append(other.bos_id)
    held, more = b"", b""

    def written(data: bytes) -> list[int]:
        return other.encode(data.decode("utf-8", "replace"))

    for token in prompt.tolist():
        if token not in tokenizer.special_ids:
            held += tokenizer.token_bytes(token)
            continue
        ids += written(held)
        held = b""
        match = names.get(tokenizer.token_name(token))
        if token == tokenizer.bos_id and len(ids) <= 1:
            match = None  # the other model has its own
        ids += [] if match is None else [match]
    if more := unfinished(held):
        held = held[: -len(more)]
    return np.array(ids + written(held), np.int64), more


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """``covers`` per role; ``asked`` the left parts each role was asked for last."""

    request: Request
    covers: Mapping[str, Covers]
    asked: Mapping[str, tuple[tuple[int, ...], ...]]
    count: int  # tokens emitted
    chain: Any
    left_out: float = 0.0
    unchecked: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ByteLevel:
    """Draw each byte from the exact law that the model's tokens imply for it.

    A prompt that ends inside what would have been one token makes a token model guess badly what
    comes next; here all canonical ways of writing the bytes count, so it does not matter where the
    prompt ends. Several models with different vocabularies can be averaged byte by byte.

    Parameters
    ----------
    temperature : float in [0, 10]
        Of bytes, which is not what the same temperature does to tokens: see
        :func:`.law.sharpened`. 1: the law as it is; below 0.1: the likeliest byte.
    top_p : float in (0, 1]
        Nucleus of the next byte's law.
    weights : sequence of float
        One per model: roles "target", "second", "third", "fourth". The law is the weighted mean.
    validity : {"exact", "fast"}
        Whether tokens that the tokenizer would not produce lose the little that the model gives
        them.
    negligible : float in [0, 0.1]
        Share of the probability that a law may leave out to save calls and checks.
    rows : int in 1..64
        Most left parts evaluated in one call; 1 needs no forks.
    chain : Chain
        Stages applied to the log-probabilities of the next byte, whose ids are the bytes. Stages
        that speak of tokens (penalties, bias) are refused.

    Notes
    -----
    ``max_tokens`` counts bytes. A byte is reported under the id of its own token where the
    vocabulary has one, so ``token_ids`` are not what the model was fed; ``piece`` is the byte.
    Control tokens are drawn and reported as such; an end token ends the text. With several models
    their end tokens are one symbol, and other control tokens are left out.

    Temperature leaves impossible bytes impossible, where the authors' code adds 1e-7 to each.

    References
    ----------
    Phan et al., "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and
    Model Ensembles", arXiv:2410.09303.
    """

    own_prompt: ClassVar[bool] = True  # the cache holds other tokens than those reported

    temperature: float = 1.0
    top_p: float = 1.0
    weights: tuple[float, ...] = (1.0,)
    validity: Literal["exact", "fast"] = "exact"
    negligible: float = 1e-3
    rows: int = 8
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if not 0 <= self.temperature <= 10:
            raise UsageError(f"byte_level: temperature must be in [0, 10], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"byte_level: top_p must be in (0, 1], got {self.top_p}")
        fine = all(math.isfinite(w) and w > 0 for w in self.weights)
        if not 1 <= len(self.weights) <= len(ROLES) or not fine:
            raise UsageError(
                f"byte_level: weights must be 1 to {len(ROLES)} positive numbers, "
                f"got {list(self.weights)}"
            )
        settings_of(self, "byte_level")

    @property
    def settings(self) -> Settings:
        """How covers are searched."""
        return settings_of(self, "byte_level")

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that take part."""
        return ROLES[: len(self.weights)]

    @property
    def requires(self) -> Mapping[str, Capability]:
        return dict.fromkeys(self.roles, needs_of(self.settings))

    @property
    def max_rows(self) -> int:
        return self.rows

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        for _, stage in self.chain.active:
            if stage.needs_history or isinstance(stage, LogitBias | Processor):
                raise UsageError(
                    f"byte_level: stage {stage.name} speaks of tokens, which bytes are not; "
                    "take it out, or use the strategy cover"
                )
        covers = self._begun(request, request.prompt, b"")
        state = _State(request=request, covers=covers, asked={}, count=0, chain=self.chain.init(1))
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return self._go_on(state, rng)

    def _begun(self, request: Request, ids: IntArray, more: bytes) -> dict[str, Covers]:
        """Return the covers of a text, given as the target's tokens and bytes after them."""
        found = {}
        target = request.models["target"].tokenizer
        for role in self.roles:
            tokenizer = request.models[role].tokenizer
            mine, rest = (ids, b"") if role == "target" else second_prompt(ids, target, tokenizer)
            found[role] = begin_covers(tokenizer, mine, self.settings, rest + more)
        return found

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        covers = dict(state.covers)
        for role, answer in out.items():
            covers[role] = covers[role].answered(state.asked[role], answer.logits)
        return self._go_on(replace(state, covers=covers, asked={}), rng)

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        request = state.request
        tokenizer = request.models["target"].tokenizer
        ids, more = text_after(tokenizer, request.prompt, tokens, self.settings)
        fresh = {
            role: replace(c, cached=state.covers[role].cached, counts=state.covers[role].counts)
            for role, c in self._begun(request, ids, more).items()
        }
        state = replace(state, covers=fresh, asked={}, count=len(tokens), chain=self.chain.init(1))
        asks, state = self._asks(state)
        return state, Step(ask=asks)

    # -- one byte after the other ------------------------------------------------------------

    def _asks(self, state: _State) -> tuple[dict[str, Forward], _State]:
        """Return the calls that the next law needs, and the state that waits for them."""
        covers, asked, asks = dict(state.covers), {}, {}
        for role in self.roles:
            if sequences := covers[role].missing():
                asked[role] = sequences
                covers[role], asks[role] = covers[role].ask(sequences)
        return asks, replace(state, covers=covers, asked=asked)

    def _go_on(self, state: _State, rng: Rng) -> tuple[_State, Step]:
        """Draw bytes until a call is needed or the text ends."""
        request, before = state.request, state.count
        drawn: list[Token] = []
        finish: str | None = None
        asks: dict[str, Forward] = {}
        while finish is None:
            asks, state = self._asks(state)
            if asks:
                if any(max(map(len, state.covers[r].cached)) > request.context for r in asks):
                    finish = "length"
                break
            laws, state = self._laws(state)
            if not any(law.sum() > 0 for law in laws):
                # No text of the tokenizer has these bytes: go on from one way of writing them.
                covers = {role: c.fallback() for role, c in state.covers.items()}
                state = replace(state, covers=covers)
                continue
            state, token, ended = self._draw(state, laws, rng)
            if ended:
                finish = "eos"
                break
            drawn.append(token)
            if state.count >= request.max_tokens:
                finish = "length"
        edit = Edit(keep=before, tokens=tuple(drawn)) if drawn else None
        if finish is None:
            return state, Step(ask=asks, edit=edit)
        return state, Step(edit=edit, finish=finish, note={"byte_level": self._summary(state)})

    def _laws(self, state: _State) -> tuple[list[FloatArray], _State]:
        laws, covers = [], dict(state.covers)
        left_out, unchecked = state.left_out, state.unchecked
        for role in self.roles:
            symbols, law, covers[role] = symbols_of(covers[role], ends_only=len(self.roles) > 1)
            laws.append(symbols)
            left_out = max(left_out, law.left_out)
            unchecked = max(unchecked, law.unchecked)
        return laws, replace(state, covers=covers, left_out=left_out, unchecked=unchecked)

    def _draw(
        self, state: _State, laws: Sequence[FloatArray], rng: Rng
    ) -> tuple[_State, Token, bool]:
        """Draw one symbol; return the state after it, the token that shows it, whether it ends."""
        request = state.request
        vocabulary = state.covers["target"].text.vocabulary
        raw = mixture(laws, self.weights)
        if len(self.roles) > 1 and not request.eos_ids and raw[:256].sum() > 0:
            raw[256] = 0.0  # nobody listens to ends
            raw = raw / raw.sum()
        law = sharpened(raw, self.temperature, self.top_p)
        with np.errstate(divide="ignore"):
            logits = np.log(law)[None]
        position = len(request.prompt) + state.count
        chosen = self.chain.select(
            logits,
            history=[],
            state=state.chain,
            uniforms=lambda row, key: rng.uniform(request.row + row, position, draw=key),
            logprobs=0 if request.logprobs is not None else None,
        )
        symbol = int(chosen.tokens[0])
        state = replace(state, chain=chosen.state)
        if symbol < 256:
            token, ended = int(vocabulary.single[symbol]), False
        elif len(self.roles) > 1:
            token, ended = min(request.models["target"].tokenizer.eos_ids), True
        else:
            token = int(vocabulary.specials[symbol - 256])
            ended = token in request.eos_ids
        made = Token(id=token, piece=bytes([symbol]) if symbol < 256 else b"")
        if request.logprobs is not None:
            finals = chosen.logprobs
            made = replace(
                made,
                raw_logprob=min(0.0, math.log(raw[symbol])),
                logprob=None if finals is None else float(finals[0]),
                top=_likeliest(raw, request.logprobs, vocabulary.single, vocabulary.specials),
            )
        if ended:
            return state, made, True
        if symbol < 256:
            covers = {role: c.append(symbol) for role, c in state.covers.items()}
        else:
            covers = {role: c.append_special(token) for role, c in state.covers.items()}
            made = replace(made, piece=None)
        state = replace(state, covers=covers, count=state.count + 1)
        return state, made, False

    def _summary(self, state: _State) -> dict[str, Any]:
        """Return what the trace tells at the end."""
        counts = [c.counts for c in state.covers.values()]
        totals = {key: sum(c[key] for c in counts) for key in ("calls", "rows", "tokens")}
        return {
            "bytes": state.count,
            **totals,
            "left_out": float(f"{state.left_out:.3g}"),
            "unchecked": float(f"{state.unchecked:.3g}"),
            "fallbacks": sum(c.fallbacks for c in state.covers.values()),
        }


def _likeliest(
    law: FloatArray, count: int, single: IntArray, specials: IntArray
) -> tuple[tuple[int, float], ...]:
    """Return the likeliest symbols as (id of the token that names it, log-probability)."""
    best = [int(i) for i in np.argsort(-law, kind="stable")[:count] if law[i] > 0]
    return tuple(
        (int(single[i]) if i < 256 else int(specials[i - 256]), min(0.0, math.log(law[i])))
        for i in best
    )
