"""The mlx adapter's cache: edits, trees, blocks and failed calls equal fresh prefills."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx")
pytest.importorskip("mlx_lm")

import mlx.core as mx

from steersman.backends.mlx import lazy
from steersman.core.array import to_numpy
from steersman.core.errors import BackendError, UsageError
from steersman.core.model import Forward, Session

from ..tiny_torch import tokens
from .mlx_support import EVERYTHING, Opener, close, fresh, padded


class Text:
    """Rows kept by hand beside a session, so that each can be compared with a fresh prefill."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: list[list[int]] = [[]]

    def call(self, keep: list[int], new: list[list[int]], rows: list[int] | None = None) -> None:
        source = list(range(len(self.rows))) if rows is None else rows
        self.rows = [self.rows[r][:k] + n for r, k, n in zip(source, keep, new, strict=True)]
        out = self.session.forward(Forward(keep=keep, tokens=padded(new), rows=rows))
        for i, row in enumerate(self.rows):
            if new[i]:
                close(out.logits[i], fresh(self.session.model, row)[-1])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_random_edits_equal_fresh_prefills(name: str, opened: Opener) -> None:
    """Hundreds of columns of per-row rollbacks, forks and drops, packing included."""
    rng = np.random.default_rng(3)
    model = opened(name)
    with model.session(max_rows=4, needs=EVERYTHING) as session:
        text = Text(session)
        text.call([0], [tokens(20)])
        for step in range(30):
            rows = None
            if step % 5 == 4:
                rows = [int(r) for r in rng.integers(0, len(text.rows), rng.integers(1, 5))]
            source = list(range(len(text.rows))) if rows is None else rows
            keep = [
                int(rng.integers(len(text.rows[r]) // 2, len(text.rows[r]) + 1)) for r in source
            ]
            new = [tokens(int(rng.integers(0, 12)), seed=step * 7 + i) for i in range(len(source))]
            new[0] = new[0] or [5]
            text.call(keep, new, rows)
            columns = session._cache.size
            longest = max(map(len, text.rows))
            assert columns <= longest + max(32, longest // 8) + 12


def test_one_row_stays_on_the_fast_path(opened: Opener) -> None:
    """Rollbacks, kept branches and dropped siblings leave a dense cache: no mask, one offset."""
    with opened("llama").session(max_rows=3, needs=EVERYTHING) as session:
        cache = session._cache
        session.forward(Forward(keep=0, tokens=[tokens(10)]))
        assert cache.ok is None
        session.forward(Forward(keep=6, tokens=[tokens(3)]))
        assert cache.ok is None and cache.size == 9
        tree = Forward(keep=9, tokens=[[4, 5, 6, 7]], parents=[[-1, -1, 1, 2]], logits="all")
        session.forward(tree)
        assert cache.ok is not None
        session.forward(Forward(keep=9, path=[[1, 2]], tokens=[[8]]))
        assert cache.ok is None and cache.size == 12
        session.forward(Forward(keep=[12, 5, 9], rows=[0, 0, 0], tokens=[[1], [2], [3]]))
        assert cache.ok is not None
        session.forward(Forward(keep=6, rows=[1], tokens=[[3]]))
        assert cache.ok is None and cache.size == 7


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_trees_on_ragged_rows(name: str, opened: Opener) -> None:
    model = opened(name)
    first, second = tokens(11, 1), tokens(19, 2)
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=[0, 0], rows=[0, 0], tokens=padded([first, second])))
        nodes = [[10, 11, 12, 13, 14], [20, 21, 22, -1, -1]]
        parents = [[-1, 0, 0, 2, -1], [-1, -1, 0, -1, -1]]
        out = session.forward(
            Forward(
                keep=[11, 17],
                tokens=nodes,
                parents=parents,
                logits="all",
                attentions=(0, 1, 2),
            )
        )
        for row, prefix in enumerate((first, second[:17])):
            for node in range(3 if row else 5):
                branch, at = [], node
                while at >= 0:
                    branch.insert(0, nodes[row][at])
                    at = parents[row][at]
                close(out.logits[row, node], fresh(model, prefix + branch)[-1])
        # Each node sees its row's tokens and its own ancestors, and nothing else.
        seen = to_numpy(out.attentions[2])[0, 0] > 0  # row 0, full attention in both models
        assert seen.shape == (5, 20)
        expected = [[0], [0, 1], [0, 2], [0, 2, 3], [4]]
        full = name == "llama"
        assert [list(np.flatnonzero(s[11:])) for s in seen] == expected
        assert not full or seen[:, :11].all()
        session.forward(
            Forward(keep=[11, 17], path=[[0, 2, 3], [1, -1, -1]], logits="none", tokens=None)
        )
        final = session.forward(Forward(keep=[14, 18], tokens=[[30], [31]]))
    close(final.logits[0], fresh(model, first + [10, 12, 13, 30])[-1])
    close(final.logits[1], fresh(model, second[:17] + [21, 31])[-1])


def test_attentions_of_ragged_rows_equal_those_alone(opened: Opener) -> None:
    model = opened("gemma3")
    rows = [tokens(14, 1), tokens(9, 2)]
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=[0, 0], rows=[0, 0], tokens=padded([r[:-1] for r in rows])))
        out = session.forward(
            Forward(
                keep=[len(r) - 1 for r in rows], tokens=[[r[-1]] for r in rows], attentions=(0, 1)
            )
        )
    for i, row in enumerate(rows):
        with model.session(needs=EVERYTHING) as alone:
            want = alone.forward(Forward(keep=0, tokens=[row], attentions=(0, 1)))
        for layer in (0, 1):
            got = to_numpy(out.attentions[layer])[i]
            close(got[:, 0, : len(row)], want.attentions[layer][0, :, -1], 1e-6)
            assert not got[:, 0, len(row) :].any()


def test_an_open_block_equals_mlx_lm_without_a_mask(opened: Opener) -> None:
    cache = lazy.import_mlx_lm("models.cache")

    class Open(cache.KVCache):  # type: ignore[name-defined, misc]
        def make_mask(self, *args: Any, **kwargs: Any) -> None:
            return None

    model = opened("llama")
    prefix, block = tokens(12, 1), tokens(5, 2)
    theirs = [cache.KVCache() for _ in range(model.info.layers)]
    model.net(mx.array([prefix]), cache=theirs)
    for layer in theirs:
        layer.__class__ = Open
    want = model.net(mx.array([block]), cache=theirs)
    with model.session(needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[prefix]))
        ask = Forward(keep=12, tokens=[block], causal=False, logits="all")
        first, again = session.forward(ask), session.forward(ask)
        np.testing.assert_array_equal(to_numpy(first.logits), to_numpy(want))
        np.testing.assert_array_equal(to_numpy(again.logits), to_numpy(want))
        commit = session.forward(Forward(keep=12, tokens=[block], logits="all"))
    close(commit.logits[0], fresh(model, prefix + block)[12:])


def test_soft_tokens_are_not_changed(opened: Opener) -> None:
    """Gemma scales its input in place; the caller's array must stay as it was."""
    model, ids = opened("gemma3"), tokens(9)
    soft = model.embed(ids)[None]
    before = to_numpy(soft).copy()
    with model.session(needs=EVERYTHING) as session:
        for _ in range(2):
            out = session.forward(Forward(keep=0, embeds=soft, logits="all"))
            np.testing.assert_array_equal(to_numpy(out.logits)[0], fresh(model, ids))
        np.testing.assert_array_equal(to_numpy(soft), before)
        with pytest.raises(UsageError, match="NaN"):
            session.forward(Forward(keep=0, embeds=before * np.nan))
        with pytest.raises(UsageError, match="floating"):
            session.forward(Forward(keep=0, embeds=before.astype(np.int64)))
        # Arrays of other libraries are taken as well.
        out = session.forward(Forward(keep=0, embeds=before, logits="all"))
    np.testing.assert_array_equal(to_numpy(out.logits)[0], fresh(model, ids))


class Fails:
    """Make a model's last MLP raise."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(model.net.model.layers[-1].mlp)
        original = kind.__call__
        self.on = True

        def call(mlp: Any, x: Any) -> Any:
            if self.on:
                raise RuntimeError("out of memory")
            return original(mlp, x)

        monkeypatch.setattr(kind, "__call__", call)


def test_a_failed_call_keeps_the_rows(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    text = tokens(20)
    with model.session(max_rows=3, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[text]))
        fails = Fails(model, monkeypatch)
        for ask in (
            Forward(keep=20, tokens=[[5, 6]]),
            Forward(keep=20, tokens=[tokens(300)]),  # more columns than there were
            Forward(keep=[3, 20], rows=[0, 0], tokens=[[5], [6]]),
            Forward(keep=20, tokens=[[5, 6]], parents=[[-1, -1]]),
        ):
            with pytest.raises(BackendError, match="out of memory"):
                session.forward(ask)
            fails.on = False
            out = session.forward(Forward(keep=20, tokens=[[9]]))
            close(out.logits[0], fresh(model, text + [9])[-1])
            fails.on = True
        # This one overwrites what stood behind the kept tokens: those are lost, and known to be.
        with pytest.raises(BackendError, match="out of memory"):
            session.forward(Forward(keep=8, tokens=[[5, 6]]))
        fails.on = False
        with pytest.raises(BackendError, match="only 8 tokens"):
            session.forward(Forward(keep=20, tokens=[[9]]))
        out = session.forward(Forward(keep=8, tokens=[[9]]))
        close(out.logits[0], fresh(model, text[:8] + [9])[-1])
