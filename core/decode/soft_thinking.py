"""Soft thinking: mixtures of embeddings as thoughts, then an answer in ordinary tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..array import Array, array_namespace, asarray_like, to_numpy
from ..logits import Chain
from ..logits.min_p import apply_min_p
from ..logits.stage import check_integer, check_number
from ..logits.temperature import GREEDY_BELOW
from ..logits.top_p import apply_top_p
from ..model import Capability, Forward, IntArray, Output
from ..ops import entropy, gumbel, gumbel_softmax, log_softmax, softmax, top_k
from .rng import Rng
from .sample import Progress, appended, begin, draw, feed_last, resumed
from .types import Request, Step, Token

DRAW_NOISE = 2000
"""``draw`` key of the uniforms behind the Gumbel noise, one per candidate, likeliest first."""

NOTED = 8  # entries of a thought that its trace note holds
CODE_FLOOR = 1e-6  # what the released code adds to probabilities before the logarithm
CODE_CLAMP = (-1.5, 3.0)  # where it cuts the noise

FloatRow = npt.NDArray[np.float64]
Mode = Literal["before", "thinking", "answer"]


def thought_candidates(
    logits: Array, *, temperature: float, k: int, top_p: float, min_p: float = 0.0
) -> tuple[Array, Array]:
    """Return the candidates of a thought and their probabilities, likeliest first.

    Each truncation renormalises before the next: temperature, the ``k`` largest, the smallest
    set that reaches ``top_p``, then ``min_p``.

    Parameters
    ----------
    logits : float array (..., V)
    temperature : float >= 0
        0 leaves only the most likely token.

    Returns
    -------
    ids : signed integer array (..., min(k, V))
    probs : float array (..., min(k, V))
        Sum to 1; 0 for what was truncated.
    """
    if temperature < GREEDY_BELOW:
        values, ids = top_k(logits, 1)
        return ids, softmax(values)
    values, ids = top_k(logits, k)
    values = apply_top_p(values / temperature, top_p, ordered=True)
    return ids, softmax(apply_min_p(values, min_p))


def perturbed(probs: Array, noise: Array, *, factor: float = 1.0, as_code: bool = False) -> Array:
    """Return ``log p + factor * noise`` (..., k); -inf where ``p`` is 0.

    ``as_code`` adds 1e-6 to ``p`` and clamps the noise to [-1.5, 3], as the released code does and
    the paper does not say: the argmax is then no exact draw from ``p``.
    """
    xp = array_namespace(probs)
    if as_code:
        return xp.log(probs + CODE_FLOOR) + factor * xp.clip(noise, *CODE_CLAMP)
    some = probs > 0
    logs = xp.log(xp.where(some, probs, xp.ones_like(probs)))
    return xp.where(some, logs + factor * noise, -xp.inf)


@dataclass(frozen=True, kw_only=True)
class _State:
    progress: Progress
    mode: Mode
    forced: tuple[int, ...] = ()  # tokens of the think section's begin or end still to be written
    thoughts: int = 0
    cold: int = 0  # thoughts in a row with an entropy below the threshold


@dataclass(frozen=True, kw_only=True)
class SoftThinking:
    """Think in mixtures of token embeddings, answer in tokens.

    While thinking, the next input is not one token's embedding but ``sum_i y_i E[id_i]`` over the
    truncated candidates, with Gumbel-Softmax weights
    ``y = softmax((log p + noise_factor * gumbel) / tau_g)``. The text shows the heaviest candidate
    of each thought, which is a draw from ``p``. When the thoughts read ``end``, or after
    ``max_thoughts``, the answer is sampled from the chain as usual.

    Thinking begins where the prompt ends inside a think section (``begin`` without ``end`` after
    it; many chat templates open one), where the model's text itself begins with ``begin``, or
    where ``open`` writes it. Otherwise this is plain sampling.

    Parameters
    ----------
    temperature : float >= 0
        Of thoughts; 0 makes every thought the most likely token.
    top_k : int in 1..1024
        Most candidates in a thought.
    top_p : float in (0, 1]
    min_p : float in [0, 1]
        Truncations after the top k, in this order; 1 and 0 are off.
    tau_g : float >= 0
        Sharpness of the mixture: 0 thinks in single tokens (ordinary sampling), large values
        weigh all candidates alike.
    noise_factor : float >= 0
        0: no noise, every run thinks the same; then ``tau_g`` 1 is plain soft thinking, ``y = p``.
    as_code : bool
        Clamp the noise and floor probabilities as the paper's released code does.
    begin, end : str
        What opens and closes a think section, as text; control tokens are read as such. White
        space around them is written but need not be there to be recognised. An empty ``begin``
        thinks from the first token on.
    open : bool
        Write ``begin`` first unless the prompt has opened a think section already.
    max_thoughts : int or None
        Thoughts after which ``end`` is written; None: as many as the model likes.
    on_eos : {"answer", "stop"}
        A thought whose heaviest candidate ends the text: write ``end`` and answer, or stop, as the
        released code does.
    cold_entropy : float >= 0
        Write ``end`` once ``cold_steps`` thoughts in a row had an entropy (nats, after the
        temperature, before truncation) below this; 0 is off.
    cold_steps : int
    chain : Chain
        For the answer alone. Its history holds the thoughts' heaviest tokens.

    Notes
    -----
    The defaults are the paper's for models that were not trained to think softly; for a SofT-GRPO
    model it has temperature 1, top_k 5, top_p 0.95, tau_g 0.1. Noise is keyed by position and
    rank, so a thought is drawn again as it was. Soft positions have no token id: a later turn
    computes the text from the first thought on anew, with the visible tokens in their place.

    References
    ----------
    Zhang et al., "Soft Thinking", arXiv:2505.15778; SofT-GRPO, arXiv:2511.06411.
    """

    temperature: float = 0.6
    top_k: int = 30
    top_p: float = 0.95
    min_p: float = 0.0
    tau_g: float = 0.5
    noise_factor: float = 1.0
    as_code: bool = False
    begin: str = "<think>"
    end: str = "</think>"
    open: bool = False
    max_thoughts: int | None = None
    on_eos: Literal["answer", "stop"] = "answer"
    cold_entropy: float = 0.0
    cold_steps: int = 200
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        name = "soft_thinking"
        check_number(name, "temperature", self.temperature, 0, 10_000)
        check_integer(name, "top_k", self.top_k, 1, 1024)
        check_number(name, "top_p", self.top_p, 0, 1, low_open=True)
        check_number(name, "min_p", self.min_p, 0, 1)
        check_number(name, "tau_g", self.tau_g, 0, 1000)
        check_number(name, "noise_factor", self.noise_factor, 0, 1000)
        check_number(name, "cold_entropy", self.cold_entropy, 0, 100)
        check_integer(name, "cold_steps", self.cold_steps, 1)
        if self.max_thoughts is not None:
            check_integer(name, "max_thoughts", self.max_thoughts, 0)

    @property
    def requires(self) -> Mapping[str, Capability]:
        return {"target": Capability.LAST_LOGITS | Capability.EMBEDS}

    @property
    def max_rows(self) -> int:
        return 1

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        state = self._place(begin(request, self.chain))
        if state.mode == "before" and self.open:
            state = self._open(state, self.begin)
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        """Go on after ``tokens``; the last of them is fed as itself, also inside a thought."""
        progress = resumed(state.progress, self.chain, tokens)
        state = self._place(progress)
        if state.mode == "before" and self.open:
            written = _generated(progress)
            whole = self.begin.encode()
            if whole.startswith(written):
                state = self._open(state, whole[len(written) :].decode(errors="ignore"))
        return state, Step(ask={"target": feed_last(progress)})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        logits = out["target"].logits
        assert logits is not None
        if state.forced:
            return self._write(state, logits)
        if state.mode != "thinking":
            return self._say(state, logits, rng)
        if self.max_thoughts is not None and state.thoughts >= self.max_thoughts:
            return self._close(state, logits, rng, "limit")
        if self.cold_entropy:
            state = self._feel(state, logits)
            if state.cold >= self.cold_steps:
                return self._close(state, logits, rng, "cold")
        return self._think(state, logits, rng)

    def _say(self, state: _State, logits: Array, rng: Rng) -> tuple[_State, Step]:
        """Draw an ordinary token."""
        token, progress = draw(state.progress, self.chain, logits, rng)
        state = replace(state, progress=progress)
        if state.mode == "before" and self._opens(progress):
            state = replace(state, mode="thinking")
        return state, appended(progress, token, {"target": feed_last(progress)})

    # -- thoughts ------------------------------------------------------------------------------

    def thought(
        self, logits: Array, uniforms: FloatRow
    ) -> tuple[IntArray, FloatRow, FloatRow, FloatRow]:
        """Return one thought, heaviest candidate first: ids, weights, scores, probabilities (m,).

        Parameters
        ----------
        logits : float array (V,)
        uniforms : float64 (top_k,)
            In [0, 1), for the candidates from the likeliest on.

        Returns
        -------
        ids : int64 (m,)
            Candidates that take part.
        weights, scores, probs : float64 (m,)
            Weights of the mixture, which sum to 1; the perturbed log-probabilities they come from
            (the action that training scores); and the truncated distribution.
        """
        # The likeliest few go to the host; there the rest is a handful of numbers.
        few = 1 if self.temperature < GREEDY_BELOW else self.top_k
        values, ids = (to_numpy(part) for part in top_k(logits, few))
        order, probs = thought_candidates(
            values.astype(np.float64),
            temperature=self.temperature,
            k=few,
            top_p=self.top_p,
            min_p=self.min_p,
        )
        ids = ids[order].astype(np.int64)
        noise = gumbel(uniforms[: len(probs)])
        scores = perturbed(probs, noise, factor=self.noise_factor, as_code=self.as_code)
        weights = gumbel_softmax(scores, self.tau_g)
        order = np.argsort(-scores, kind="stable")[: np.count_nonzero(weights)]
        weights = weights[order]
        return ids[order], weights / weights.sum(), scores[order], probs[order]

    def _think(self, state: _State, logits: Array, rng: Rng) -> tuple[_State, Step]:
        progress = state.progress
        request, position = progress.request, len(progress.history)
        uniforms = rng.uniforms(request.row, position, self.top_k, draw=DRAW_NOISE)
        ids, weights, _, probs = self.thought(logits[0, :], uniforms)
        first = int(ids[0])
        if first in request.eos_ids:
            return self._close(state, logits, rng, "eos")
        # The released code can choose what top-p removed.
        token = _token(request, logits, first, float(np.log(max(probs[0], CODE_FLOOR))))
        progress = replace(progress, history=np.append(progress.history, first))
        state = replace(state, progress=progress, thoughts=state.thoughts + 1)
        facts: dict[str, Any] = {
            "thought": {
                "ids": ids[:NOTED].tolist(),
                "weights": [round(w, 4) for w in weights[:NOTED].tolist()],
            }
        }
        if _reads(progress, self.end):
            # The section's end is fed as the token it is, whatever else had some weight.
            state = replace(state, mode="answer")
            facts["thinking"] = {"thoughts": state.thoughts, "ended": "model"}
            ask = feed_last(progress)
        elif len(ids) == 1:
            ask = feed_last(progress)
        else:
            ask = Forward(keep=position, embeds=self._mixture(request, ids, weights))
        return state, replace(appended(progress, token, {"target": ask}), note=facts)

    @staticmethod
    def _mixture(request: Request, ids: IntArray, weights: FloatRow) -> Array:
        """Return ``sum_i y_i E[id_i]`` as (1, 1, D)."""
        rows = request.models["target"].embed(ids)
        mixed = asarray_like(weights.astype(np.float32)[None], rows) @ rows
        return mixed[None, ...]

    def _feel(self, state: _State, logits: Array) -> _State:
        """Count thoughts in a row whose distribution is nearly certain."""
        certain = self.temperature < GREEDY_BELOW
        nats = 0.0 if certain else float(to_numpy(entropy(logits / self.temperature))[0])
        return replace(state, cold=state.cold + 1 if nats < self.cold_entropy else 0)

    # -- the section's borders -------------------------------------------------------------------

    def _open(self, state: _State, text: str) -> _State:
        tokenizer = state.progress.request.models["target"].tokenizer
        forced = tuple(tokenizer.encode(text, special=True))
        return replace(state, mode="thinking", forced=forced)

    def _close(self, state: _State, logits: Array, rng: Rng, why: str) -> tuple[_State, Step]:
        """End the thinking: write the section's end and go on to the answer, or stop."""
        facts = {"thinking": {"thoughts": state.thoughts, "ended": why}}
        if why == "eos" and self.on_eos == "stop":
            return state, Step(finish="eos", note=facts)
        tokenizer = state.progress.request.models["target"].tokenizer
        forced = tuple(tokenizer.encode(self.end, special=True))
        state = replace(state, mode="answer", forced=forced)
        if forced:
            state, step = self._write(state, logits)
        else:
            state, step = self._say(state, logits, rng)
        return state, replace(step, note=facts)

    def _write(self, state: _State, logits: Array) -> tuple[_State, Step]:
        """Append the next token of the section's begin or end, which nobody draws."""
        first, *rest = state.forced
        progress = state.progress
        token = _token(progress.request, logits, first, 0.0)
        progress = replace(progress, history=np.append(progress.history, first))
        state = replace(state, progress=progress, forced=tuple(rest))
        return state, appended(progress, token, {"target": feed_last(progress)})

    def _place(self, progress: Progress) -> _State:
        """Return the state of a text by what it reads: before, inside or after its thoughts."""
        request = progress.request
        tokenizer = request.models["target"].tokenizer
        opening, closing = self.begin.strip().encode(), self.end.strip().encode()
        prompt = b"".join(map(tokenizer.token_bytes, request.prompt.tolist()))
        at = prompt.rfind(opening)
        mode: Mode = "before"
        if not opening or (at >= 0 and (not closing or closing not in prompt[at:])):
            mode = "thinking"
        thoughts = 0
        for length in range(len(request.prompt) + 1, len(progress.history) + 1):
            grown = replace(progress, history=progress.history[:length])
            if mode == "before" and self._opens(grown):
                mode = "thinking"
            elif mode == "thinking":
                thoughts += 1
                mode = "answer" if _reads(grown, self.end) else "thinking"
        return _State(progress=progress, mode=mode, thoughts=thoughts)

    def _opens(self, progress: Progress) -> bool:
        """Whether the generated text is ``begin``, complete with its last token."""
        marker = self.begin.strip().encode()
        if progress.count > 4 * len(marker):
            return False
        return _generated(progress).lstrip().startswith(marker) and _reads(progress, self.begin)


def _generated(progress: Progress) -> bytes:
    """Return the generated text, control tokens by name."""
    tokenizer = progress.request.models["target"].tokenizer
    ids = progress.history[len(progress.request.prompt) :]
    return b"".join(map(tokenizer.token_bytes, ids.tolist()))


def _reads(progress: Progress, marker: str) -> bool:
    """Whether the text's last token completes ``marker`` within the generated text."""
    wanted = marker.strip().encode()
    if not wanted:
        return False
    tokenizer = progress.request.models["target"].tokenizer
    tail = last = tokenizer.token_bytes(int(progress.history[-1]))
    for back in range(2, progress.count + 1):
        if len(tail) - len(last) >= len(wanted) - 1:
            break
        tail = tokenizer.token_bytes(int(progress.history[-back])) + tail
    return tail.find(wanted, max(0, len(tail) - len(last) - len(wanted) + 1)) >= 0


def _token(request: Request, logits: Array, chosen: int, logprob: float) -> Token:
    """Return a token that no chain drew, with what was asked about it."""
    if request.logprobs is None:
        return Token(id=chosen)
    raw = log_softmax(logits)[0, :]
    top: tuple[tuple[int, float], ...] = ()
    if request.logprobs:
        values, ids = (to_numpy(part) for part in top_k(raw, request.logprobs))
        top = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))
    return Token(id=chosen, raw_logprob=float(to_numpy(raw[chosen])), logprob=logprob, top=top)
