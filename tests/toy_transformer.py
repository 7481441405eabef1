"""A transformer small enough for tests that offers every capability on any array library."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from toy_tokenizer import ToyTokenizer, byte_tokenizer

from steersman.core.array import to_numpy
from steersman.core.model import PAD, Capability, Model, ModelInfo, Output, Plan, Session

Array = Any
EVERYTHING = ~Capability.NONE


def toy_info(
    name: str, dtype: str, tokenizer: ToyTokenizer, context: int, **shape: int
) -> ModelInfo:
    return ModelInfo(
        name=name,
        backend="toy",
        path="",
        architecture="toy",
        dtype=dtype,
        device="cpu",
        vocab_size=tokenizer.vocab_size,
        context=context,
        trained_context=context,
        batch_invariant=True,
        threads=1,
        **shape,
    )


@dataclass
class Entry:
    """What the cache holds for one position: keys and values (H, Dh) of every layer."""

    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)


class ToyTransformer(Model):
    """A causal transformer with fixed random weights: RMS norm, rotary positions, scaled embedding.

    Each position is computed by itself, over exactly the keys it sees, so the same question has
    bit for bit the same answer however it is asked (``batch_invariant``).

    Parameters
    ----------
    xp : module
        Array namespace to compute with; weights are float64 except on mlx.
    tokenizer : ToyTokenizer, optional
        ``byte_tokenizer()`` if None; use ``small_tokenizer()`` for V = 13.
    seed : int
        Other seeds are other models of the same shape (drafts, experts, amateurs).
    without : Capability
        What this model shall not offer.

    Attributes
    ----------
    session_class : type
        What ``session`` opens; tests put faulty copies here.
    calls : Counter
        Number of ``forward`` calls ("forward") and of tokens computed ("tokens").
    """

    def __init__(
        self,
        xp: Any = np,
        *,
        tokenizer: ToyTokenizer | None = None,
        layers: int = 2,
        width: int = 16,
        heads: int = 2,
        context: int = 256,
        seed: int = 0,
        without: Capability = Capability.NONE,
    ) -> None:
        self.xp = xp
        self.tokenizer = tokenizer or byte_tokenizer()
        self.capabilities = EVERYTHING & ~without
        self.session_class: type[ToySession] = ToySession
        self.calls: Counter[str] = Counter()
        self._wide = xp.float32 if "mlx" in xp.__name__ else xp.float64
        self.scale = math.sqrt(width)
        self.info = toy_info(
            "toy-transformer",
            "float32" if "mlx" in xp.__name__ else "float64",
            self.tokenizer,
            context,
            layers=layers,
            width=width,
            heads=heads,
        )
        rng = np.random.default_rng(seed)

        def weight(*shape: int, scale: float = 1.0) -> np.ndarray:
            # Rounded to float32 so that embeddings handed out as float32 lose nothing.
            return (rng.normal(size=shape) * scale).astype(np.float32)

        root = 1 / math.sqrt(width)
        vocab = self.tokenizer.vocab_size
        self.weights: dict[str, np.ndarray] = {
            "embedding": weight(vocab, width, scale=0.5),
            "norm": 1 + weight(width, scale=0.2),
            "head": weight(vocab, width, scale=0.6),
        }
        for i in range(layers):
            self.weights |= {
                f"{i}.norm1": 1 + weight(width, scale=0.2),
                f"{i}.norm2": 1 + weight(width, scale=0.2),
                f"{i}.qkv": weight(3 * width, width, scale=1.5 * root),
                f"{i}.out": weight(width, width, scale=1.5 * root),
                f"{i}.up": weight(2 * width, width, scale=root),
                f"{i}.down": weight(width, 2 * width, scale=root),
            }
        self._turns: dict[int, tuple[Array, Array]] = {}
        self._w = {name: self._array(value) for name, value in self.weights.items()}

    def session(
        self,
        *,
        max_rows: int = 1,
        needs: Capability = Capability.NONE,
        context: int | None = None,
    ) -> ToySession:
        return self.session_class(
            self, max_rows=max_rows, needs=needs, context=context or self.info.context
        )

    def embed(self, tokens: Any) -> Array:
        self.require(Capability.EMBEDS, who="embed")
        return self.xp.asarray(
            self.weights["embedding"][np.asarray(tokens)] * np.float32(self.scale)
        )

    @property
    def embedding(self) -> Array:
        self.require(Capability.HEAD, who="embedding")
        return self.xp.asarray(self.weights["embedding"] * np.float32(self.scale))

    def norm(self, hidden: Array) -> Array:
        self.require(Capability.HEAD, who="norm")
        return self._rms(self.xp.astype(hidden, self._wide), self._w["norm"])

    def head(self, hidden: Array) -> Array:
        self.require(Capability.HEAD, who="head")
        xp, flat = self.xp, self.xp.reshape(hidden, (-1, self.info.width))
        rows = [self._logits(xp.astype(flat[i, ...], self._wide)) for i in range(flat.shape[0])]
        return xp.reshape(xp.stack(rows), (*hidden.shape[:-1], self.info.vocab_size))

    # -- pieces of a layer, on one position ----------------------------------------------------

    def _array(self, values: np.ndarray) -> Array:
        array = self.xp.astype(self.xp.asarray(np.asarray(values)), self._wide)
        to_numpy(array)  # mlx: lazy arrays must not cross threads
        return array

    def _rms(self, x: Array, gain: Array) -> Array:
        xp = self.xp
        return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain

    def _logits(self, x: Array) -> Array:
        return self.xp.astype(self._w["head"] @ self._rms(x, self._w["norm"]), self.xp.float32)

    def _turn(self, position: int, half: int) -> tuple[Array, Array]:
        if position not in self._turns:
            angle = position * 100.0 ** (-np.arange(half) / half)
            self._turns[position] = (self._array(np.cos(angle)), self._array(np.sin(angle)))
        return self._turns[position]

    def _rotate(self, x: Array, position: int) -> Array:
        half = x.shape[-1] // 2
        cos, sin = self._turn(position, half)
        a, b = x[:, :half], x[:, half:]
        return self.xp.concat([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _attend(self, query: Array, seen: Sequence[Entry], layer: int) -> tuple[Array, Array]:
        """Return the mixed values (H, Dh) and the weights (S, H) over the entries seen."""
        xp = self.xp
        keys = xp.stack([entry.keys[layer] for entry in seen])  # (S, H, Dh)
        values = xp.stack([entry.values[layer] for entry in seen])
        scores = xp.sum(query[None, ...] * keys, axis=-1) / math.sqrt(query.shape[-1])
        weights = xp.exp(scores - xp.max(scores, axis=0, keepdims=True))
        weights = weights / xp.sum(weights, axis=0, keepdims=True)
        return xp.sum(weights[..., None] * values, axis=0), weights


class ToySession(Session):
    """Rows of :class:`Entry`; the methods below are what faulty copies in tests override."""

    model: ToyTransformer

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)
        self.rows: list[list[Entry]] = [[]]
        self.tree_base: list[int] = [0]  # cached entries before the pending tree

    def close(self) -> None:
        super().close()
        self.rows = []

    def kept(self, plan: Plan, row: int) -> list[Entry]:
        """Return the entries that new row ``row`` starts from."""
        old = self.rows[plan.rows[row]]
        entries = old[: plan.base[row]]
        if plan.path is not None:
            nodes = old[self.tree_base[plan.rows[row]] :]
            entries = entries + [nodes[i] for i in plan.path[row] if i != PAD]
        return entries

    def position(self, plan: Plan, row: int, i: int) -> int:
        return int(plan.positions[row, i])

    def sees(self, plan: Plan, row: int, i: int, j: int) -> bool:
        """Whether new position ``i`` of a row attends to new position ``j``."""
        if plan.ancestors is not None:
            return bool(plan.ancestors[row, i, j])
        return j <= i or not plan.causal

    def _run(self, plan: Plan) -> Output:
        self.model.calls["forward"] += 1
        self.model.calls["tokens"] += int(plan.counts.sum())
        rows = [self.kept(plan, b) for b in range(plan.batch)]
        answers = [self._row(plan, b, entries) for b, entries in enumerate(rows)]
        self.rows = rows
        self.tree_base = plan.start.tolist() if plan.parents is not None else plan.end.tolist()
        return self._output(plan, answers)

    def _row(self, plan: Plan, b: int, entries: list[Entry]) -> tuple[list[list[Array]], Any]:
        """Compute one row, append its entries; return states by layer and attention weights."""
        model, xp = self.model, self.model.xp
        count, start = int(plan.counts[b]), len(entries)
        heads = model.info.heads
        if plan.tokens is None:
            assert plan.embeds is not None
            x = [xp.astype(plan.embeds[b, i, ...], model._wide) for i in range(count)]
        else:
            table = model._w["embedding"]
            x = [table[int(t), ...] * model.scale for t in plan.tokens[b, :count]]
        fresh = [Entry() for _ in x]
        states, weights = [x], np.zeros((model.info.layers, heads, count, start + count))
        for layer in range(model.info.layers):
            w = {name: model._w[f"{layer}.{name}"] for name in ("qkv", "out", "up", "down")}
            queries = []
            for i, state in enumerate(x):
                qkv = w["qkv"] @ model._rms(state, model._w[f"{layer}.norm1"])
                qkv = xp.reshape(qkv, (3, heads, -1))
                position = self.position(plan, b, i)
                queries.append(model._rotate(qkv[0, ...], position))
                fresh[i].keys.append(model._rotate(qkv[1, ...], position))
                fresh[i].values.append(qkv[2, ...])
            after = []
            for i, state in enumerate(x):
                new = [j for j in range(count) if self.sees(plan, b, i, j)]
                mixed, seen = model._attend(queries[i], entries + [fresh[j] for j in new], layer)
                if layer in plan.attentions:
                    columns = [*range(start), *(start + j for j in new)]
                    weights[layer][:, i, columns] = to_numpy(seen).T
                state = state + w["out"] @ xp.reshape(mixed, (-1,))
                up = xp.tanh(w["up"] @ model._rms(state, model._w[f"{layer}.norm2"]))
                after.append(state + w["down"] @ up)
            x = after
            states.append(x)
        entries += fresh
        return states, weights

    def _output(self, plan: Plan, answers: list[Any]) -> Output:
        model, xp = self.model, self.model.xp

        blank = xp.zeros(model.info.vocab_size, dtype=xp.float32)
        logits = None
        if plan.logits != "none" and plan.width:
            size = 1 if plan.logits == "last" else plan.width
            per_row = []
            for states, _ in answers:
                found = [model._logits(x) for x in (states[-1][-1:] if size == 1 else states[-1])]
                per_row.append(xp.stack(found + [blank] * (size - len(found))))
            logits = xp.stack(per_row)
            logits = logits[:, 0, :] if plan.logits == "last" else logits
        nothing = xp.zeros(model.info.width, dtype=model._wide)
        hidden = {
            layer: xp.stack(
                [
                    xp.stack(states[layer] + [nothing] * (plan.width - len(states[layer])))
                    for states, _ in answers
                ]
            )
            for layer in plan.hidden
        }
        attentions = {}
        for layer in plan.attentions:
            span = int(plan.end.max())
            full = np.zeros((plan.batch, model.info.heads, plan.width, span), np.float32)
            for b, (_, weights) in enumerate(answers):
                full[b, :, : weights.shape[2], : weights.shape[3]] = weights[layer]
            attentions[layer] = xp.asarray(full)
        return Output(logits=logits, hidden=hidden, attentions=attentions)


def reference(
    model: ToyTransformer,
    tokens: Sequence[int],
    *,
    positions: Sequence[int] | None = None,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Compute everything from the token list alone, in one piece, with NumPy float64.

    Written apart from the session on purpose: no cache, no loop over positions, another formula
    for the rotation. ``mask[i, j]`` says whether position ``i`` sees ``j`` (causal if None).

    Returns
    -------
    logits (n, V), hidden states (L + 1 arrays (n, D)), attention weights (L arrays (H, n, n))
    """
    w = {name: value.astype(np.float64) for name, value in model.weights.items()}
    n, heads, width = len(tokens), model.info.heads, model.info.width
    place = np.arange(n) if positions is None else np.asarray(positions)
    seen = np.tril(np.ones((n, n), bool)) if mask is None else mask

    def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain

    def rotate(x: np.ndarray) -> np.ndarray:  # (n, H, Dh) as complex numbers
        half = x.shape[-1] // 2
        turn = np.exp(1j * place[:, None] * 100.0 ** (-np.arange(half) / half))[:, None]
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = w["embedding"][list(tokens)] * model.scale
    hidden, attentions = [x], []
    for i in range(model.info.layers):
        qkv = (rms(x, w[f"{i}.norm1"]) @ w[f"{i}.qkv"].T).reshape(n, 3, heads, -1)
        q, k, v = rotate(qkv[:, 0]), rotate(qkv[:, 1]), qkv[:, 2]
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attentions.append(weights)
        x = x + np.einsum("hij,jhd->ihd", weights, v).reshape(n, width) @ w[f"{i}.out"].T
        x = x + np.tanh(rms(x, w[f"{i}.norm2"]) @ w[f"{i}.up"].T) @ w[f"{i}.down"].T
        hidden.append(x)
    return rms(x, w["norm"]) @ w["head"].T, hidden, attentions
