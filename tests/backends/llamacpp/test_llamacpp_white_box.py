"""Hidden states, attentions and soft tokens of the llama.cpp adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steersman.core.errors import (
    InvalidInput,
    UsageError,
)
from steersman.core.model import Capability as C
from steersman.core.model import Forward

pytest.importorskip("llama_cpp")

from .llamacpp_support import fresh, last, padded

pytestmark = pytest.mark.weights


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
