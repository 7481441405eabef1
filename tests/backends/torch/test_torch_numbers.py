"""The torch adapter: both of its paths against transformers itself.

What every engine must do is in the contract suite; here is what only this one can get wrong.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from steersman.backends.torch import open_model
from steersman.core.contract import CHECKS, run_contract
from steersman.core.errors import (
    MissingDependency,
)
from steersman.core.model import Forward

from ..tiny_torch import hf_source, tokens
from .torch_support import EVERYTHING, WAYS, Opener, everything, reference, same

NATIVE = ("llama", "llama3-rope", "mistral", "qwen2", "qwen3")


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, "native") for name in NATIVE]
    + [(name, "hf") for name in ("llama", "mistral-window", "gemma2", "gemma3", "gpt2")],
)
def test_logits_hidden_states_and_attentions_equal_transformers(
    name: str, path: str, tiny_folder: Callable[[str], Path], opened: Opener
) -> None:
    model, ids = opened(name, path), tokens(40)
    logits, hidden, attentions = reference(tiny_folder(name), ids)
    with model.session(needs=EVERYTHING) as session:
        # In two pieces, so that the second one attends to cached positions.
        first = session.forward(Forward(keep=0, tokens=[ids[:23]], **everything(model)))
        second = session.forward(Forward(keep=23, tokens=[ids[23:]], **everything(model)))
    same(torch.cat((first.logits[0], second.logits[0])), logits, 1e-4)
    for i, want in enumerate(hidden):
        if name == "gpt2" and i == 0:
            continue  # the library adds learned positions to what we call the embedding
        got = torch.cat((first.hidden[i][0], second.hidden[i][0]))
        same(got, want[0], 1e-4)
        if i == model.info.layers:
            same(model.head(got), logits, 1e-4)
    for i, want in enumerate(attentions):
        same(first.attentions[i][0], want[0, :, :23, :23])
        same(second.attentions[i][0], want[0, :, 23:])


def test_projection_biases_are_used_or_refused(
    tiny_folder: Callable[[str], Path], opened: Opener
) -> None:
    ids = tokens(20)
    logits, _, _ = reference(tiny_folder("linear-rope"), ids)
    with opened("linear-rope", "native").session() as session:
        out = session.forward(Forward(keep=0, tokens=[ids], logits="all"))
    same(out.logits[0], logits, 1e-4)


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_contract(name: str, path: str, opened: Opener) -> None:
    # "bytes" and the like are about the tokenizer, which has tests of its own.
    only = [check for check, spec in CHECKS.items() if spec.needs or check == "refusals"]
    failed = [
        f"{check.name}: {check.detail} {check.value} > {check.bound}"
        for check in run_contract(opened(name, path), length=48, only=only)
        if check.result == "failed"
    ]
    assert not failed


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contract_bit_for_bit(name: str, dtype: str, opened: Opener) -> None:
    """Where the probe says ``batch_invariant``, the contract suite's bounds are zero."""
    try:
        model = opened(name, "native", dtype=dtype, setting="reproducible")
    except MissingDependency as error:
        pytest.skip(str(error))
    if not model.info.batch_invariant:
        pytest.skip("this processor's kernels have no common group of rows")
    exact = [check for check, spec in CHECKS.items() if spec.invariance and spec.needs]
    results = run_contract(model, length=48, only=exact)
    assert any(check.bound == 0.0 for check in results)
    failed = [f"{c.name}: {c.detail} {c.value}" for c in results if c.result == "failed"]
    assert not failed


def test_bits_across_attentions_blocks_of_keys(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Beyond 128 and 512 slots: cuts of a prompt, rows of unequal length, and trees."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 1200
    (folder / "config.json").write_text(json.dumps(config))
    model = open_model(hf_source(folder), setting="reproducible", threads=1)
    if not model.info.batch_invariant:
        pytest.skip("this processor's kernels have no common group of rows")
    ids = tokens(1100)
    with model.session() as session:
        whole = session.forward(Forward(keep=0, tokens=[ids], logits="all")).logits[0]
        same(whole, reference(folder, ids)[0], 1e-4)
        for cuts in ((127, 128, 129, 511, 513), (1, 30, 300, 301, 520, 1023, 1025), (700,)):
            edges = (0, *cuts, 1100)
            for a, b in itertools.pairwise(edges):
                part = session.forward(Forward(keep=a, tokens=[ids[a:b]], logits="all")).logits[0]
                assert torch.equal(part, whole[a:b]), (cuts, a)
    starts, ends = (20, 120, 500), (200, 121, 1040)
    width = max(b - a for a, b in zip(starts, ends))
    rows = [ids[a:b] + [-1] * (width - b + a) for a, b in zip(starts, ends)]
    with model.session(max_rows=3, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids[:500]], logits="none"))
        out = session.forward(Forward(keep=starts, rows=[0, 0, 0], tokens=rows, logits="all"))
        for row, (a, b) in enumerate(zip(starts, ends)):
            assert torch.equal(out.logits[row, : b - a], whole[a:b]), row
        # The first branch of each row's tree is its own text; the second is not. Its nodes do not
        # stand side by side, so that sums have other gaps.
        nodes = [[ids[b], 5, ids[b + 1], 6, ids[b + 2]] for b in ends]
        parents = [[-1, -1, 0, 1, 2]] * 3
        tree = session.forward(Forward(keep=ends, tokens=nodes, parents=parents, logits="all"))
        for row, b in enumerate(ends):
            same(tree.logits[row, [0, 2, 4]], whole[b : b + 3], 1e-4)


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_tree_across_a_window_edge_equals_its_branches(
    name: str, path: str, opened: Opener
) -> None:
    """Rows of 5 and 11 tokens, so that window, raggedness and tree meet in one call."""
    model = opened(name, path)
    prompts = [tokens(5, 1), tokens(11, 2)]
    nodes = tokens(6, 3)
    parents = [[-1, 0, 0, 1, 2, 4]] * 2
    padded = [p + [-1] * (11 - len(p)) for p in prompts]
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[prompts[0]], logits="none"))
        session.forward(Forward(keep=0, rows=[0, 0], tokens=padded, logits="none"))
        out = session.forward(
            Forward(keep=[5, 11], tokens=[nodes] * 2, parents=parents, logits="all")
        )
        assert session.lengths.tolist() == [5, 11]
        branch = [0, 2, 4, 5]
        kept = session.forward(
            Forward(keep=[5, 11], path=[branch, branch[:1] + [-1] * 3], tokens=[[7], [9]])
        )
        assert session.lengths.tolist() == [10, 13]
    for row, prompt in enumerate(prompts):
        chain = [*prompt, *(nodes[i] for i in branch)]
        with model.session() as session:
            want = session.forward(Forward(keep=0, tokens=[chain], logits="all")).logits[0]
            same(out.logits[row, branch], want[len(prompt) :], 1e-4)
            keep = len(prompt) + (4 if row == 0 else 1)
            after = session.forward(Forward(keep=keep, tokens=[[7 if row == 0 else 9]])).logits
            same(kept.logits[row], after[0], 1e-4)


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_rolling_back_twice_far_beyond_the_window(name: str, path: str, opened: Opener) -> None:
    model, ids = opened(name, path), tokens(60)
    with model.session() as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        for keep in (41, 13):
            out = session.forward(Forward(keep=keep, tokens=[[5, 6, 7]]))
            with model.session() as fresh:
                want = fresh.forward(Forward(keep=0, tokens=[[*ids[:keep], 5, 6, 7]]))
            same(out.logits, want.logits, 1e-4)


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_a_block_sees_both_ways_and_leaves_no_trace(name: str, path: str, opened: Opener) -> None:
    model, ids = opened(name, path), tokens(12)
    ask = Forward(keep=12, tokens=[[3, 4, 5]], logits="all")
    with model.session(needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        before = session.forward(ask).logits
        block = Forward(keep=12, tokens=[[3, 4, 5]], causal=False, logits="all", attentions=(0,))
        seen = session.forward(block)
        assert bool((seen.attentions[0][0, :, 0, 12:] > 0).all())  # the first sees the others
        assert float((seen.logits[0, 0] - before[0, 0]).abs().max()) > 1e-3
        assert torch.equal(session.forward(ask).logits, before)


def test_buffers_grow_without_a_trace(opened: Opener) -> None:
    """256 slots come first; rows cross that border one by one and in a chunk."""
    model, ids = opened("llama", "native", setting="fast"), tokens(300)
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids[:254]], logits="none"))
        small = session.nbytes
        session.forward(Forward(keep=254, rows=[0, 0], tokens=[[1]] * 2, logits="none"))
        for i in range(254, 260):
            out = session.forward(Forward(keep=i, tokens=[[ids[i]], [ids[i]]]))
        out = session.forward(Forward(keep=260, tokens=[ids[260:], ids[260:]]))
        assert session.nbytes == 4 * small
    with model.session() as fresh:
        want = fresh.forward(Forward(keep=0, tokens=[ids])).logits[0]
    same(out.logits[0], want, 1e-4)
    same(out.logits[1], want, 1e-4)


# -- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "path"), WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contract_on_cuda(
    name: str, path: str, dtype: str, tiny_folder: Callable[[str], Path]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with open_model(hf_source(tiny_folder(name)), path=path, device="cuda", dtype=dtype) as model:
        failed = [
            f"{check.name}: {check.detail} {check.value} > {check.bound}"
            for check in run_contract(model, length=48)
            if check.result == "failed" and CHECKS[check.name].needs
        ]
    assert not failed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_cuda_equals_cpu(name: str, tiny_folder: Callable[[str], Path], opened: Opener) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ids = tokens(40)
    ask = Forward(keep=0, tokens=[ids], logits="all")
    model = open_model(hf_source(tiny_folder(name)), device="cuda", dtype="float32")
    with model, model.session() as session, opened(name).session() as host:
        same(session.forward(ask).logits.cpu(), host.forward(ask).logits, 1e-3)
