"""The model contract: what a strategy may ask of a language model, on any engine.

A :class:`Model` is loaded weights plus a tokenizer; it is immutable and shared between threads.
A :class:`Session` is a cache of one or more rows on such a model; each belongs to one thread at a
time. The one verb of a session is :meth:`Session.forward`: *keep the first tokens of each row,
append these, and return that*. Going back, forking, draft trees, soft tokens and blocks with full
attention are all fields of the same small value, :class:`Forward`.

All checks of arguments live here, once, so that no adapter can be made to crash (or to answer
nonsense) by a bad index; adapters implement :meth:`Session._run` on a checked :class:`Plan`.

Conventions
-----------
- ``B`` rows, ``n`` new positions, ``S`` cached positions, ``V`` vocabulary, ``D`` width, ``L``
  layers, ``H`` attention heads.
- Token ids, lengths and indices are host integers (NumPy int64); ``-1`` is padding on the right.
- Logits are float32 arrays of the engine's own library, never shifted: the logits *of* position
  ``t`` predict the token *at* ``t + 1``, so the log-probability of token ``t`` comes from the
  logits of position ``t - 1``.
- Hidden state ``i`` (``0 <= i <= L``) is the residual stream after ``i`` layers: 0 is the (scaled)
  embedding, ``L`` the last layer's output *before* the final norm. ``Model.head`` applies the final
  norm and the projection to any of them, so ``head(hidden[L]) == logits``.
- Attention of layer ``i`` (``0 <= i < L``) is the softmax of block ``i``.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from .errors import CapabilityError, ContextOverflow, UsageError

Array = Any  # an array of numpy, torch, mlx or any other array-API library
IntArray = npt.NDArray[np.int64]
PAD = -1


class Capability(Flag):
    """What a loaded model can do. A strategy's ``requires`` is a set of the same flags."""

    NONE = 0
    LAST_LOGITS = auto()  # logits of the last new position
    ALL_LOGITS = auto()  # logits of every new position
    ROLLBACK = auto()  # keep fewer tokens than are cached
    ROWS = auto()  # several rows of unequal length in one call
    FORK = auto()  # rows continue, repeat or drop cached rows
    TREE = auto()  # draft trees in one call
    HIDDEN = auto()  # hidden states of chosen layers
    ATTENTIONS = auto()  # attention weights of chosen layers
    EMBEDS = auto()  # soft tokens: embeddings as input
    BLOCK = auto()  # new positions attend to each other both ways
    HEAD = auto()  # embedding matrix, final norm and projection as functions

    def names(self) -> list[str]:
        """Return the names of the single flags in this set, in declaration order."""
        return [flag.name or "" for flag in Capability if flag in self and flag.value]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Keep the first ``keep`` tokens of each row, append tokens, and say what to return.

    Parameters
    ----------
    keep : int or int array (B,)
        Cached tokens each new row starts from. An int means the same for every row.
    tokens : int array (B, n), right-padded with -1, or None
        Token ids to append. A row of only -1 appends nothing. None with ``embeds``, or to change
        rows without computing anything.
    rows : int array (B,), optional
        Cached row that each new row continues. None: the rows stay as they are. A row may be named
        several times (fork) or never (dropped); ``B`` may change.
    parents : int array (B, n), optional
        Draft tree over the new positions: index of the parent within the same row's new tokens,
        -1 for a root (a child of the kept prefix). A parent stands before its children. A tree
        stays pending: the next call either names the branch to keep in ``path`` or drops it.
    path : int array (B, m), right-padded with -1, optional
        Branch of the row's pending tree, from a root downwards, that is kept after ``keep``; the
        kept prefix plus this branch is what ``tokens`` are appended to.
    embeds : float array (B, n, D), optional
        Soft tokens instead of ids, in the scale of ``Model.embed``.
    causal : bool
        False: new positions see each other both ways. What they leave in the cache was computed
        that way; drop the block (smaller ``keep``) and feed it again to commit it causally.
    logits : {"none", "last", "all"}
        Which logits to return.
    hidden : tuple of int
        Layers whose hidden states to return, 0..L (see the module's conventions).
    attentions : tuple of int
        Layers whose attention weights to return, 0..L-1.
    """

    keep: int | IntArray | Sequence[int]
    tokens: IntArray | Sequence[Sequence[int]] | None = None
    rows: IntArray | Sequence[int] | None = None
    parents: IntArray | Sequence[Sequence[int]] | None = None
    path: IntArray | Sequence[Sequence[int]] | None = None
    embeds: Array | None = None
    causal: bool = True
    logits: Literal["none", "last", "all"] = "last"
    hidden: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()

    def needs(self) -> Capability:
        """Return the capabilities that this call uses."""
        need = Capability.NONE
        if self.logits == "last":
            need |= Capability.LAST_LOGITS
        elif self.logits == "all":
            need |= Capability.ALL_LOGITS
        if self.rows is not None:
            need |= Capability.FORK
        if self.parents is not None or self.path is not None:
            need |= Capability.TREE
        if self.embeds is not None:
            need |= Capability.EMBEDS
        if not self.causal:
            need |= Capability.BLOCK
        if self.hidden:
            need |= Capability.HIDDEN
        if self.attentions:
            need |= Capability.ATTENTIONS
        return need


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a forward call returns; arrays belong to the engine's library.

    Attributes
    ----------
    logits : float32 array (B, V) for "last", (B, n, V) for "all", else None
        Entries of padded positions are unspecified but finite. The array is the caller's: a later
        call does not change it unless the adapter's ``borrowed_logits`` says so.
    hidden : mapping of layer to float array (B, n, D)
    attentions : mapping of layer to float array (B, H, n, S)
        ``S`` counts the positions visible to the row with the most cached tokens; each query's
        weights over its own row sum to 1 and weights of unseen positions are 0. Keys are in the
        order of the row's cached tokens, the new ones last.
    """

    logits: Array | None = None
    hidden: Mapping[int, Array] = field(default_factory=dict)
    attentions: Mapping[int, Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked :class:`Forward`, with everything that adapters would otherwise derive.

    Attributes
    ----------
    rows : int64 (B,)
        Source row of each new row.
    identity : bool
        True when ``rows`` is 0..B-1 over all cached rows, so nothing has to move.
    base : int64 (B,)
        Tokens kept from before the pending tree (``keep``).
    path : int64 (B, m), -1 padded, or None
        Pending-tree nodes kept after ``base``.
    start : int64 (B,)
        Cached tokens each row starts from: ``base`` plus the length of its path.
    tokens : int64 (B, n), -1 padded, or None when ``embeds`` are given
    embeds : float array (B, n, D) or None
    counts : int64 (B,)
        Valid new positions of each row.
    positions : int64 (B, n)
        Position of each new token in its row's text: ``start + depth``; 0 for padding.
    parents : int64 (B, n) or None
    ancestors : bool (B, n, n) or None
        For trees: [b, i, j] is True when j is i or an ancestor of i.
    causal, logits, hidden, attentions
        As in :class:`Forward`.
    """

    rows: IntArray
    identity: bool
    base: IntArray
    path: IntArray | None
    start: IntArray
    tokens: IntArray | None
    embeds: Array | None
    counts: IntArray
    positions: IntArray
    parents: IntArray | None
    ancestors: npt.NDArray[np.bool_] | None
    causal: bool
    logits: Literal["none", "last", "all"]
    hidden: tuple[int, ...]
    attentions: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Number of rows after this call."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Number of new positions, padding included."""
        return int(self.positions.shape[1])

    @property
    def end(self) -> IntArray:
        """Cached positions of each row after this call, pending tree nodes included."""
        return self.start + self.counts


class Tokenizer(Protocol):
    """Text to ids and ids to exact bytes."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; equals the width of the logits."""

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence id, if there is one."""

    @property
    def add_bos(self) -> bool:
        """Whether the model was trained to see ``bos_id`` first."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: printed as nothing, never produced from user text."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat template."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of ``text``, with no BOS added.

        ``special=True`` reads control tokens such as ``<|im_start|>`` as such: only for text that
        came out of a chat template, never for what a person or a document wrote.
        """

    def token_bytes(self, token: int) -> bytes:
        """Return the exact bytes of one token (control tokens: their name)."""

    def token_name(self, token: int) -> str:
        """Return a control token's text, or the token's bytes decoded with replacement."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts about a loaded model, for messages, reports and cache keys.

    ``batch_invariant`` is True when logits do not depend on how a prompt is cut into calls or on
    the other rows of a batch, bit for bit, as far as a short probe at load time can tell.
    """

    name: str
    backend: str
    path: str
    architecture: str
    dtype: str
    device: str
    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int
    trained_context: int
    batch_invariant: bool
    threads: int | None = None
    fingerprint: str = ""  # of the weights file: sha256, or size and mtime where that was enough
    extra: Mapping[str, str] = field(default_factory=dict)


class Model(ABC):
    """Loaded weights. Safe to share between threads; sessions are not.

    Attributes
    ----------
    info : ModelInfo
    tokenizer : Tokenizer
    capabilities : Capability
        What this loaded model offers.
    xp : module
        Array namespace of the arrays it returns (see :mod:`steersman.core.array`).
    prefill_chunk : int
        How many prompt tokens one call should hold so that a cancel is noticed soon.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    capabilities: Capability
    xp: Any
    prefill_chunk: int = 256

    @abstractmethod
    def session(
        self,
        *,
        max_rows: int = 1,
        needs: Capability = Capability.NONE,
        context: int | None = None,
    ) -> Session:
        """Open an empty cache.

        Parameters
        ----------
        max_rows : int
            Most rows (or leaves of a draft tree) that will ever be live at once.
        needs : Capability
            What will be asked; some engines set their cache up differently for trees, hidden
            states or attention. Asking for more than was named here raises CapabilityError.
        context : int, optional
            Most positions per row; the model's own context when None.
        """

    @abstractmethod
    def embed(self, tokens: IntArray | Sequence[int]) -> Array:
        """Return input embeddings (..., D), float32, in the scale that ``Forward.embeds`` takes."""

    @property
    @abstractmethod
    def embedding(self) -> Array:
        """The whole input embedding matrix (V, D), float32, same scale as ``embed``."""

    @abstractmethod
    def norm(self, hidden: Array) -> Array:
        """Apply the final norm to hidden states (..., D)."""

    @abstractmethod
    def head(self, hidden: Array) -> Array:
        """Apply the final norm and the output projection: (..., D) to float32 logits (..., V)."""

    def close(self) -> None:  # noqa: B027 - optional for adapters
        """Free the engine's memory; using the model afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require(self, needs: Capability, *, who: str, role: str = "target") -> None:
        """Raise CapabilityError naming what is missing and who has it, if anything is missing."""
        missing = needs & ~self.capabilities
        if missing:
            from .backend import backends_offering  # late: reads the registry

            others = [name for name in backends_offering(missing) if name != self.info.backend]
            names = " and ".join(missing.names())
            hint = f"; backends that do: {', '.join(others)}" if others else ""
            raise CapabilityError(
                f"{who} needs {names} from {role!r}; "
                f"{self.info.name} on {self.info.backend} offers none{hint}"
            )


class Session(ABC):
    """A cache of ``B`` rows. Not thread-safe: a second thread that calls it gets an error.

    Adapters implement :meth:`_run` and may override :meth:`close`. They must leave their cache
    usable when ``_run`` raises: the records here are only updated after it returns, and the next
    call's ``base`` and ``start`` say what is really kept.

    Attributes
    ----------
    borrowed_logits : bool
        True when logits of the last call become invalid (are overwritten) by the next call.
    """

    borrowed_logits = False

    def __init__(self, model: Model, *, max_rows: int, needs: Capability, context: int) -> None:
        if max_rows < 1:
            raise UsageError(f"session: max_rows must be at least 1, got {max_rows}")
        model.require(needs, who="session")
        self.model = model
        self.max_rows = max_rows
        self.needs = needs
        self.context = context
        self._rows: list[IntArray] = [np.empty(0, np.int64)]
        self._tree: IntArray | None = None  # parents of the pending tree
        self._tree_base = np.zeros(1, np.int64)
        self._lock = threading.Lock()
        self._closed = False

    # -- what a strategy may look at -------------------------------------------------------

    @property
    def batch(self) -> int:
        """Number of live rows."""
        return len(self._rows)

    @property
    def lengths(self) -> IntArray:
        """Cached tokens per row (B,), nodes of a pending tree not counted."""
        return self._tree_base.copy()

    def row_tokens(self, row: int = 0) -> IntArray:
        """Return the cached ids of one row; -1 where a soft token stands."""
        return self._rows[row][: self._tree_base[row]].copy()

    def common_prefix(self, tokens: IntArray | Sequence[int], row: int = 0) -> int:
        """Return how many leading ids of ``tokens`` the cache of ``row`` already holds."""
        have = self.row_tokens(row)
        want = np.asarray(tokens, np.int64)
        n = min(len(have), len(want))
        differ = np.flatnonzero((have[:n] != want[:n]) | (have[:n] < 0))
        return int(differ[0]) if len(differ) else n

    # -- the one verb ----------------------------------------------------------------------

    def forward(self, ask: Forward) -> Output:
        """Change the cache as ``ask`` says and return what it wants.

        Raises
        ------
        UsageError
            A token, row, length or layer is out of range, shapes disagree, or the session was
            opened without what this call needs. The cache is unchanged.
        ContextOverflow
            A row would grow beyond the context. The cache is unchanged.
        BackendError
            The engine failed; the rows keep what they had, up to the tokens already kept.
        """
        if not self._lock.acquire(blocking=False):
            raise UsageError("session: used by two threads at once; open one session per thread")
        try:
            if self._closed:
                raise UsageError("session: already closed")
            plan = self._plan(ask)
            out = self._run(plan)
            self._record(plan)
            return out
        finally:
            self._lock.release()

    @abstractmethod
    def _run(self, plan: Plan) -> Output:
        """Do what a checked plan says. ``plan.width`` may be 0: then only rows change."""

    def close(self) -> None:
        """Free the cache."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- checks, once for all adapters --------------------------------------------------------

    def _plan_token(self, ask: Forward) -> Plan | None:
        """Return the plan of one token on the only row; None for any other call, or a bad one.

        Plain decoding makes this call for every token, and the general way takes some 100 µs in
        small array operations. The checks are the same; whatever fails one is left to the general
        way, which says what is wrong.
        """
        tokens, keep = ask.tokens, ask.keep
        if (
            type(keep) is not int
            or type(tokens) is not np.ndarray
            or tokens.shape != (1, 1)
            or tokens.dtype.kind not in "iu"
            or len(self._rows) != 1
            or ask.logits != "last"
            or ask.rows is not None
            or ask.parents is not None
            or ask.path is not None
            or ask.embeds is not None
            or not ask.causal
            or ask.hidden
            or ask.attentions
            or Capability.LAST_LOGITS not in self.model.capabilities
            or not 0 <= tokens[0, 0] < self.model.info.vocab_size
            or not 0 <= keep <= self._tree_base[0]
            or (
                0 < keep < self._tree_base[0] and Capability.ROLLBACK not in self.model.capabilities
            )
            or keep >= self.context
        ):
            return None
        start = np.array([keep], np.int64)
        return Plan(
            rows=np.zeros(1, np.int64),
            identity=True,
            base=start,
            path=None,
            start=start,
            tokens=tokens.astype(np.int64),
            embeds=None,
            counts=np.ones(1, np.int64),
            positions=start[:, None],
            parents=None,
            ancestors=None,
            causal=True,
            logits="last",
            hidden=(),
            attentions=(),
        )

    def _plan(self, ask: Forward) -> Plan:
        single = self._plan_token(ask)
        if single is not None:
            return single
        used = ask.needs() & ~(Capability.LAST_LOGITS | Capability.ALL_LOGITS)
        absent = used & ~self.needs
        if absent:
            raise UsageError(
                f"session: opened without {' and '.join(absent.names())}; name them in needs="
            )
        self.model.require(ask.needs(), who="forward")
        rows = _ints("rows", np.arange(self.batch) if ask.rows is None else ask.rows, 1)
        if len(rows) == 0 or len(rows) > self.max_rows:
            raise UsageError(f"forward: {len(rows)} rows, session holds 1 to {self.max_rows}")
        _in_range("rows", rows, 0, self.batch)
        batch = len(rows)
        identity = batch == self.batch and bool((rows == np.arange(batch)).all())
        keep = _ints("keep", ask.keep, 0 if np.ndim(ask.keep) == 0 else 1)
        base = np.full(batch, keep) if keep.ndim == 0 else keep
        if base.shape != (batch,):
            raise UsageError(f"forward: keep has {base.size} entries for {batch} rows")
        if ((base < 0) | (base > self._tree_base[rows])).any():
            raise UsageError(
                f"forward: keep {base.tolist()} outside 0..{self._tree_base[rows].tolist()}"
            )
        # Emptying a row is always possible; keeping a part of it is not (recurrent models).
        if ((base > 0) & (base < self._tree_base[rows])).any():
            self.model.require(Capability.ROLLBACK, who="forward")
        path, path_length = self._check_path(ask, rows, base)
        start = base + path_length
        tokens, counts, width = self._check_tokens(ask, batch)
        if width == 0 and (ask.logits != "none" or ask.hidden or ask.attentions):
            raise UsageError("forward: nothing to append, so there is nothing to return")
        if width and not counts.any():
            raise UsageError("forward: every row is padding")
        end = start + counts
        if (end > self.context).any():
            raise ContextOverflow(
                f"context: {int(end.max())} tokens do not fit into {self.context}; "
                "shorten the prompt, raise --ctx-size or allow --truncate"
            )
        parents, ancestors, depth = _check_parents(ask, batch, width, counts)
        valid = np.arange(width)[None, :] < counts[:, None]
        positions = np.where(valid, start[:, None] + depth, 0)
        layers = self.model.info.layers
        for name, chosen, top in (
            ("hidden", ask.hidden, layers + 1),
            ("attentions", ask.attentions, layers),
        ):
            _in_range(name, np.asarray(chosen, np.int64), 0, top)
        return Plan(
            rows=rows,
            identity=identity,
            base=base,
            path=path,
            start=start,
            tokens=tokens,
            embeds=ask.embeds,
            counts=counts,
            positions=positions,
            parents=parents,
            ancestors=ancestors,
            causal=ask.causal,
            logits=ask.logits,
            hidden=tuple(ask.hidden),
            attentions=tuple(ask.attentions),
        )

    def _check_tokens(self, ask: Forward, batch: int) -> tuple[IntArray | None, IntArray, int]:
        if ask.embeds is not None:
            if ask.tokens is not None:
                raise UsageError("forward: give tokens or embeds, not both")
            shape = tuple(ask.embeds.shape)
            if len(shape) != 3 or shape[0] != batch or shape[2] != self.model.info.width:
                raise UsageError(
                    f"forward: embeds {shape}, expected ({batch}, n, {self.model.info.width})"
                )
            return None, np.full(batch, shape[1], np.int64), int(shape[1])
        if ask.tokens is None:
            return np.empty((batch, 0), np.int64), np.zeros(batch, np.int64), 0
        tokens = _ints("tokens", ask.tokens, 2)
        if tokens.shape[0] != batch:
            raise UsageError(f"forward: tokens for {tokens.shape[0]} rows, expected {batch}")
        _in_range("tokens", tokens, PAD, self.model.info.vocab_size)
        real = tokens != PAD
        counts = real.sum(axis=1)
        if (real != (np.arange(tokens.shape[1])[None, :] < counts[:, None])).any():
            raise UsageError("forward: -1 may stand only to the right of a row's tokens")
        return tokens, counts, int(tokens.shape[1])

    def _check_path(
        self, ask: Forward, rows: IntArray, base: IntArray
    ) -> tuple[IntArray | None, IntArray]:
        if ask.path is None:
            return None, np.zeros(len(rows), np.int64)
        if self._tree is None:
            raise UsageError("forward: path given, but no draft tree is pending")
        path = _ints("path", ask.path, 2)
        if path.shape[0] != len(rows):
            raise UsageError(f"forward: path for {path.shape[0]} rows, expected {len(rows)}")
        for i, row in enumerate(rows):
            nodes = path[i][path[i] != PAD]
            if (path[i][: len(nodes)] != nodes).any():
                raise UsageError("forward: -1 may stand only to the right of a path")
            tree = self._tree[row]
            count = len(self._rows[row]) - int(self._tree_base[row])
            _in_range("path", nodes, 0, count)
            if len(nodes) and base[i] != self._tree_base[row]:
                raise UsageError("forward: a path needs keep equal to where its tree began")
            before = -1
            for node in nodes:
                if tree[node] != before:
                    raise UsageError("forward: path is not a chain from a root of the tree")
                before = int(node)
        return path, (path != PAD).sum(axis=1)

    def _record(self, plan: Plan) -> None:
        fresh: list[IntArray] = []
        for i, row in enumerate(plan.rows):
            old, begin = self._rows[row], int(self._tree_base[row])
            kept = [old[: plan.base[i]]]
            if plan.path is not None:
                kept.append(old[begin:][plan.path[i][plan.path[i] != PAD]])
            if plan.tokens is None:
                kept.append(np.full(plan.counts[i], PAD, np.int64))
            else:
                kept.append(plan.tokens[i, : plan.counts[i]])
            fresh.append(np.concatenate(kept))
        self._rows = fresh
        self._tree = plan.parents
        self._tree_base = plan.start.copy() if plan.parents is not None else plan.end


def _ints(name: str, value: Any, ndim: int) -> IntArray:
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"forward: {name} must be integers, got {array.dtype}")
    if array.ndim != ndim:
        raise UsageError(f"forward: {name} must have {ndim} dimension(s), got {array.ndim}")
    return array.astype(np.int64)


def _in_range(name: str, values: IntArray, low: int, high: int) -> None:
    bad = values[(values < low) | (values >= high)]
    if bad.size:
        raise UsageError(f"forward: {name} {int(bad.flat[0])} outside {low}..{high - 1}")


def _check_parents(
    ask: Forward, batch: int, width: int, counts: IntArray
) -> tuple[IntArray | None, npt.NDArray[np.bool_] | None, IntArray]:
    """Return parents, the ancestor-or-self matrix, and each new position's depth."""
    if ask.parents is None:
        return None, None, np.broadcast_to(np.arange(width), (batch, width))
    if not ask.causal or ask.embeds is not None:
        raise UsageError("forward: a draft tree is causal and made of token ids")
    parents = _ints("parents", ask.parents, 2)
    if parents.shape != (batch, width):
        raise UsageError(f"forward: parents {parents.shape}, expected {(batch, width)}")
    ancestors = np.zeros((batch, width, width), np.bool_)
    depth = np.zeros((batch, width), np.int64)
    for b in range(batch):
        for i in range(int(counts[b])):
            parent = int(parents[b, i])
            if not -1 <= parent < i:
                raise UsageError(f"forward: parent {parent} of node {i} must stand before it")
            if parent >= 0:
                ancestors[b, i] = ancestors[b, parent]
                depth[b, i] = depth[b, parent] + 1
            ancestors[b, i, i] = True
    return parents, ancestors, depth
