"""The cache of the llama.cpp adapter: what is computed after growth, forks, trees and blocks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from steersman.core.errors import (
    UsageError,
)
from steersman.core.model import Capability as C
from steersman.core.model import Forward

pytest.importorskip("llama_cpp")
from steersman.backends.llamacpp import cache as cache_module

from .llamacpp_support import divergence, fresh, last, padded

pytestmark = pytest.mark.weights


def test_logits_are_a_view_without_copy(llamacpp_model: Any, ids: list[int]) -> None:
    with llamacpp_model.session() as session:
        assert session.borrowed_logits
        a = session.forward(Forward(keep=0, tokens=[ids[:5]])).logits
        before = a.copy()
        b = session.forward(Forward(keep=5, tokens=[ids[5:6]])).logits
        assert a.dtype == np.float32 and a.shape == (1, 49152)
        assert a.ctypes.data == b.ctypes.data  # so the next call overwrote it
        assert not np.array_equal(a, before)
        every = session.forward(Forward(keep=6, tokens=[ids[6:9]], logits="all")).logits
        held = every.copy()
        session.forward(Forward(keep=9, tokens=[ids[9:12]], logits="all"))
        assert np.array_equal(every, held)  # all logits are the caller's own


@pytest.fixture(scope="module")
def long_text(llamacpp_model: Any, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """A text of more than 256 tokens, and its logits."""
    text = (ids * 12)[:272]
    return text, fresh(llamacpp_model, text)


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caches begin with the engine's smallest size, so that short texts make them grow."""
    monkeypatch.setattr(cache_module, "_FIRST_CELLS", 256)


@pytest.mark.usefixtures("small_caches")
def test_growth_changes_nothing(
    llamacpp_model: Any, long_text: tuple[list[int], np.ndarray]
) -> None:
    text = long_text[0]
    want = long_text[1]
    with llamacpp_model.session() as session:
        session.forward(Forward(keep=0, tokens=[text[:250]], logits="none"))
        assert session._cache.cells == 256
        for i in range(250, 260):
            assert np.array_equal(last(session, i, np.array([text[i : i + 1]]))[0], want[i])
        assert session._cache.cells == 512
        assert np.array_equal(last(session, 240, [text[240:]])[0], want[-1])


@pytest.mark.usefixtures("small_caches")
def test_a_view_outlives_growth_and_closing(llamacpp_model: Any, ids: list[int]) -> None:
    session = llamacpp_model.session()
    out = session.forward(Forward(keep=0, tokens=[ids[:8]])).logits
    want = out.copy()
    owner = weakref.ref(session._cache.context)
    session.forward(Forward(keep=8, tokens=[(ids * 12)[8:270]]))  # a larger context replaces it
    assert owner() is not None and np.array_equal(out, want)
    second = session.forward(Forward(keep=20, tokens=[ids[20:21]])).logits
    kept = second.copy()
    session.close()
    assert np.array_equal(second, kept)
    del out
    gc.collect()
    assert owner() is None  # freed with its last view


@pytest.mark.usefixtures("small_caches")
def test_a_fork_before_growth_is_not_lost(
    llamacpp_model: Any, long_text: tuple[list[int], np.ndarray]
) -> None:
    # The engine copies forked rows only at its next call; growing in between must not lose them.
    text, every = long_text
    want = every[-1]
    with llamacpp_model.session(max_rows=2, needs=C.FORK | C.ROWS) as session:
        session.forward(Forward(keep=0, tokens=[text[:250]], logits="none"))
        session.forward(Forward(keep=250, rows=[0, 0], logits="none"))
        out = last(session, 250, [text[250:], text[250:]])
        assert np.array_equal(out[0], want) and np.array_equal(out[1], want)


def test_rows_that_get_nothing(llamacpp_model: Any, ids: list[int]) -> None:
    with llamacpp_model.session(max_rows=3, needs=C.FORK | C.ROWS) as session:
        session.forward(Forward(keep=0, tokens=[ids[:4]]))
        out = last(session, 4, padded([ids[4:9], [], ids[4:6]]), rows=[0, 0, 0])
        want = fresh(llamacpp_model, ids[:9])
        assert np.array_equal(out[0], want[8]) and np.array_equal(out[2], want[5])
        assert np.isfinite(out[1]).all()
        every = last(session, [9, 4, 6], padded([[], ids[4:7], ids[6:7]]), logits="all")
        assert np.array_equal(every[1], want[4:7]) and np.array_equal(every[2, 0], want[6])
        assert session.lengths.tolist() == [9, 7, 7]


def test_beams_that_swap_and_fork_again_and_again(llamacpp_model: Any, ids: list[int]) -> None:
    rng = np.random.default_rng(0)
    texts = [ids[:6]]
    with llamacpp_model.session(max_rows=4, needs=C.FORK | C.ROWS) as session:
        session.forward(Forward(keep=0, tokens=[ids[:6]]))
        for _ in range(6):
            rows = rng.integers(0, len(texts), 4)
            keep = [int(rng.integers(3, len(texts[r]) + 1)) for r in rows]
            new = [[int(t) for t in rng.choice(ids, rng.integers(1, 4))] for _ in range(4)]
            texts = [texts[r][:k] + part for r, k, part in zip(rows, keep, new)]
            out = last(session, keep, padded(new), rows=rows)
        for row, text in enumerate(texts):
            assert session.row_tokens(row).tolist() == text
            assert np.array_equal(out[row], fresh(llamacpp_model, text)[-1])


def test_tree_in_a_call_longer_than_a_micro_batch(llamacpp_model: Any, ids: list[int]) -> None:
    # 70 nodes, more than the 63 tokens of one graph: a trunk of 60, then two branches.
    trunk = (ids * 2)[:60]
    tokens = np.array([trunk + ids[1:6] + ids[20:25]])
    parents = np.array([[*range(-1, 59), 59, *range(60, 64), 59, *range(65, 69)]])
    with llamacpp_model.session(max_rows=2, needs=C.TREE) as session:
        session.forward(Forward(keep=0, tokens=[ids[:3]]))
        out = last(session, 3, tokens, parents=parents, logits="all")[0]
        for branch in (range(60, 65), range(65, 70)):
            chain = [*ids[:3], *trunk, *tokens[0, list(branch)]]
            assert np.array_equal(out[list(branch)], fresh(llamacpp_model, chain)[63:])
        path = [[*range(60), 65, 66]]
        kept = last(session, 3, [ids[30:33]], path=path, logits="all")[0]
        chain = [*ids[:3], *trunk, *tokens[0, 65:67], *ids[30:33]]
        assert session.row_tokens().tolist() == chain
        assert divergence(kept, fresh(llamacpp_model, chain)[-3:]) < 0.01


def test_trees_with_more_leaves_than_the_session_holds(llamacpp_model: Any, ids: list[int]) -> None:
    with llamacpp_model.session(max_rows=1, needs=C.TREE) as session:
        star = Forward(keep=0, tokens=[ids[:17]], parents=[[-1] * 17])
        with pytest.raises(UsageError, match="max_rows=17"):
            session.forward(star)
        assert session.lengths.tolist() == [0]
    with llamacpp_model.session(max_rows=17, needs=C.TREE) as session:
        assert session.forward(star).logits.shape == (1, 49152)


@pytest.mark.usefixtures("small_caches")
def test_a_full_shared_pool_grows(llamacpp_model: Any, ids: list[int]) -> None:
    text = (ids * 12)[:150]
    needs = C.TREE | C.FORK | C.ROWS
    with llamacpp_model.session(max_rows=2, needs=needs, context=160) as session:
        session.forward(Forward(keep=0, tokens=[text[:1]], logits="none"))
        both = [text[1:140], text[2:141]]
        out = last(session, 1, both, rows=[0, 0])  # 279 cells: beyond the first 256
        assert session._cache.cells > 256
        want = fresh(llamacpp_model, [text[0], *both[1]])[-1:]
        assert divergence(out[1:], want) < 0.01


def test_block(llamacpp_model: Any, ids: list[int]) -> None:
    with llamacpp_model.session(needs=C.BLOCK) as session:
        session.forward(Forward(keep=0, tokens=[ids[:10]]))
        block = Forward(keep=10, tokens=[(ids * 3)[10:80]], causal=False, logits="all")
        first, second = (np.array(session.forward(block).logits) for _ in range(2))
        assert np.array_equal(first, second)
        # A long causal call in such a session still equals one elsewhere, bit for bit.
        text = (ids * 3)[:80]
        committed = last(session, 10, [text[10:]], logits="all")[0]
        assert np.array_equal(committed, fresh(llamacpp_model, text)[10:])
        assert not np.allclose(first[0, 0], committed[0], atol=0.1)
        long = Forward(keep=0, tokens=[(ids * 12)[:513]], causal=False)
        with pytest.raises(UsageError, match="at most 512"):
            session.forward(long)
        assert session.lengths.tolist() == [80]


def test_blocks_of_ragged_rows_see_themselves_only(llamacpp_model: Any, ids: list[int]) -> None:
    blocks = [ids[10:18], ids[20:23]]
    with llamacpp_model.session(max_rows=2, needs=C.BLOCK | C.ROWS | C.FORK) as session:
        session.forward(Forward(keep=0, tokens=[ids[:6]]))
        both = last(session, 6, padded(blocks), rows=[0, 0], causal=False, logits="all")
    for row, block in enumerate(blocks):
        with llamacpp_model.session(needs=C.BLOCK) as session:
            session.forward(Forward(keep=0, tokens=[ids[:6]]))
            alone = last(session, 6, [block], causal=False, logits="all")
        assert np.array_equal(both[row, : len(block)], alone[0])
