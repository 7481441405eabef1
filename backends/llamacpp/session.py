"""Rows of a llama.cpp cache behind the session contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steersman.core.errors import BackendError, InvalidInput, UsageError
from steersman.core.model import Capability, Output, Plan, Session

from .cache import Cache
from .capture import Capture
from .entries import entries_of, replayed
from .gather import Gather, finite
from .rows import Row, arrange, kept_tokens, leaf_count, plant, what_is_left

if TYPE_CHECKING:
    from .model import LlamaModel

MAX_ROWS = 256  # sequences per context, a constant of the engine
MAX_BLOCK = 512  # positions of a block with full attention: it must be one micro-batch
_TREE_SEQUENCES = 16  # in a shared pool a spare sequence costs next to nothing
_UNLIMITED = 1 << 30


class LlamaSession(Session):
    """A cache on a :class:`LlamaModel`; ``forward`` does what the contract promises.

    ``last`` logits of a call in which every row got tokens are a view of the engine's buffer,
    which the next call overwrites; all other arrays are the caller's own.
    """

    borrowed_logits = True

    def __init__(
        self, model: LlamaModel, *, max_rows: int, needs: Capability, context: int
    ) -> None:
        super().__init__(model, max_rows=max_rows, needs=needs, context=context)
        if max_rows > MAX_ROWS:
            raise UsageError(f"session: {max_rows} rows, llama.cpp holds at most {MAX_ROWS}")
        tree = Capability.TREE in needs
        self._engine = model
        self._capture = None
        if needs & (Capability.HIDDEN | Capability.ATTENTIONS):
            self._capture = Capture(track=tree and Capability.ATTENTIONS in needs)
        # With room for whole blocks in a micro-batch, causal calls are cut small by the cache, so
        # that they run the same kernels as everywhere else.
        block = Capability.BLOCK in needs
        micro_batch = model.setting.micro_batch
        self._cache = Cache(
            model.handle,
            sequences=max(max_rows, _TREE_SEQUENCES) if tree else max_rows,
            positions=context,
            unified=tree,
            micro_batch=max(MAX_BLOCK, micro_batch) if block else micro_batch,
            causal_limit=micro_batch if block else _UNLIMITED,
            bytes_per_cell=model.bytes_per_cell,
            capture=self._capture,
            opening=model.opening,
            flash=model.setting.flash,
            threads=model.info.threads or 1,
        )
        self._live = [Row(0, 0)]

    def close(self) -> None:
        """Free the cache, once a call that another thread is making has ended; twice is fine."""
        with self._lock:
            super().close()
            self._cache.close()

    def _run(self, plan: Plan) -> Output:
        if self._is_step(plan):
            return self._step(plan)
        self._check(plan)
        self._reserve(plan)
        try:
            rows = arrange(self._cache, self._live, plan)
        except BaseException:
            self._live = self._reset(self.batch)
            raise
        if plan.width == 0:
            self._live = rows
            return Output()
        left = what_is_left(rows, plan, self.batch)
        try:
            out = self._compute(plan, rows)
        except BaseException:
            self._live = self._undo(left)
            raise
        self._live = rows
        return out

    # -- plain decoding: one token on one row ------------------------------------------------

    def _is_step(self, plan: Plan) -> bool:
        row = self._live[0]
        return (
            plan.width == 1
            and len(self._live) == 1
            and len(plan.rows) == 1
            and plan.logits == "last"
            and plan.tokens is not None
            and plan.parents is None
            and plan.path is None
            and plan.causal
            and self._capture is None
            and row.nodes is None
            and row.have == plan.start[0] == self._cache.length[row.seq]
        )

    def _step(self, plan: Plan) -> Output:
        row = self._live[0]
        assert plan.tokens is not None
        try:
            logits = self._cache.step(int(plan.tokens[0, 0]), row.seq)
        except BaseException:
            self._cache.clean(row.seq, row.have)
            raise
        row.have += 1
        return Output(logits=logits)

    # -- everything else ------------------------------------------------------------------------

    def _check(self, plan: Plan) -> None:
        """Refuse what would abort the process or fail silently inside the engine."""
        if not plan.causal and int(plan.counts.max()) > MAX_BLOCK:
            raise UsageError(
                f"forward: a block of {int(plan.counts.max())} positions with full attention; "
                f"llama.cpp takes at most {MAX_BLOCK}"
            )
        if plan.embeds is not None and not finite(plan.embeds):
            raise InvalidInput("forward: embeds hold NaN or infinite values")
        leaves = leaf_count(plan)
        if leaves > len(self._cache.length):
            raise UsageError(
                f"forward: draft trees with {leaves} leaves, the session holds "
                f"{len(self._cache.length)}; open it with max_rows={leaves}"
            )

    def _reserve(self, plan: Plan) -> None:
        need = int(plan.end.max()) if plan.width else 0
        if self._cache.shared:
            # Rows may share cells, so this is a lower bound; a full pool grows when it is full.
            need = max(need, int(plan.counts.sum()))
        lost = self._cache.reserve(need)
        for row in self._live:
            if row.seq in lost:
                row.have, row.nodes = 0, None

    def _compute(self, plan: Plan, rows: list[Row]) -> Output:
        for i, row in enumerate(rows):
            if row.have < plan.start[i]:
                self._replay(plan, i, row)
        nodes = None if plan.parents is None else plant(self._cache, rows, plan)
        model = self._engine
        gather = Gather(plan, rows, self._cache, self._capture, model.weights, model.info.layers)
        seqs = [row.seq for row in rows]
        for entries in entries_of(plan, seqs, nodes, every=gather.every, apart=gather.apart):
            gather.take(entries)
        out = gather.output()
        for i, row in enumerate(rows):
            if nodes is None:
                row.have = int(plan.end[i])
            else:
                row.nodes = [ids[0] for ids in nodes[i]]
        return out

    def _replay(self, plan: Plan, i: int, row: Row) -> None:
        """Compute again what an earlier failure lost of a row's kept prefix."""
        index = int(plan.rows[i])
        kept = kept_tokens(self._rows[index], int(self._tree_base[index]), plan, i)
        lost = kept[row.have :]
        if (lost < 0).any():
            raise BackendError(
                "session: an earlier failure lost soft tokens; "
                f"go back to {row.have} tokens and feed them again"
            )
        for _ in self._cache.feed(replayed(lost, row.seq, row.have)):
            pass
        row.have += len(lost)

    def _undo(self, left: list[Row]) -> list[Row]:
        """Empty what a failed call wrote, and return the rows that are left."""
        self._cache.context.set_causal(True)
        if self._capture is not None:
            self._capture.begin()
        keep = {row.seq: row.have for row in left if row.seq >= 0}
        for seq in range(len(self._cache.length)):
            self._cache.clean(seq, keep.get(seq, 0))
        for row in left:
            if row.seq >= 0:
                row.have = min(row.have, self._cache.length[row.seq])
        return left

    def _reset(self, count: int) -> list[Row]:
        for seq in range(len(self._cache.length)):
            self._cache.clean(seq, 0)
        return [Row(-1, 0) for _ in range(count)]
