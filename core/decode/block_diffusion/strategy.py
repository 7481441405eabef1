"""The strategy: draw a block's first token, fix the rest pass by pass, commit it causally."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...array import Array, array_namespace, asarray_like, to_numpy
from ...errors import UsageError
from ...logits import Chain
from ...logits.candidates import DRAW_TOKEN
from ...logits.stage import check_integer, check_number
from ...model import Capability, Forward, Output
from ...ops import categorical, target_logprobs
from ..rng import Rng
from ..sample import Progress, begin, draw, resumed
from ..types import Edit, Request, Step, Token
from .block import AFTER, Block, Candidates, Tools
from .confidence import Algorithm, confidences, to_fix
from .credit import CreditRule, Credits, CreditSetting, add_credit
from .mask import find_mask

MAX_BLOCK = 512  # llama.cpp computes an open block in one piece of at most this many


@dataclass(frozen=True, kw_only=True)
class _State:
    """``history`` of the progress is the prompt and all that is shown.

    Attributes
    ----------
    block : Block or None
        None while the causal head's answer is awaited.
    number : int
        Of that block, or the next.
    computed : int
        Positions of the cache that are known to be the text's, computed causally.
    asked : int
        What that will be once the present call is answered.
    """

    progress: Progress
    tools: Tools
    asked: int
    computed: int = 0
    block: Block | None = None
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class BlockDiffusion:
    """Fix the tokens of a block in any order, several per pass, then go on to the next block.

    The prompt is computed causally. Of each block, the first token comes from the causal head; the
    others begin as mask tokens. A pass computes the whole block, every position of which sees all
    others and the text before; of the masked ones those that are sure enough are fixed. A finished
    block is computed once more, causally: that is what stays in the cache, and its last logits give
    the next block's first token. A block of ``n`` tokens so takes at most ``n - 1`` passes, and the
    one that commits it; blocks of one token are plain sampling.

    For models adapted to it. Another one is not made for seeing masks, and writes nonsense.

    Parameters
    ----------
    block_length : int
        1..512. A last block that ``max_tokens`` or the context would cut is made shorter.
    small_blocks : int
        Parts of a block that are finished from left to right, a divisor of ``block_length``.
    algorithm : {"confidence_threshold", "origin", "entropy", "topk_margin"}
        "confidence_threshold" fixes every position whose token has more than ``threshold``
        probability, and the surest in any case. The others fix one position per pass, the surest
        by probability, by entropy, or by the lead of the likeliest token: no faster than sampling.
    threshold : float in [-1, 1]
        For "confidence_threshold". 1: one position per pass; below 0: all at once.
    near_ties : float in [0, 0.01]
        Positions this near to the surest are fixed with it; CreditDecoding's code has 1e-5.
    credit : off, "tuning_free" or {alpha, beta, gamma}
        CreditDecoding: see :class:`.credit.CreditRule`. ``{}`` takes the paper's coefficients.
    tempered : bool
        Confidence is measured after temperature and truncation, as NBDiff does, or (False) before,
        as CreditDecoding does. The same at temperature 0 without truncation.
    mask : int or str
        Id or text of the mask token that the model was adapted with. "auto" looks for one.
    label_shift : bool
        True: a position's logits predict the next one, as in the models made from causal ones.
        False: they predict the position itself, and the block's first token is masked as well.
    chain : Chain
        Stages up to the last one that treats tokens by their ids (penalties, bias, processors)
        act before the credit, the others after it. Stages see the fixed tokens to the left of a
        position as its history, masks left out; one with a state of its own (mirostat) begins
        anew at every masked position.

    Notes
    -----
    A text ends as soon as an end token and everything before it is fixed, where NBDiff's code
    finishes the small block first: the same text in fewer passes. With a temperature, each pass
    draws anew. The mask token is never drawn. Memory: one token and at most ``block_length``
    credits per masked position.

    References
    ----------
    Tian et al., "From Next-Token to Next-Block: A Principled Adaptation Path for Diffusion LLMs",
    arXiv:2512.06776 (NBDiff); Wang et al., "CreditDecoding", arXiv:2510.06133.
    """

    block_length: int = 32
    small_blocks: int = 1
    algorithm: Algorithm = "confidence_threshold"
    threshold: float = 0.9
    near_ties: float = 0.0
    credit: CreditSetting = False
    tempered: bool = True
    mask: int | str = "auto"
    label_shift: bool = True
    chain: Chain = field(default_factory=Chain)

    def __post_init__(self) -> None:
        name = "block_diffusion"
        check_integer(name, "block_length", self.block_length, 1, MAX_BLOCK)
        check_integer(name, "small_blocks", self.small_blocks, 1)
        if self.block_length % self.small_blocks:
            raise UsageError(
                f"{name}: small_blocks must divide block_length {self.block_length}, "
                f"got {self.small_blocks}"
            )
        if self.algorithm not in ("confidence_threshold", "origin", "entropy", "topk_margin"):
            raise UsageError(
                f"{name}: algorithm must be confidence_threshold, origin, entropy or topk_margin, "
                f"got {self.algorithm!r}"
            )
        check_number(name, "threshold", self.threshold, -1, 1)
        check_number(name, "near_ties", self.near_ties, 0, 0.01)
        CreditRule.read(self.credit)
        if isinstance(self.mask, bool) or not isinstance(self.mask, int | str) or self.mask == "":
            raise UsageError(f"{name}: mask must be auto, a token or its id, got {self.mask!r}")

    @property
    def requires(self) -> Mapping[str, Capability]:
        needs = Capability.LAST_LOGITS
        if self._opens_blocks:
            needs |= Capability.ALL_LOGITS | Capability.BLOCK | Capability.ROLLBACK
        return {"target": needs}

    @property
    def max_rows(self) -> int:
        return 1

    @property
    def _opens_blocks(self) -> bool:
        return self.block_length > 1 or not self.label_shift

    @cached_property
    def _rule(self) -> CreditRule | None:
        return CreditRule.read(self.credit)

    def init(self, request: Request, rng: Rng) -> tuple[_State, Step]:
        mask = -1
        if self._opens_blocks:
            tokenizer = request.models["target"].tokenizer
            mask = find_mask(tokenizer, self.mask, request.eos_ids | tokenizer.eos_ids)
        tools = Tools.of(self.chain, mask)
        progress = begin(request, tools.chain)
        state = _State(progress=progress, tools=tools, asked=len(request.prompt))
        if request.max_tokens == 0:
            return state, Step(finish="length")
        return state, Step(ask={"target": Forward(keep=0, tokens=request.prompt[None])})

    def cached(self, state: _State) -> int:
        """Return how many positions of the cache hold the text as causal calls would leave them.

        Less than what is shown while a block is open: a strategy that wraps this one and goes back
        must feed the rest again before it asks for anything.
        """
        return state.computed

    def resume(self, state: _State, tokens: Sequence[Token], rng: Rng) -> tuple[_State, Step]:
        """Begin a new block after ``tokens``.

        What is cached of an unfinished block was computed with masks in it, so the text from its
        beginning on is fed again.
        """
        progress = resumed(state.progress, state.tools.chain, tokens)
        length = len(progress.history)
        keep = min(state.computed, length - 1)
        state = replace(state, progress=progress, block=None, computed=keep, asked=length)
        ask = Forward(keep=keep, tokens=progress.history[None, keep:])
        return state, Step(ask={"target": ask})

    def step(self, state: _State, out: Mapping[str, Output], rng: Rng) -> tuple[_State, Step]:
        logits = out["target"].logits
        if state.block is not None:
            return self._settled(replace(state, block=self._pass(state, logits, rng)))
        return self._settled(self._opened(replace(state, computed=state.asked), logits, rng))

    # -- a block from its first token to its commit -------------------------------------------

    def _opened(self, state: _State, logits: Array, rng: Rng) -> _State:
        """Return the state with a new block."""
        progress = state.progress
        request, start = progress.request, len(progress.history)
        room = min(request.max_tokens - progress.count, max(1, request.context - start))
        tokens: list[Token | None] = [None] * min(self.block_length, room)
        if self.label_shift:
            tokens[0], drawn = draw(progress, state.tools.chain, logits, rng)
            progress = replace(progress, chain=drawn.chain)
        block = Block(start=start, tokens=tuple(tokens))
        return replace(state, progress=progress, block=block)

    def _settled(self, state: _State) -> tuple[_State, Step]:
        """Show what is fixed, and ask for the next pass, for the commit, or for no more."""
        block, progress = state.block, state.progress
        assert block is not None
        request, shown = progress.request, progress.count
        fixed = block.fixed
        fresh = fixed[len(progress.history) - block.start :]
        ends = [i for i, token in enumerate(fresh) if token.id in request.eos_ids]
        fresh = fresh[: ends[0]] if ends else fresh
        edit = Edit(keep=shown, tokens=fresh) if fresh else None
        history = np.append(progress.history, np.array([t.id for t in fresh], np.int64))
        progress = replace(progress, history=history)
        state = replace(state, progress=progress)
        note = {}
        if self._opens_blocks and (ends or block.full):
            note = {"block": state.number, "passes": block.passes}
            if len(block.tokens) < self.block_length:
                note["shortened"] = len(block.tokens)
        if ends:
            return state, Step(edit=edit, finish="eos", note=note)
        if progress.count >= request.max_tokens:
            return state, Step(edit=edit, finish="length", note=note)
        ids = block.ids(state.tools.mask)[None]
        if not block.full:
            ask = Forward(keep=block.start, tokens=ids, causal=False, logits="all")
            return state, Step(ask={"target": ask}, edit=edit)
        state = replace(state, block=None, number=state.number + 1, asked=len(history))
        return state, Step(
            ask={"target": Forward(keep=block.start, tokens=ids)}, edit=edit, note=note
        )

    def _pass(self, state: _State, logits: Array, rng: Rng) -> Block:
        """Return the block after one pass with logits (1, n, V)."""
        block = state.block
        assert block is not None
        positions = self._active(block)
        xp = array_namespace(logits)
        at = asarray_like(np.array(positions) - self.label_shift, logits)
        raw = xp.astype(xp.take(logits[0, ...], at, axis=0), xp.float32)
        candidates = Candidates(
            tools=state.tools,
            request=state.progress.request,
            prefix=state.progress.history[: block.start],
            block=block,
            positions=positions,
            rng=rng,
        )
        tools = state.tools
        settled = candidates.apply(tools.before, raw)
        credits = block.credits
        if self._rule is not None:
            credits, settled = self._credited(block, positions, settled)
        final = candidates.apply(tools.after, settled, AFTER)
        if tools.greedy:
            tokens = xp.argmax(final, axis=-1)
        else:
            tokens = categorical(final, candidates.uniforms(DRAW_TOKEN))
        sure = confidences(final if self.tempered else settled, tokens, self.algorithm)
        found = candidates.read(raw, final, tokens, sure, greedy=tools.greedy)
        chosen = to_fix(
            np.array([confidence for _, confidence in found]),
            self.threshold if self.algorithm == "confidence_threshold" else None,
            self.near_ties,
        )
        fixed = [row for row, fix in enumerate(chosen.tolist()) if fix]
        traces = candidates.traces(fixed, raw, settled, [t.id for t, _ in found])
        filled = list(block.tokens)
        for row in fixed:
            filled[positions[row]] = replace(found[row][0], trace=traces.get(row))
        return replace(block, tokens=tuple(filled), passes=block.passes + 1, credits=credits)

    def _active(self, block: Block) -> list[int]:
        """Return the masked positions of the first small block that has any."""
        part = self._part(block)
        return [j for j in part if block.tokens[j] is None]

    def _part(self, block: Block) -> range:
        size = self.block_length // self.small_blocks
        first = next(j for j, token in enumerate(block.tokens) if token is None)
        begin = first - first % size
        # The causal head's token was never masked.
        masked = max(begin, 1) if self.label_shift else begin
        return range(masked, min(begin + size, len(block.tokens)))

    def _credited(
        self, block: Block, positions: Sequence[int], logits: Array
    ) -> tuple[Credits, Array]:
        """Return the credit after this pass, and ``logits`` (m, V) moved by it."""
        assert self._rule is not None
        xp = array_namespace(logits)
        share = len(positions) / len(self._part(block))
        alpha, beta, gamma = self._rule.coefficients(share)
        leaders = xp.argmax(logits, axis=-1)
        probs = xp.exp(target_logprobs(logits, leaders))
        both = xp.stack([xp.astype(leaders, xp.float32), probs])
        tokens, chances = to_numpy(both)
        credits = block.credits.observe(
            positions, tokens.astype(np.int64), chances.astype(np.float64), beta=beta, gamma=gamma
        )
        return credits, add_credit(logits, *credits.entries(positions), alpha)
