"""Small models for tests: exact, fast, on any array library, with no weights to download.

``ToyTransformer`` is a real causal transformer that offers every capability; ``TableModel`` is a
language model whose distributions are an explicit table, so that oracles can enumerate them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from toy_tokenizer import CHATML, SMILE, ToyTokenizer, byte_tokenizer, small_tokenizer
from toy_transformer import Entry, ToySession, ToyTransformer, reference, toy_info

from steersman.core.model import PAD, Capability, Model, Output, Plan, Session

__all__ = [
    "CHATML",
    "SMILE",
    "Entry",
    "TableModel",
    "TableSession",
    "ToySession",
    "ToyTokenizer",
    "ToyTransformer",
    "byte_tokenizer",
    "enumerate_texts",
    "reference",
    "small_tokenizer",
]

Array = Any
TABLE = (
    Capability.LAST_LOGITS
    | Capability.ALL_LOGITS
    | Capability.ROLLBACK
    | Capability.ROWS
    | Capability.FORK
    | Capability.TREE
)
FLOOR = 1e-30  # probability whose logarithm stands for "never"


class TableModel(Model):
    """Next-token probabilities looked up by the last ``order`` tokens.

    Parameters
    ----------
    order : int
        Tokens that the next one depends on.
    table : float array ((V + 1,) * order + (V,)), optional
        Probabilities; index ``V`` stands for "before the beginning". Random if None.
    sharpness : float
        Standard deviation of the random table's logits; 0 is uniform.
    xp : module
        Array namespace of the logits.
    without : Capability
        What this model shall not offer.

    Attributes
    ----------
    calls : Counter
        "forward", and how many of those were "rollback", "rows", "tree", "path", "all", "empty";
        "tokens" counts the tokens computed.
    """

    def __init__(
        self,
        *,
        order: int = 1,
        table: Any = None,
        sharpness: float = 1.5,
        tokenizer: ToyTokenizer | None = None,
        xp: Any = np,
        context: int = 256,
        seed: int = 0,
        without: Capability = Capability.NONE,
    ) -> None:
        self.xp = xp
        self.order = order
        self.tokenizer = tokenizer or small_tokenizer()
        self.capabilities = TABLE & ~without
        self.calls: Counter[str] = Counter()
        self.info = toy_info(
            "toy-table", "float64", self.tokenizer, context, layers=0, width=1, heads=0
        )
        vocab = self.tokenizer.vocab_size
        shape = (vocab + 1,) * order + (vocab,)
        if table is None:
            logits = np.random.default_rng(seed).normal(size=shape) * sharpness
            table = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        self.table = np.asarray(table, np.float64)
        assert self.table.shape == shape, f"table {self.table.shape}, expected {shape}"
        assert np.allclose(self.table.sum(-1), 1), "rows of the table must sum to 1"

    def probs(self, history: Sequence[int]) -> np.ndarray:
        """Return the exact distribution (V,) after ``history``."""
        last = [int(t) for t in history[max(0, len(history) - self.order) :]]
        none = [self.tokenizer.vocab_size] * (self.order - len(last))
        return self.table[(*none, *last)]

    def probability(self, tokens: Sequence[int], prompt: Sequence[int] = ()) -> float:
        """Return the exact probability of ``tokens`` after ``prompt``."""
        history, product = list(prompt), 1.0
        for token in tokens:
            product *= float(self.probs(history)[token])
            history.append(token)
        return product

    def session(
        self,
        *,
        max_rows: int = 1,
        needs: Capability = Capability.NONE,
        context: int | None = None,
    ) -> TableSession:
        return TableSession(
            self, max_rows=max_rows, needs=needs, context=context or self.info.context
        )

    def embed(self, tokens: Any) -> Array:
        self.require(Capability.EMBEDS, who="embed")

    @property
    def embedding(self) -> Array:
        self.require(Capability.HEAD, who="embedding")

    def norm(self, hidden: Array) -> Array:
        self.require(Capability.HEAD, who="norm")

    def head(self, hidden: Array) -> Array:
        self.require(Capability.HEAD, who="head")


class TableSession(Session):
    """Rows of plain token lists, kept apart from the base class's records and compared to them."""

    model: TableModel

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)
        self.rows: list[list[int]] = [[]]
        self.trees: list[list[int]] = [[]]  # pending nodes of each row

    def _run(self, plan: Plan) -> Output:
        calls = self.model.calls
        calls["forward"] += 1
        calls["tokens"] += int(plan.counts.sum())
        calls["rows"] += not plan.identity
        calls["tree"] += plan.parents is not None
        calls["path"] += plan.path is not None
        calls["all"] += plan.logits == "all"
        calls["empty"] += not plan.width
        calls["rollback"] += any(
            base < len(self.rows[row]) for base, row in zip(plan.base, plan.rows)
        )
        assert plan.tokens is not None
        assert ((plan.tokens == PAD) == (np.arange(plan.width) >= plan.counts[:, None])).all()
        rows, trees, answers = [], [], []
        for b, row in enumerate(plan.rows):
            assert 0 <= plan.base[b] <= len(self.rows[row])
            kept = self.rows[row][: plan.base[b]]
            if plan.path is not None:
                kept = kept + [self.trees[row][node] for node in plan.path[b] if node != PAD]
            assert len(kept) == plan.start[b]
            fresh = [int(t) for t in plan.tokens[b, : plan.counts[b]]]
            histories = []
            for i in range(len(fresh)):
                seen = range(i + 1)
                if plan.ancestors is not None:
                    seen = [j for j in seen if plan.ancestors[b, i, j]]
                histories.append(kept + [fresh[j] for j in seen])
                assert plan.positions[b, i] == len(histories[-1]) - 1
            answers.append(histories)
            rows.append(kept if plan.parents is not None else kept + fresh)
            trees.append(fresh if plan.parents is not None else [])
        self.rows, self.trees = rows, trees
        return Output(logits=self._logits(plan, answers))

    def _logits(self, plan: Plan, answers: list[list[list[int]]]) -> Array | None:
        if plan.logits == "none":
            return None
        logits = np.zeros((plan.batch, plan.width, self.model.info.vocab_size), np.float32)
        for b, histories in enumerate(answers):
            for i, history in enumerate(histories):
                logits[b, i] = np.log(np.maximum(self.model.probs(history), FLOOR))
        if plan.logits == "last":
            logits = logits[np.arange(plan.batch), np.maximum(plan.counts - 1, 0)]
        return self.model.xp.asarray(logits)


def enumerate_texts(
    model: TableModel, prompt: Sequence[int], length: int
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every continuation that ends at EOS or at ``length`` tokens, with its probability.

    The probabilities sum to 1. With V = 13, ``length`` 3 gives about two thousand of them.
    """

    def grow(tokens: tuple[int, ...], chance: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(tokens) == length or (tokens and tokens[-1] in model.tokenizer.eos_ids):
            yield tokens, chance
            return
        for token, p in enumerate(model.probs([*prompt, *tokens])):
            yield from grow((*tokens, token), chance * float(p))

    yield from grow((), 1.0)
