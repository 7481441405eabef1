"""CoIn: the tree, the protocol against tampering, and the heads' formulas."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyTransformer

from steersman.core.array import to_numpy
from steersman.core.audit import Embedder, Fingerprints, files, fingerprints
from steersman.core.audit.embedding import blocks, on_grid, serialise
from steersman.core.audit.heads import (
    Heads,
    cosine,
    init_head,
    init_set,
    match_logit,
    read_heads,
    set_logit,
    untrained_match,
)
from steersman.core.audit.protocol import (
    Challenge,
    Proof,
    Receipt,
    ask,
    commit,
    faults,
    prove,
    repeated,
    repeated_runs,
    sampled_blocks,
)
from steersman.core.audit.traces import AuditTrace, inflated_ids, parse_trace, prepare
from steersman.core.audit.tree import (
    HashTree,
    bound_root,
    depth_of,
    leaf_hash,
    root_of,
)
from steersman.core.errors import InvalidInput, UsageError
from steersman.core.objectives.focal import focal_loss

B0, B1 = [1, 0], [0, 1]
PRINTS = [[*B0, 0.5, 0.5], [*B0, 0.25, 0.75], [*B1, 1, 0]]
LEAVES = [
    "4dc22ef583ef82e54c62018d1daa50a3d2ae10687a60e682dbe3cef353a594a3",
    "5ccbc0143997cbab553b5888d6a948410ccbee8eaaa7161ae587d8c94ea2e8e4",
    "d72fb9fe14d3250816558b2800a2205f395174fe86c62efa3dbbea0e998f802c",
]
ANSWER = "so it is 7"
EMBEDDER = {"weights": "w", "layer": 0, "width": 6}


def hashes(*, tagged: bool) -> list[bytes]:
    return [leaf_hash(serialise(np.array(p)), tagged=tagged) for p in PRINTS]


def test_worked_tree() -> None:
    leaves = hashes(tagged=False)
    assert [leaf.hex() for leaf in leaves] == LEAVES
    tree = HashTree(leaves, tagged=False)
    assert tree.root.hex() == "a921c0857fb08dbc9b4dc114ab1c808392cb45200760c36269794e4f0ba0c525"
    path = tree.path(1)
    assert path.siblings[0] == leaves[0]
    assert path.siblings[1].hex().startswith("298932f871dca200")
    assert path.right == (False, True)
    assert root_of(leaves[1], 1, path, count=3, tagged=False) == tree.root


def test_tags_and_bound_roots() -> None:
    root = HashTree(hashes(tagged=True)).root
    assert root.hex() == "1f08ca004323751a80bff76095187fbb14f0928ed9746e939b5ad454c946c0a4"
    bound = bound_root(root, 3).hex()
    assert bound == "895edfb728f8ec5b236681858c6372b16c2db72bf702dda8de0871e974ed46b7"
    assert bound_root(root, 4).hex().startswith("aa7921f802eda6d9")


@pytest.mark.parametrize("tagged", [True, False])
def test_only_a_bound_root_says_how_many_leaves_there_are(tagged: bool) -> None:
    leaves = hashes(tagged=tagged)
    three, four = HashTree(leaves, tagged=tagged), HashTree([*leaves, leaves[2]], tagged=tagged)
    assert three.root == four.root
    assert bound_root(three.root, 3) != bound_root(four.root, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_every_path_verifies_and_no_other(count: int) -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(count)]
    tree = HashTree(leaves)
    if count == 1:
        assert tree.root == leaves[0]
    for i, leaf in enumerate(leaves):
        path = tree.path(i)
        assert len(path.siblings) == depth_of(count) == int(np.ceil(np.log2(count)))
        assert root_of(leaf, i, path, count=count) == tree.root
        for j in range(count):
            if j != i:
                assert root_of(leaf, j, path, count=count) is None  # the sides are another's
    if count > 1:
        swapped = [leaves[1], leaves[0], *leaves[2:]]
        assert HashTree(swapped).root != tree.root
    assert root_of(leaves[0], count, tree.path(0), count=count) is None


def test_no_tokens() -> None:
    receipt = commit(made(0), ANSWER, answer_tokens=3, embedder=EMBEDDER)
    challenge = ask(receipt, seed=0)
    proof = prove(made(0), receipt, challenge)
    assert challenge.indices == ()
    assert faults(receipt, challenge, proof, ANSWER) == []
    other = replace(receipt, root=bytes(32))
    assert faults(other, replace(challenge, digest=other.digest),
                  replace(proof, digest=other.digest), ANSWER)  # fmt: skip


def made(count: int, *, block: int = 4, width: int = 6, seed: int = 0) -> Fingerprints:
    rng = np.random.default_rng(seed)
    return Fingerprints(
        token_vectors=on_grid(rng.normal(size=(count, width))),
        block_vectors=on_grid(rng.normal(size=(len(blocks(count, block)), width))),
        block=block,
    )


def exchange(count: int, seed: int = 0) -> tuple[Receipt, Challenge, Proof]:
    prints = made(count, seed=seed)
    receipt = commit(prints, ANSWER, answer_tokens=3, embedder=EMBEDDER, nonce=bytes(32))
    challenge = ask(receipt, tokens=2, share=0.3, seed=seed)
    return receipt, challenge, prove(prints, receipt, challenge)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000), st.data())
def test_a_proof_passes_and_a_changed_one_fails(count: int, seed: int, data: Any) -> None:
    receipt, challenge, proof = exchange(count, seed)
    assert faults(receipt, challenge, proof, ANSWER) == []
    assert count - 1 in challenge.indices
    for name in ("leaves", "siblings", "right"):
        array = getattr(proof, name).copy()
        if not array.size:
            continue
        raw = array.view(np.uint8)
        place = data.draw(st.integers(0, raw.size - 1), label=name)
        bit = 0 if name == "right" else data.draw(st.integers(0, 7))
        raw.reshape(-1)[place] ^= 1 << bit
        assert faults(receipt, challenge, replace(proof, **{name: array}), ANSWER), name
    root = bytearray(receipt.root)
    place = data.draw(st.integers(0, 255), label="root")
    root[place // 8] ^= 1 << place % 8
    for other in (
        replace(receipt, root=bytes(root)),
        replace(receipt, count=receipt.count + 1),
        replace(receipt, count=receipt.count + 32),
        replace(receipt, nonce=b"\1" * 32),
        replace(receipt, block=5),
    ):
        assert other.digest != receipt.digest
        assert faults(other, challenge, proof, ANSWER)
    # Even with all digests made to agree, another root or count has no paths.
    for other in (replace(receipt, root=bytes(root)), replace(receipt, count=2 * count + 1)):
        same = replace(challenge, digest=other.digest)
        assert faults(other, same, replace(proof, digest=other.digest), ANSWER)
    assert faults(receipt, challenge, proof, ANSWER + ".")
    if len(challenge.indices) > 1:
        fewer = replace(challenge, indices=challenge.indices[:-1])
        assert faults(receipt, fewer, proof, ANSWER)


def test_a_claim_of_more_tokens_than_were_committed_to_fails() -> None:
    prints = made(10)
    honest = commit(prints, ANSWER, answer_tokens=3, embedder=EMBEDDER)
    claimed = replace(honest, count=12)  # the padded tree is the same
    assert claimed.root == honest.root
    challenge = ask(claimed, share=1, seed=0)
    with pytest.raises(UsageError, match="outside"):
        prove(prints, claimed, challenge)
    padded = Fingerprints(
        token_vectors=np.concatenate([prints.token_vectors, prints.token_vectors[[9, 9]]]),
        block_vectors=prints.block_vectors,
        block=4,
    )
    proof = prove(padded, claimed, challenge)  # the last leaf twice more, as padding has it
    assert faults(claimed, challenge, proof, ANSWER) == []
    # It is the receipt's digest, which binds the count, that tells the two claims apart.
    assert claimed.digest != honest.digest
    assert faults(honest, challenge, proof, ANSWER)


def test_one_block_has_one_vector() -> None:
    prints = made(8)
    receipt = commit(prints, ANSWER, answer_tokens=3, embedder=EMBEDDER)

    class Liar(Fingerprints):
        def leaf(self, index: int) -> Any:
            leaf = super().leaf(index).copy()
            leaf[:6] = on_grid(np.arange(6) + index)
            return leaf

    lying = Liar(token_vectors=prints.token_vectors, block_vectors=prints.block_vectors, block=4)
    receipt = commit(lying, ANSWER, answer_tokens=3, embedder=EMBEDDER)
    challenge = ask(receipt, share=1, seed=0)
    found = faults(receipt, challenge, prove(lying, receipt, challenge), ANSWER)
    assert found
    assert all("another vector for block" in f for f in found)


def test_what_is_asked_for() -> None:
    receipt = commit(made(400, block=4), ANSWER, answer_tokens=3, embedder=EMBEDDER)
    first = ask(receipt, tokens=2, seed=1)
    assert first == ask(receipt, tokens=2, seed=1)
    assert first.indices != ask(receipt, tokens=2, seed=2).indices
    for number, share in ((1, 10), (2, 20), (3, 40), (9, 100)):
        asked = np.array(ask(receipt, tokens=1, round=number, seed=1).indices)
        assert len(set((asked // 4).tolist()) - {99}) in (share - 1, share)
    small = commit(made(5, block=4), ANSWER, answer_tokens=3, embedder=EMBEDDER)
    assert ask(small, seed=0).indices == (0, 1, 2, 3, 4)  # two blocks at least, 16 tokens of each


def test_chance_of_meeting_an_added_token() -> None:
    rng = np.random.default_rng(0)
    for k, want in ((1, 0.333), (4, 0.803), (10, 0.983)):
        exact = 1 - comb(667, k) / comb(1000, k)
        assert exact == pytest.approx(want, abs=5e-4)
        hits = [(rng.choice(1000, k, replace=False) >= 667).any() for _ in range(4000)]
        assert np.mean(hits) == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 4000))


# -- files ----------------------------------------------------------------------------------------


def test_files_go_and_come_back(tmp_path: Path) -> None:
    prints = made(9)
    receipt, challenge, proof = exchange(9)
    files.write_opening(tmp_path / "o.safetensors", prints, receipt)
    files.write_json(tmp_path / "r.json", receipt.as_dict())
    files.write_challenge(tmp_path / "c.json", challenge)
    files.write_proof(tmp_path / "p.safetensors", proof)
    again, held = files.read_opening(tmp_path / "o.safetensors")
    np.testing.assert_array_equal(again.token_vectors, prints.token_vectors)
    assert held == receipt == files.read_receipt(tmp_path / "r.json")
    assert files.read_challenge(tmp_path / "c.json") == challenge
    assert faults(held, challenge, files.read_proof(tmp_path / "p.safetensors"), ANSWER) == []
    changed = {**receipt.as_dict(), "tokens": 10}
    files.write_json(tmp_path / "r.json", changed)
    with pytest.raises(InvalidInput, match=r"r\.json: not a receipt: its digest"):
        files.read_receipt(tmp_path / "r.json")
    for bad in ([], {"receipt": "00", "round": 1, "indices": [2, 1]}, {"indices": "x"}):
        files.write_json(tmp_path / "c.json", bad)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="not a challenge"):
            files.read_challenge(tmp_path / "c.json")


# -- vectors --------------------------------------------------------------------------------------


def test_vectors_are_on_a_grid() -> None:
    found = on_grid(np.array([[3.0, -4.0, 0.0], [0, 0, 0], [1, -1e-9, 0]]))
    np.testing.assert_array_equal(found * 4096, np.rint(found * 4096))
    np.testing.assert_allclose(found[0], [0.6, -0.8, 0], atol=1 / 8192)
    assert serialise(found[2]) == serialise(np.array([1, 0, 0]))  # no negative zero
    noise = np.random.default_rng(0).normal(size=(50, 64))
    same = (on_grid(noise) == on_grid(noise * (1 + 1e-7))).mean()
    assert same > 0.999


@pytest.mark.parametrize("layer", [0, 2])
def test_embeddings_are_means_of_states(layer: int) -> None:
    model = ToyTransformer(layers=2)
    embedder = Embedder(model, layer)
    ids = [5, 9, 5, 7]
    if layer == 0:
        rows = to_numpy(model.embed(np.array(ids)))
        np.testing.assert_array_equal(embedder.text(ids), on_grid(rows.mean(axis=0)))
        np.testing.assert_array_equal(embedder.tokens(ids), on_grid(rows))
    single = embedder.tokens([5, 9])
    np.testing.assert_array_equal(embedder.tokens(ids)[:3], single[[0, 1, 0]])
    np.testing.assert_array_equal(embedder.text([5]), single[0])
    prints = fingerprints(embedder, ids, block=3)
    np.testing.assert_array_equal(prints.block_vectors[0], embedder.text(ids[:3]))
    np.testing.assert_array_equal(prints.leaf(3), [*embedder.text([7]), *embedder.tokens([7])[0]])
    with pytest.raises(UsageError, match=r"0\.\.2"):
        Embedder(model, 3)


# -- heads ----------------------------------------------------------------------------------------


def test_untrained_match_and_focal_loss(lib: Any) -> None:
    a, b = lib([3.0, 4.0]), lib([4.0, 3.0])
    assert float(cosine(a, b)) == pytest.approx(0.96)
    assert float(untrained_match(a, b)) == pytest.approx(0.98)
    logit = np.log(0.98 / 0.02)
    for label, want in ((1.0, 8.0811e-06), (0.0, 3.757107)):
        found = float(focal_loss(lib([logit]), lib([label]), gamma=2.0))
        assert found == pytest.approx(want, rel=2e-4)
    assert float(cosine(lib([0.0, 0.0]), b)) == 0


def test_a_new_head_is_the_cosine(lib: Any) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 5)).astype(np.float32)
    weights = {name: lib(value) for name, value in init_head(vectors, centred=True).items()}
    found = to_numpy(match_logit(weights, lib(vectors[:3]), lib(vectors[3:6])))
    centre = vectors.mean(axis=0)
    a, b = vectors[:3] - centre, vectors[3:6] - centre
    want = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(found, 5 * want - 1, atol=1e-4)


def test_a_set_has_no_order(lib: Any) -> None:
    weights = {name: lib(value) for name, value in init_set(seed=3).items()}
    pairs = np.random.default_rng(0).uniform(size=(6, 2)).astype(np.float32)
    want = float(set_logit(weights, lib(pairs)))
    for other in (pairs[[3, 1, 5, 0, 2, 4]], np.concatenate([pairs, pairs])):
        assert float(set_logit(weights, lib(other))) == pytest.approx(want, abs=1e-5)
    many = to_numpy(set_logit(weights, lib(np.stack([pairs, pairs + 1]))))
    assert many[0] == pytest.approx(want, abs=1e-5)


def test_gradient_of_the_set_network() -> None:
    torch = pytest.importorskip("torch")
    weights = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in init_set(width=4, seed=1).items()
    }
    pairs = torch.as_tensor(np.random.default_rng(0).uniform(size=(3, 5, 2)))
    labels = torch.tensor([1.0, 0, 1], dtype=torch.float64)
    focal_loss(set_logit(weights, pairs), labels).backward()
    for name, weight in weights.items():
        for place in range(0, weight.numel(), 3):
            sides = []
            for step in (1e-5, -1e-5):
                moved = {n: w.detach().clone() for n, w in weights.items()}
                moved[name].view(-1)[place] += step
                sides.append(float(focal_loss(set_logit(moved, pairs), labels)))
            slope = (sides[0] - sides[1]) / 2e-5
            assert float(weight.grad.view(-1)[place]) == pytest.approx(slope, abs=1e-4)


def test_verdicts_and_their_file(tmp_path: Path) -> None:
    receipt, _, proof = exchange(12)
    seen = sampled_blocks(receipt, proof)
    answer = on_grid(np.ones(6))
    heads = Heads(thresholds={"tokens": 0.0, "answer": 0.0}, embedder=EMBEDDER)
    free = heads.judge(seen, answer)
    assert free.outcome == "accept"
    pairs, counts = heads.pairs(seen, answer)
    assert free.tokens == pytest.approx((pairs[:, 0] * counts).sum() / counts.sum())
    for limits, want in (
        ({"tokens": 1.0}, "reject"), ({"answer": 0.0, "answer_clear": 1.0}, "undecided"),
        ({"answer": 0.0, "answer_clear": 1.0, "tokens": 1.0}, "reject"),
    ):  # fmt: skip
        limits = {"tokens": 0.0, "answer": 0.0, **limits}
        assert replace(heads, thresholds=limits).judge(seen, answer).outcome == want
    for limit, want in ((0.0, "accept"), (1.0, "reject")):
        plain = replace(heads, thresholds={**heads.thresholds, "plain_answer": limit})
        assert plain.judge(seen, answer).outcome == want
    full = replace(
        heads, tokens=init_head(made(9).token_vectors), answer=init_head(made(9).token_vectors),
        verdict=init_set(), thresholds={"honest": 0.5},
    )  # fmt: skip
    full.save(tmp_path / "h.safetensors")
    again = read_heads(tmp_path / "h.safetensors")
    assert again.judge(seen, answer) == full.judge(seen, answer)
    again.check(EMBEDDER, where="h")
    with pytest.raises(UsageError, match="layer 0, this one has 3"):
        again.check({**EMBEDDER, "layer": 3}, where="h")


def test_repeated_blocks() -> None:
    prints = made(16)
    twice = Fingerprints(
        token_vectors=prints.token_vectors,
        block_vectors=prints.block_vectors[[0, 1, 0, 3]],
        block=4,
    )
    receipt = commit(twice, ANSWER, answer_tokens=3, embedder=EMBEDDER)
    challenge = ask(receipt, share=1, seed=0)
    assert repeated(sampled_blocks(receipt, prove(twice, receipt, challenge))) == [(0, 2)]


def test_repeated_runs() -> None:
    vectors = made(12).token_vectors
    places = np.arange(24)
    twice = np.concatenate([vectors, vectors])
    # 21 runs of 4; those of the second half and none before it stood earlier.
    assert repeated_runs(places, twice, length=4) == pytest.approx(9 / 21)
    assert repeated_runs(np.arange(12), vectors, length=4) == 0
    assert repeated_runs(places * 2, twice, length=4) == 0  # no two tokens that follow each other


# -- traces and training --------------------------------------------------------------------------


def test_inflation() -> None:
    tokenizer, rng = ToyTransformer().tokenizer, np.random.default_rng(0)
    own, others = list(range(10)), [[20, 21, 22], [23]]
    for kind in ("random", "repeat", "foreign", "topic"):
        found = inflated_ids(kind, 1.5, own, others, tokenizer=tokenizer, rng=rng)  # type: ignore[arg-type]
        assert found[:10] == own
        assert len(found) == 25
        added = found[10:]
        if kind == "repeat":
            assert added == [*own, *own[:5]]
        elif kind == "random":
            assert not set(added) & set(tokenizer.special_ids)
        else:
            assert added[:5] == [20, 21, 22, 23, 20]


def test_bad_traces() -> None:
    for value, said in (
        ([], "must be an object"),
        ({"reasoning": "x"}, "answer: must be text"),
        ({"reasoning": "x", "answer": "\ud800"}, "lone surrogate"),
    ):
        with pytest.raises(InvalidInput, match=f"^f:3: .*{said}"):
            parse_trace(value, "f:3")


def test_training_tells_topics_apart() -> None:
    """Heads on a made corpus of topics; the answer's head has to generalise over questions."""
    pytest.importorskip("torch")
    from steersman.backends.torch.train_coin import CoinTraining, train_coin

    model = ToyTransformer(width=32, heads=2, seed=1)
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    traces = []
    for i in range(80):
        words = rng.choice(list(letters), 4, replace=False)

        def text(length: int, words: Any = words) -> str:
            return "".join(rng.choice(words, length))

        traces.append(AuditTrace(reasoning=text(64), answer=text(24), question=f"q{i}"))
    embedder = Embedder(model)
    ready = [prepare(embedder, model.tokenizer, t, block=16) for t in traces]
    options = {"epochs": 4, "learning_rate": 3e-3, "rates": (1.0,), "verdict_steps": 100}
    heads, _ = train_coin(ready, embedder, CoinTraining(**options), threads=1)  # type: ignore[arg-type]
    assert heads.facts["auc_tokens"] > 0.9
    assert heads.facts["auc_answer"] > 0.9
    assert {"honest", "plain_tokens", "plain_answer"} <= set(heads.thresholds)
    again, _ = train_coin(ready, embedder, CoinTraining(**options), threads=1)  # type: ignore[arg-type]
    assert again.thresholds == heads.thresholds


@pytest.mark.weights
def test_real_vectors(engine_model: Any) -> None:
    embedder = Embedder(engine_model)
    ids = engine_model.tokenizer.encode("Paris is the capital of France.")
    prints = fingerprints(embedder, ids, block=4)
    again = fingerprints(Embedder(engine_model), ids, block=4)
    np.testing.assert_array_equal(prints.block_vectors, again.block_vectors)
    receipt = commit(prints, ANSWER, answer_tokens=3, embedder=embedder.facts)
    challenge = ask(receipt, seed=0)
    assert faults(receipt, challenge, prove(prints, receipt, challenge), ANSWER) == []
    other = engine_model.tokenizer.encode("In France, Paris is its capital city.")
    far = engine_model.tokenizer.encode("def f(x):\n    return x[::-1]")
    vectors = [embedder.text(t) for t in (ids, other, far)]
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
