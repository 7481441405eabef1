"""Token values: labels, loss, head, its file, sampled texts and hidden states."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToyTransformer, reference

from steersman.core.array import to_numpy
from steersman.core.errors import InvalidInput, MissingFile, UsageError
from steersman.core.objectives import binary_cross_entropy, token_value_loss
from steersman.core.values import (
    PrefixTree,
    ValueHead,
    ValueShape,
    head_values,
    init_weights,
    label_rows,
    prefix_tree,
    read_value_head,
    save_value_head,
)
from steersman.core.values.features import (
    LEAVES,
    NEEDS,
    extract,
    features_path,
    read_dataset,
    tree_hidden,
)
from steersman.core.values.rollouts import (
    Question,
    RolloutSettings,
    comparable,
    read_rollouts,
    roll_out,
)

PATHS = [[1, 2, 3, 9], [1, 2, 4, 9], [1, 2, 3, 8], [1, 5, 6, 9]]
OUTCOMES = [1, 0, 1, 0]
EOS = 9


def random_texts(seed: int, count: int = 40) -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(seed)
    texts = [[*rng.integers(0, 3, rng.integers(0, 6)).tolist(), EOS] for _ in range(count)]
    return texts, rng.integers(0, 2, count).tolist()


def by_hand(texts: list[list[int]], outcomes: list[int], text: list[int], length: int) -> Fraction:
    same = [o for t, o in zip(texts, outcomes) if t[:length] == text[:length] and len(t) >= length]
    return Fraction(sum(same), len(same))


# -- labels ----------------------------------------------------------------------------------------


def test_worked_labels() -> None:
    tree = prefix_tree(PATHS, OUTCOMES)
    labels = [tree.values[path].tolist() for path in tree.paths]
    third = 2 / 3
    assert labels == [[0.5, third, 1, 1], [0.5, third, 0, 0], [0.5, third, 1, 1], [0.5, 0, 0, 0]]
    tokens = np.concatenate([tree.values[path] for path in tree.paths])
    outcomes = np.repeat(OUTCOMES, 4)
    assert float(np.mean((0.5 - tokens) ** 2)) == pytest.approx(0.145833, abs=1e-6)
    assert float(np.mean((0.5 - outcomes) ** 2)) == 0.25
    # The same errors over prefixes, each as often as it was drawn.
    for kind, expected in (("token", 0.145833), ("outcome", 0.25)):
        rows = label_rows(tree, kind)
        loss = token_value_loss(np.full(len(rows.nodes), 0.5), rows.labels, rows.weights)
        assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_labels_by_brute_force(seed: int) -> None:
    texts, outcomes = random_texts(seed)
    tree = prefix_tree(texts, outcomes)
    for text, path in zip(texts, tree.paths):
        for i, node in enumerate(path):
            value = by_hand(texts, outcomes, text, i + 1)
            assert Fraction(int(tree.right[node]), int(tree.counts[node])) == value
            assert tree.tokens[node] == text[i]
            assert tree.parents[node] == (path[i - 1] if i else -1)
            assert tree.parents[node] < node
            if tree.counts[node] == 1:
                assert value in (0, 1)
    assert tree.counts.sum() == sum(map(len, texts))


@pytest.mark.parametrize("seed", range(4))
def test_a_value_is_the_mean_of_its_childrens(seed: int) -> None:
    tree = prefix_tree(*random_texts(seed))

    def value(node: int) -> Fraction:
        return Fraction(int(tree.right[node]), int(tree.counts[node]))

    inner = set(tree.parents.tolist()) - {-1}
    for node in inner:
        children = np.flatnonzero(tree.parents == node)
        count = int(tree.counts[node])
        assert tree.counts[children].sum() == count  # every text goes on to its end token
        mean = sum(Fraction(int(tree.counts[c]), count) * value(c) for c in children)
        assert mean == value(node)


def test_all_right_is_all_one_and_duplicates_count() -> None:
    texts, _ = random_texts(5)
    assert (prefix_tree(texts, [1] * len(texts)).values == 1).all()
    tree = prefix_tree([[1, 2], [1, 2], [1, 3]], [1, 1, 0])
    assert tree.values[0] == 2 / 3
    assert tree.sharing_depth == pytest.approx((2 + 2 + 1) / 3)


def test_step_labels() -> None:
    tree = prefix_tree(PATHS, OUTCOMES)
    # The second token ends a step: after [1, 2] a right text exists, after [1, 5] none.
    ends = [[False, True, False, False]] * 4
    rows = label_rows(tree, "step", ends=ends)
    found = {(int(n), float(v)): float(w) for n, v, w in zip(rows.nodes, rows.labels, rows.weights)}
    first, both, last = tree.paths[0][0], tree.paths[0][1], tree.paths[1][3]
    assert found[first, 1.0] == 3
    assert found[first, 0.0] == 1
    assert found[both, 1.0] == 3
    assert found[last, 0.0] == 1
    assert rows.weights.sum() == 16
    with pytest.raises(UsageError, match="ends of the steps"):
        label_rows(tree, "step")


def test_bad_labels() -> None:
    with pytest.raises(UsageError, match="2 texts but 1 outcomes"):
        prefix_tree([[1], [2]], [1])
    with pytest.raises(UsageError, match="must be token, outcome or step"):
        label_rows(prefix_tree(PATHS, OUTCOMES), "best")  # type: ignore[arg-type]


# -- gradients -------------------------------------------------------------------------------------


def gradient(tree: PrefixTree, kind: Any, loss: str, texts: list[int] | None = None) -> Any:
    """Return the gradient of the head's weights over all tokens of some texts."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    hidden = torch.tensor(rng.normal(size=(len(tree.tokens), 5)))
    shape = ValueShape(features=5)
    weights = {
        name: torch.tensor(rng.normal(size=size), requires_grad=True)
        for name, size in shape.parameters.items()
    }
    chosen = list(range(len(tree.paths))) if texts is None else texts
    nodes = np.concatenate([tree.paths[i] for i in chosen])
    if kind == "token":
        labels = tree.values[nodes]
    else:
        labels = np.concatenate([np.full(len(tree.paths[i]), OUTCOMES[i]) for i in chosen])
    values, truth = head_values(weights, hidden[nodes]), torch.tensor(labels, dtype=torch.float64)
    result = token_value_loss(values, truth) if loss == "mse" else binary_cross_entropy(
        values, truth
    )  # fmt: skip
    result.backward()
    return torch.cat([w.grad.flatten() for w in weights.values()]).numpy()


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_on_all_texts_the_gradient_is_that_of_the_outcomes(loss: str) -> None:
    tree = prefix_tree(PATHS, OUTCOMES)
    np.testing.assert_allclose(
        gradient(tree, "token", loss), gradient(tree, "outcome", loss), atol=1e-15
    )
    # Not so where texts of one prefix are in different batches.
    apart = gradient(tree, "token", loss, [0, 3]) - gradient(tree, "outcome", loss, [0, 3])
    assert np.abs(apart).max() > 0.005


def test_rows_of_prefixes_have_the_gradient_of_tokens() -> None:
    torch = pytest.importorskip("torch")
    tree = prefix_tree(PATHS, OUTCOMES)
    tokens = torch.zeros(len(tree.tokens), dtype=torch.float64, requires_grad=True)
    nodes = np.concatenate(tree.paths)
    token_value_loss(tokens[nodes], torch.tensor(tree.values[nodes])).backward()
    expected = tokens.grad.numpy().copy()
    for kind in ("token", "outcome"):
        tokens.grad = None
        rows = label_rows(tree, kind)  # type: ignore[arg-type]
        token_value_loss(
            tokens[rows.nodes], torch.tensor(rows.labels), torch.tensor(rows.weights)
        ).backward()
        np.testing.assert_allclose(tokens.grad.numpy(), expected, atol=1e-7)


def test_loss_by_hand(lib: Any) -> None:
    values, labels = lib([0.5, 0.25, 2.0]), lib([1.0, 0.0, 1.0])
    assert float(token_value_loss(values, labels)) == pytest.approx((0.25 + 0.0625 + 1) / 3)
    weighted = token_value_loss(values, labels, lib([2.0, 1.0, 0.0]))
    assert float(weighted) == pytest.approx((0.5 + 0.0625) / 3)


@pytest.mark.parametrize("width", [0, 4])
def test_gradient_of_the_head_by_differences(width: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    shape = ValueShape(features=6, width=width)
    weights = {name: rng.normal(size=size) for name, size in shape.parameters.items()}
    hidden, labels = rng.normal(size=(7, 6)), rng.uniform(size=7)
    tensors = {n: torch.tensor(w, requires_grad=True) for n, w in weights.items()}
    token_value_loss(head_values(tensors, torch.tensor(hidden)), torch.tensor(labels)).backward()
    for name, weight in weights.items():
        for at in np.ndindex(weight.shape):
            sides = []
            for sign in (1, -1):
                moved = {n: w.copy() for n, w in weights.items()}
                moved[name][at] += sign * 1e-6
                sides.append(float(token_value_loss(head_values(moved, hidden), labels)))
            slope = (sides[0] - sides[1]) / 2e-6
            # gelu is an approximation of the error function to some 1e-6, hence the tolerance.
            assert float(tensors[name].grad[at]) == pytest.approx(slope, abs=3e-5)


# -- the head and its file -------------------------------------------------------------------------


def test_head_by_hand(lib: Any) -> None:
    weights = {
        "gain": lib([2.0, 1.0]),
        "bias": lib([0.5, -1.0]),
        "weight": lib([1.0, 3.0]),
        "offset": lib([0.25]),
    }
    values = head_values(weights, lib([[1.0, 2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(to_numpy(values), [2.5 + 3 + 0.25, 0.5 - 3 + 0.25], atol=1e-6)


def test_fresh_weights_put_hidden_states_on_one_scale() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(500, 3)) * [1, 100, 0.01] + [0, 50, 3]
    weights = init_weights(
        ValueShape(features=3), seed=0, mean=hidden.mean(0), deviation=hidden.std(0), offset=0.3
    )
    scaled = weights["gain"] * hidden + weights["bias"]
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(scaled.std(0), 1, atol=1e-3)
    np.testing.assert_allclose(head_values(weights, hidden.astype(np.float32)), 0.3, atol=1e-6)


def example(**changes: Any) -> ValueHead:
    shape = ValueShape(features=4, width=changes.pop("width", 3))
    weights = init_weights(shape, seed=2, offset=0.5)
    given = {"shape": shape, "weights": weights, "layer": 2, "model": "abc", "facts": {"a": 1}}
    return ValueHead(**{**given, **changes})


def test_a_file_gives_the_head_back(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    head = example()
    save_value_head(head, path)
    found = read_value_head(path)
    assert (found.shape, found.layer, found.model, found.facts) == (head.shape, 2, "abc", {"a": 1})
    for name, value in head.weights.items():
        np.testing.assert_array_equal(found.weights[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(MissingFile, match="steersman train value"):
        read_value_head(path)
    for content in (b"", b"{}", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match="not a file of steersman train value"):
            read_value_head(path)
    save_value_head(example(weights={**example().weights, "offset": np.array([np.nan], "f")}), path)
    with pytest.raises(InvalidInput, match="finite"):
        read_value_head(path)
    save_value_head(example(weights={"offset": np.zeros(1, np.float32)}), path)
    with pytest.raises(InvalidInput, match="do not fit"):
        read_value_head(path)
    save_value_head(example(layer=-1), path)
    with pytest.raises(InvalidInput, match="layer must be"):
        read_value_head(path)


def test_a_head_of_another_model_is_refused() -> None:
    info = ToyTransformer(width=16).info
    with pytest.raises(UsageError, match="width 4"):
        example().check(info, where="h")
    shape = ValueShape(features=16)
    head = example(shape=shape, weights=init_weights(shape, seed=0))
    with pytest.raises(UsageError, match="other weights"):
        head.check(info, where="h")
    with pytest.raises(UsageError, match="layer 9"):
        example(shape=shape, layer=9, model="").check(info, where="h")
    with pytest.raises(UsageError, match="width must be in"):
        ValueShape(features=4, width=-1)


# -- sampled texts ---------------------------------------------------------------------------------

SETTINGS = RolloutSettings(samples=12, rows=5, max_tokens=5, temperature=1.0, top_k=0, match="text")
QUESTIONS = [Question(prompt=[0, 1, 2 + i], answer="ab") for i in range(3)]


def test_rollouts_are_samples_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    model = TableModel(order=2)
    assert roll_out(tmp_path / "a", QUESTIONS, model, SETTINGS) == 3
    whole = (tmp_path / "a" / "rollouts.jsonl").read_bytes()
    # Row i of a question draws as text i, however many are side by side.
    side = RolloutSettings(**{**vars(SETTINGS), "rows": 12})
    roll_out(tmp_path / "b", QUESTIONS, model, side)
    assert (tmp_path / "b" / "rollouts.jsonl").read_bytes() == whole
    log = tmp_path / "b" / "rollouts.jsonl"
    log.write_bytes(whole[: len(whole) // 2])  # stopped within a line
    seen: list[int] = []
    roll_out(tmp_path / "b", QUESTIONS, model, SETTINGS, progress=lambda: seen.append(1))
    assert log.read_bytes() == whole
    assert len(seen) == 3
    eos = model.tokenizer.eos_ids
    for held in read_rollouts(tmp_path / "a"):
        assert len(held.texts) == 12
        for text, logprob in zip(held.texts, held.logprobs):
            assert len(text) == 5 or text[-1] in eos
            assert not set(text[:-1]) & eos
            exact = np.log(model.probability(text, held.prompt)) / len(text)
            assert logprob == pytest.approx(exact, abs=1e-5)
        assert held.right == tuple(answer == "ab" for answer in held.answers)


def test_rollouts_of_other_settings_or_questions_are_refused(tmp_path: Path) -> None:
    model = TableModel(order=2)
    roll_out(tmp_path, QUESTIONS[:1], model, SETTINGS)
    other = RolloutSettings(**{**vars(SETTINGS), "temperature": 0.5})
    with pytest.raises(UsageError, match="another temperature"):
        roll_out(tmp_path, QUESTIONS, model, other)
    with pytest.raises(UsageError, match="another question"):
        roll_out(tmp_path, QUESTIONS[1:], model, SETTINGS)
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps({"prompt": [0], "texts": 3}) + "\n")
    with pytest.raises(InvalidInput, match=r"rollouts\.jsonl:1: damaged"):
        roll_out(tmp_path, QUESTIONS, model, SETTINGS)


def test_cancelled_rollouts_keep_what_is_whole(tmp_path: Path) -> None:
    model, polls = TableModel(order=2), iter([False] * 9 + [True] * 99)
    done = roll_out(tmp_path, QUESTIONS, model, SETTINGS, cancelled=lambda: next(polls))
    assert done < 3
    assert len(list(read_rollouts(tmp_path))) == done
    assert roll_out(tmp_path, QUESTIONS, model, SETTINGS) == 3


def test_answers_are_compared_by_number_or_text() -> None:
    assert comparable("3 + 4 = 7, and 7 + 5 = 12.", "number") == comparable("12", "number") == "12"
    assert comparable("none", "number") == ""
    assert comparable(" 12\n", "text") == "12"


# -- hidden states ---------------------------------------------------------------------------------


def test_hidden_states_of_all_prefixes(lib: Any) -> None:
    model = ToyTransformer(lib.xp)
    prompt = list(b"ask: ")
    texts = [list(b"abc"), list(b"abd"), list(b"x"), list(b"abc"), list(b"abce")]
    tree = prefix_tree(texts, [1, 0, 0, 1, 1])
    with model.session(max_rows=LEAVES, needs=NEEDS) as session:
        found = tree_hidden(model, session, prompt, tree, layer=2)
        again = tree_hidden(model, session, prompt, tree, layer=2)
        shorter = tree_hidden(model, session, prompt, prefix_tree([texts[0]], [1]), layer=2)
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(found[tree.paths[0]], shorter)  # later tokens change nothing
    oracle = ToyTransformer()
    for text, path in zip(texts, tree.paths):
        states = reference(oracle, [*prompt, *text])[1][-1][len(prompt) :]
        expected = np.asarray(oracle.norm(np.asarray(states)))
        np.testing.assert_allclose(found[path], expected, atol=2e-5)


def test_more_texts_than_leaves(tmp_path: Path) -> None:
    model = ToyTransformer()
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 100, 4).tolist() for _ in range(3 * LEAVES)]
    tree = prefix_tree(texts, [1] * len(texts))
    with model.session(max_rows=LEAVES, needs=NEEDS) as session:
        found = tree_hidden(model, session, [5, 6], tree, layer=1)
        alone = tree_hidden(model, session, [5, 6], prefix_tree(texts[-1:], [1]), layer=1)
    np.testing.assert_array_equal(found[tree.paths[-1]], alone)
    assert np.abs(found).sum(axis=1).min() > 0


def test_features_on_disk(tmp_path: Path) -> None:
    model = ToyTransformer()
    roll_out(tmp_path, QUESTIONS, model, SETTINGS)
    rollouts = list(read_rollouts(tmp_path))
    assert extract(tmp_path, rollouts, model, layer=2) == 3
    stamps = [features_path(tmp_path, 2, i).stat().st_mtime_ns for i in range(3)]
    extract(tmp_path, rollouts, model, layer=2)
    assert [features_path(tmp_path, 2, i).stat().st_mtime_ns for i in range(3)] == stamps
    data = read_dataset(tmp_path, rollouts, layer=2)
    assert len(data.hidden) == len(data.values) == len(data.questions) == len(data.nodes)
    assert data.counts.sum() == sum(len(t) for r in rollouts for t in r.texts)
    np.testing.assert_array_equal(data.labels, data.values)
    outcome = read_dataset(tmp_path, rollouts, layer=2, labels="outcome")
    assert outcome.weights.sum() == data.counts.sum()
    assert set(outcome.labels.tolist()) <= {0.0, 1.0}
    np.save(features_path(tmp_path, 2, 0), np.zeros((1, 16), np.float32))
    with pytest.raises(InvalidInput, match="belongs to other texts"):
        read_dataset(tmp_path, rollouts, layer=2)
    features_path(tmp_path, 2, 0).write_bytes(b"no array")
    with pytest.raises(InvalidInput, match="damaged"):
        read_dataset(tmp_path, rollouts, layer=2)
