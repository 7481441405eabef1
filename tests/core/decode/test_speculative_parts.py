"""Trees, rejection, the n-gram table and the budget against their definitions."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import ToyTransformer, reference

from steersman.core.array import to_numpy
from steersman.core.decode.speculative.budget import WIDTHS, Budget, CostCurve, Rates, curve_of
from steersman.core.decode.speculative.ngram import Entry, NgramTable, merged
from steersman.core.decode.speculative.rejection import draw, gumbel_order, recursive_rejection
from steersman.core.decode.speculative.tree import (
    EMPTY,
    ROOT,
    DraftTree,
    ask_again,
    ask_tree,
    chain_tree,
    histories,
    kept_branch,
    node_logits,
    tree_of_paths,
)
from steersman.core.errors import InvalidInput, MissingFile, UsageError
from steersman.core.model import Capability

# -- trees ---------------------------------------------------------------------------------------


def test_a_tree_of_paths_holds_common_beginnings_once() -> None:
    paths = [[5, 6, 7], [5, 6, 8, 9], [5], [6, 6]]
    tree, nodes = tree_of_paths(paths)
    assert len(tree) == 7
    assert not tree.is_chain
    assert tree.leaves == 3
    assert tree.depth == 4
    for path, row in zip(paths, nodes, strict=True):
        ends = [int(n) for n in row if n >= 0]
        assert [int(tree.tokens[n]) for n in ends] == path
        assert tree.path(ends[-1]) == tuple(ends)
        node = ROOT
        for token, end in zip(path, ends, strict=True):
            assert tree.child(node, token) == end
            node = end
    assert tree.child(ROOT, 9) is None
    texts = [text.tolist() for text in histories(np.array([1, 2]), tree)]
    assert texts[0] == [1, 2]
    assert [1, 2, 5, 6, 8, 9] in texts


def test_a_chain_needs_no_tree() -> None:
    tree = chain_tree([3, 4])
    ask = ask_tree(np.array([1, 2]), tree)
    assert tree.is_chain
    assert Capability.TREE not in ask.needs()
    assert np.asarray(ask.tokens).tolist() == [[2, 3, 4]]
    assert kept_branch(np.array([1, 2]), tree, 0) is None
    assert EMPTY.is_chain
    assert EMPTY.depth == 0
    assert ask_tree(np.array([1, 2]), EMPTY).logits == "last"


def test_children_before_parents_are_refused() -> None:
    with pytest.raises(UsageError, match="a parent must stand before its children"):
        DraftTree(np.array([1, 2]), np.array([1, -1]))
    with pytest.raises(UsageError, match="2,.* tokens"):
        DraftTree(np.array([1, 2]), np.array([-1]))


def test_tree_logits_and_the_kept_branch_equal_a_fresh_start() -> None:
    model = ToyTransformer()
    text = np.array(list(b"once upon"))
    tree, _ = tree_of_paths([list(b" a time"), list(b" a day"), list(b" the")])
    with model.session(needs=Capability.TREE, max_rows=4) as session:
        session.forward(ask_again(text, 0, text[:-1]))
        out = session.forward(ask_tree(text, tree))
        for logits, whole in zip(to_numpy(node_logits(out)), histories(text, tree), strict=True):
            np.testing.assert_allclose(logits, reference(model, whole.tolist())[0][-1], atol=1e-4)
        node = tree.child(ROOT, ord(" "))
        assert node is not None
        after = np.append(text, [ord(" "), ord("!")])
        again, _ = tree_of_paths([list(b"ab"), list(b"cd")])
        out = session.forward(ask_tree(after, again, kept_branch(text, tree, node)))
        for logits, whole in zip(to_numpy(node_logits(out)), histories(after, again), strict=True):
            np.testing.assert_allclose(logits, reference(model, whole.tolist())[0][-1], atol=1e-4)
        # Resuming elsewhere drops the pending tree and what no longer agrees.
        other = np.array(list(b"once more, please"))
        out = session.forward(ask_again(after, len(after) - 1, other))
        want = reference(model, other.tolist())[0][-1]
        np.testing.assert_allclose(to_numpy(out.logits)[0], want, atol=1e-4)


def test_ask_again_keeps_what_agrees() -> None:
    before = np.array([1, 2, 3, 4, 5])
    for cached, after, keep in [
        (4, [1, 2, 3, 9], 3),
        (4, [1, 2, 9, 9], 2),
        (2, [1, 2, 3, 4, 9], 2),
        (4, [1, 2, 3, 4, 5, 6], 4),
        (4, [1, 2], 1),
        (0, [7], 0),
    ]:
        ask = ask_again(before, cached, np.array(after))
        assert (ask.keep, np.asarray(ask.tokens).tolist()) == (keep, [after[keep:]])


# -- recursive rejection -------------------------------------------------------------------------


def law(t: np.ndarray, d: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Return the exact law of the output and the chance of acceptance, by enumeration."""
    output, accepted = np.zeros(len(t)), 0.0
    for drawn in itertools.permutations(np.flatnonzero(d), k):
        chance, left = 1.0, 1.0
        for x in drawn:
            chance *= d[x] / left
            left -= d[x]
        reach = chance
        for i, x in enumerate(drawn):
            t_now, d_now = residual(t, d, drawn[:i])
            p = min(1.0, t_now[x] / d_now[x])
            # Just below the threshold the rule accepts, just above it goes on.
            low = [1 - 1e-12] * i
            if p > 1e-9:
                assert recursive_rejection(t, d, drawn, [*low, p * (1 - 1e-9)])[0] == i
            output[x] += reach * p
            accepted += reach * p
            reach *= 1 - p
            if p >= 1 - 1e-12:
                break
            above = [*low, p * (1 + 1e-9), *[1 - 1e-12] * (k - i - 1)]
            assert recursive_rejection(t, d, drawn, above)[0] != i
        else:
            place, rest = recursive_rejection(t, d, drawn, [1 - 1e-12] * k)
            assert place is None
            output += reach * rest
    return output, accepted


def residual(t: np.ndarray, d: np.ndarray, before: tuple[int, ...]) -> tuple[Any, Any]:
    """The definition, written out: target and draft after ``before`` were rejected."""
    t, d = t.copy(), d / d.sum()
    for x in before:
        rest = np.maximum(t - d, 0)
        t = rest / rest.sum() if rest.sum() > 0 else rest
        d[x] = 0
        d = d / d.sum() if d.sum() > 0 else d
    return t, d


def test_recursive_rejection_by_enumeration() -> None:
    t, d = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.3, 0.2, 0.0])
    for k, chance in [(1, 0.5), (2, 0.6), (3, 0.6)]:
        output, accepted = law(t, d, k)
        np.testing.assert_allclose(output, t, atol=1e-9)
        assert accepted == pytest.approx(chance, abs=1e-9)


def test_recursive_rejection_by_enumeration_on_random_pairs() -> None:
    random = np.random.default_rng(5)
    for _ in range(60):
        t, d = random.dirichlet([0.5] * 4), random.dirichlet([0.5] * 4)
        for k in (1, 2, 3):
            np.testing.assert_allclose(law(t, d, k)[0], t, atol=1e-9)


def test_a_draft_that_equals_or_covers_the_target_is_always_accepted() -> None:
    random = np.random.default_rng(6)
    for _ in range(50):
        t, d = random.dirichlet([1.0] * 4), random.dirichlet([1.0] * 4)
        for u in random.random(20):
            assert recursive_rejection(t, t, [int(random.integers(4))], [u])[0] == 0
            order = gumbel_order(d, random.random(4))
            assert recursive_rejection(t, d, order.tolist(), random.random(4))[0] is not None


def test_an_exhausted_draft_leaves_the_residual() -> None:
    t, d = np.array([0.0, 0.0, 1.0]), np.array([0.6, 0.4, 0.0])
    place, rest = recursive_rejection(t, d, [0, 1, 2], [0.0, 0.0, 0.0])
    assert place is None
    np.testing.assert_allclose(rest, t)


def test_gumbel_order() -> None:
    d, u = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.9, 0.5, 0.99])
    noise = -np.log(-np.log(u))
    np.testing.assert_allclose(noise, [-0.475885, 2.250367, 0.366513, 4.600149], atol=1e-6)
    keys = np.log(d) + noise
    np.testing.assert_allclose(keys, [-1.169032, 1.046395, -1.530607, 1.604417], atol=1e-6)
    assert gumbel_order(d, u).tolist() == [3, 1, 0, 2]
    draws = np.random.default_rng(0).random((20_000, 4))
    first = [tuple(gumbel_order(d, row)[:2].tolist()) for row in draws]
    # Expected 0.3 * 0.05 / 0.7; five standard deviations.
    assert np.mean([f == (1, 3) for f in first]) == pytest.approx(0.021429, abs=0.0052)
    assert gumbel_order(np.array([0.0, 1.0, 0.0]), np.array([0.5, 0.5, 0.5])).tolist() == [1]


def test_draw_inverts_the_distribution() -> None:
    probs = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [draw(probs, u) for u in (0.0, 0.2, 0.25, 0.9, 1.0)] == [1, 1, 3, 3, 3]


# -- the table -----------------------------------------------------------------------------------

BOB, MARY, TOM, SUE = 1, 2, 3, 4


def test_entries_are_running_means() -> None:
    entry = merged(None, [BOB, MARY, TOM], [0.7, 0.2, 0.05])
    assert entry == Entry(1, (BOB, MARY, TOM), (0.7, 0.2, 0.05))
    entry = merged(entry, [MARY, BOB, SUE], [0.6, 0.3, 0.05])
    assert entry.tokens == (BOB, MARY, TOM, SUE)
    np.testing.assert_allclose(entry.probs, [0.5, 0.4, 0.025, 0.025])
    entry = merged(entry, [MARY, BOB], [0.9, 0.1])
    assert entry.tokens == (MARY, BOB, TOM, SUE)
    np.testing.assert_allclose(entry.probs, [0.566667, 0.366667, 0.016667, 0.016667], atol=1e-6)
    assert entry.seen == 3


def test_an_entry_equals_the_mean_of_what_it_saw_and_holds_ten() -> None:
    random = np.random.default_rng(1)
    rows = random.dirichlet([0.3] * 10, size=30)
    entry = None
    for row in rows:
        order = np.argsort(-row, kind="stable")
        entry = merged(entry, order.tolist(), row[order].tolist())
    assert entry is not None
    mean = dict(zip(entry.tokens, entry.probs, strict=True))
    np.testing.assert_allclose([mean[i] for i in range(10)], rows.mean(0))
    full = merged(entry, list(range(50, 70)), [0.05] * 20)
    assert len(full.tokens) == 10
    assert list(full.probs) == sorted(full.probs, reverse=True)


def test_the_longest_known_context_wins() -> None:
    table = NgramTable()
    table.observe([1, 2], [9], [1.0])
    table.observe([7, 1, 2], [8], [1.0])
    table.observe([3, 7, 1, 2], [6], [1.0])
    assert len(table) == 3
    found = table.find([5, 3, 7, 1, 2])
    assert found is not None
    assert (found.length, found.entry.tokens) == (4, (6,))
    found = table.find([0, 7, 1, 2])
    assert found is not None
    assert (found.length, found.entry.seen) == (3, 2)
    found = table.find([1, 2])
    assert found is not None
    assert (found.length, found.entry.seen) == (2, 3)
    assert table.find([2]) is None
    assert table.find([4, 4, 4, 4]) is None


def test_a_given_text_seeds_only_what_is_unknown() -> None:
    table = NgramTable()
    table.observe([1, 2], [9], [1.0])
    table.seed([0, 1, 2, 3])
    assert table[(1, 2)].tokens == (9,)
    assert table[(0, 1)] == Entry(1, (2,), (1.0,))
    assert table[(0, 1, 2)] == Entry(1, (3,), (1.0,))


def test_the_least_recently_used_entries_go_first() -> None:
    table = NgramTable(most=6)
    for i in range(20):
        table.observe([100, 101], [1], [1.0])  # kept alive
        table.observe([i, i + 1], [1], [1.0])
        assert len(table) <= 6
    assert table[(100, 101)].seen == 20
    assert table.find([0, 1]) is None
    assert table.find([19, 20]) is not None


MADE = {"model": "abc", "chain": "()"}


def test_a_table_survives_a_file(tmp_path: Path) -> None:
    table = NgramTable()
    random = np.random.default_rng(2)
    for _ in range(200):
        text = random.integers(0, 6, size=4).tolist()
        table.observe(text, [3, 1], [0.625, random.random() / 4])
    path = tmp_path / "table.npz"
    table.save(path, MADE)
    again = NgramTable.load(path, MADE)
    assert list(again._entries.items()) == list(table._entries.items())
    assert len(NgramTable.load(path, MADE, most=5)) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["table.npz"]


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    with pytest.raises(MissingFile, match=r"table\.npz: no such file"):
        NgramTable.load(path, MADE)
    table = NgramTable()
    table.observe([1, 2, 3, 4], [5], [1.0])
    table.save(path, MADE)
    with pytest.raises(InvalidInput, match=r"made with model 'abc', not 'def'"):
        NgramTable.load(path, {**MADE, "model": "def"})
    good = path.read_bytes()
    for cut in range(0, len(good), 97):
        path.write_bytes(good[:cut])
        with pytest.raises(InvalidInput, match="not an n-gram table"):
            NgramTable.load(path, MADE)
    with np.load(io.BytesIO(good), allow_pickle=False) as arrays:
        held = dict(arrays)
    for key, bad in [
        ("probs", np.full_like(held["probs"], 2.0)),
        ("probs", np.full_like(held["probs"], np.nan)),
        ("counts", held["counts"] * 0),
        ("contexts", held["contexts"][:1]),
        ("tokens", held["tokens"].astype(float)),
        ("tokens", np.full_like(held["tokens"], -1)),
    ]:
        np.savez(path, **{**held, key: bad})
        with pytest.raises(InvalidInput, match="damaged"):
            NgramTable.load(path, MADE)
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(InvalidInput, match="not an n-gram table"):
        NgramTable.load(path, MADE)


# -- the budget ------------------------------------------------------------------------------------


class Engine:
    """A clock that only calls move: ``cost(width)`` seconds each."""

    def __init__(self, cost: str) -> None:
        self.cost, self.now = COSTS[cost], 0.0
        self.widths: Counter[int] = Counter()
        self.budget = Budget(CostCurve(), lambda: self.now)

    def run(self, rounds: int, gains: Any, accept: Any, noise: Any = lambda: 1.0) -> float:
        """Return the speed against plain decoding over ``rounds`` rounds."""
        budget, begun, tokens = self.budget, self.now, 0
        budget.asked(0)
        budget.entered()
        for _ in range(rounds):
            drafted = budget.choose(gains())
            self.widths[1 + drafted] += 1
            budget.asked(1 + drafted)
            self.now += self.cost(1 + drafted) * noise()
            budget.entered()
            confirmed = 1 + accept(drafted)
            budget.confirmed(confirmed)
            tokens += confirmed
        return tokens * self.cost(1) / (self.now - begun)


def sure(chance: float, length: int = 15) -> list[float]:
    return [chance**i for i in range(1, length + 1)]


def geometric(random: np.random.Generator, chance: float) -> Any:
    return lambda drafted: next((i for i in range(drafted) if random.random() >= chance), drafted)


COSTS = {
    "flat": lambda n: 1 + 0.02 * (n - 1),
    "groups of eight": lambda n: 1.0 + (n - 1) // 8,
    "affine": lambda n: 1.0 if n == 1 else 1.3 + 0.3 * n,
    "as dear as single calls": lambda n: float(n) * 1.05,
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.95])
def test_speculation_is_never_much_slower_than_plain_decoding(name: str, chance: float) -> None:
    for seed in range(5):
        accept = geometric(np.random.default_rng(seed), chance)
        assert Engine(name).run(80, lambda: sure(chance), accept) > 0.95
    # Even where every forecast is far too hopeful.
    assert Engine(name).run(100, lambda: sure(0.9), lambda drafted: 0) > 0.95


@pytest.mark.parametrize("name", ["flat", "groups of eight", "affine"])
@pytest.mark.parametrize("chance", [0.6, 0.8, 0.95])
def test_the_budget_finds_nearly_the_best_width(name: str, chance: float) -> None:
    accept = geometric(np.random.default_rng(1), chance)
    speed = Engine(name).run(400, lambda: sure(chance), accept)
    widths = [1, *(w for w in WIDTHS if w <= 16)]
    best = max((1 + sum(sure(chance, w - 1))) / COSTS[name](w) for w in widths)
    assert speed > 0.85 * best


def test_one_slow_call_does_not_end_speculation() -> None:
    engine = Engine("flat")
    late = iter([1.0, 1.0, 40.0])  # the first probe meets a busy machine
    accept = geometric(np.random.default_rng(0), 0.9)
    speed = engine.run(300, lambda: sure(0.9), accept, lambda: next(late, 1.0))
    assert engine.widths[16] > 50
    assert speed > 2


def test_a_budget_that_does_not_adapt_takes_everything() -> None:
    budget = Budget(CostCurve(), lambda: 0.0, adaptive=False)
    assert budget.choose([0.01] * 7) == 7
    assert budget.choose([]) == 0
    assert budget.floor == 0


def test_nothing_is_drafted_before_plain_decoding_is_timed() -> None:
    engine = Engine("flat")
    engine.run(3, lambda: sure(0.99), lambda drafted: drafted)
    assert engine.widths[1] == 2


def test_cost_curves_interpolate_and_belong_to_a_model() -> None:
    model, other = ToyTransformer(), ToyTransformer()
    curve = curve_of(model, "chain")
    assert curve is curve_of(model, "chain")
    assert curve is not curve_of(model, "tree")
    assert curve is not curve_of(other, "chain")
    assert curve.seconds(1) is None
    for width, seconds in [(1, 1.0), (1, 9.0), (1, 1.2), (4, 2.2), (8, 2.0), (12, 3.0)]:
        curve.observe(width, seconds)
    assert curve.seconds(1) == 1.2  # the median: one outlier does not count
    assert curve.seconds(8) == 2.2  # a wider call is not cheaper
    assert curve.seconds(2) == pytest.approx(1.2 + 1.0 / 3)
    assert curve.seconds(10) == pytest.approx(2.6)
    assert curve.seconds(14) == pytest.approx(3.4)
    assert curve.widest == 12


def test_rates_follow_what_happens() -> None:
    rates = Rates()
    assert rates.rate("x", 0.7) == 0.7
    for _ in range(300):
        rates.observe("x", 1.0, 0.0)
    assert rates.rate("x", 0.7) < 0.05
    for _ in range(100):
        rates.observe("x", 0.5, 0.5)
    assert rates.rate("x", 0.7) > 0.7
    assert rates.rate("y", 0.3) == 0.3
