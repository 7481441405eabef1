"""A table model that also answers open blocks: masked-language-model distributions to enumerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from toys import FLOOR, TableModel, TableSession

from steersman.core.model import Capability, Output, Plan

MASK = 11  # "<bos>" of the small tokenizer: never produced
Guess = Callable[[Sequence[int], Sequence[int]], np.ndarray]


class MaskedModel(TableModel):
    """A chain of order 1 that never produces ``MASK``, and guesses at masked positions.

    Parameters
    ----------
    table : float array (V + 1, V), optional
        Of the causal model; random if None.
    guess : callable (text before the block, block) -> float array (n, V), optional
        Probabilities at every position of an open block. By default the exact conditionals of the
        causal model, given the tokens that are not ``MASK``.
    shift : bool
        Logits of a position predict the next one; those of the last are noise then.
    """

    def __init__(
        self,
        *,
        table: Any = None,
        guess: Guess | None = None,
        shift: bool = True,
        seed: int = 0,
        sharpness: float = 1.5,
        **options: Any,
    ) -> None:
        if table is None:
            logits = np.random.default_rng(seed).normal(size=(14, 13)) * sharpness
            logits[:, MASK] = -np.inf
            table = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        super().__init__(table=table, seed=seed, **options)
        self.capabilities |= Capability.BLOCK
        self.guess = guess or self.exact
        self.shift = shift
        self.asked: list[tuple[int, ...]] = []  # every open block, as it was fed

    def session(self, **options: Any) -> MaskedSession:
        options["context"] = options.get("context") or self.info.context
        return MaskedSession(
            self, **{"max_rows": 1, "needs": Capability.NONE, "context": 256, **options}
        )

    def exact(self, before: Sequence[int], block: Sequence[int]) -> np.ndarray:
        """Return the conditionals of each position given all that is not masked."""
        vocab = self.info.vocab_size
        given = np.ones((len(block), vocab))
        for j, token in enumerate(block):
            if token != MASK:
                given[j] = np.arange(vocab) == token
        steps = self.table[:vocab]
        forward = [self.table[before[-1] if len(before) else vocab] * given[0]]
        backward = [np.ones(vocab)]
        for j in range(1, len(block)):
            forward.append(forward[-1] @ steps * given[j])
            backward.append(steps @ (given[-j] * backward[-1]))
        probs = np.array(forward) * np.array(backward[::-1])
        return probs / probs.sum(-1, keepdims=True)


class MaskedSession(TableSession):
    model: MaskedModel

    def _run(self, plan: Plan) -> Output:
        if not plan.causal:
            assert plan.tokens is not None
            assert plan.batch == 1
            self.model.asked.append(tuple(plan.tokens[0].tolist()))
        return super()._run(plan)

    def _logits(self, plan: Plan, answers: list[list[list[int]]]) -> Any:
        if plan.causal:
            return super()._logits(plan, answers)
        assert plan.tokens is not None
        assert plan.logits == "all"
        block = plan.tokens[0].tolist()
        before = self.rows[0][: plan.start[0]]
        probs = self.model.guess(before, block)
        if self.model.shift:
            noise = np.random.default_rng(len(before)).dirichlet(np.ones(probs.shape[1]))
            probs = np.vstack([probs[1:], noise])
        return self.model.xp.asarray(np.log(np.maximum(probs, FLOOR))[None].astype(np.float32))
