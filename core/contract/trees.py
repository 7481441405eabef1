"""Checks of draft trees."""

from __future__ import annotations

from ..model import Capability, Forward
from .probe import Probe, Spec, pad
from .report import Meter

C = Capability
# Two roots, branches of unequal depth, siblings that are not neighbours; leaves 3, 4, 6, 7.
PARENTS = [-1, -1, 0, 0, 1, 2, 2, 5]
LEAVES = 4


def chain(parents: list[int], node: int) -> list[int]:
    """Return the nodes from a root down to ``node``."""
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


def compare_nodes(
    probe: Probe,
    meter: Meter,
    prefix: list[int],
    nodes: list[int],
    parents: list[int],
    answer: object,
    where: str,
) -> None:
    """Compare the logits of every leaf's path with the same path fed as a chain."""
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        path = chain(parents, leaf)
        want = probe.fresh(prefix + [nodes[i] for i in path], len(path))
        meter.logits(answer[path], want, f"{where}, branch {path}")  # type: ignore[index]


def _branches(probe: Probe, meter: Meter) -> None:
    prefix, nodes = probe.short, probe.other[: len(PARENTS)]
    n = len(prefix)
    with probe.open(C.TREE, rows=LEAVES) as session:
        probe.feed(session, 0, [prefix])
        answer = probe.feed(session, n, [nodes], parents=[PARENTS])[0]
        compare_nodes(probe, meter, prefix, nodes, PARENTS, answer, "after a prefix")
        meter.holds(session.lengths.tolist() == [n], "pending nodes are counted as cached")
    # Prefix and tree in one call: the prefix is a chain of nodes.
    size = 4
    parents = [*range(-1, size - 1), size - 1, size - 1, size]
    tokens = prefix[:size] + nodes[:3]
    with probe.open(C.TREE, rows=LEAVES) as session:
        answer = probe.feed(session, 0, [tokens], parents=[parents])[0]
        compare_nodes(probe, meter, [], tokens, parents, answer, "prefix and tree in one call")


def _keep_branch(probe: Probe, meter: Meter) -> None:
    prefix, other = probe.short, probe.other
    nodes, n = other[: len(PARENTS)], len(probe.short)
    with probe.open(C.TREE, rows=LEAVES) as session:
        probe.feed(session, 0, [prefix])
        probe.feed(session, n, [nodes], parents=[PARENTS])
        # As speculation does: keep a branch and put the next tree on top of it, in one call.
        path = [0, 2, 5]
        kept = prefix + [nodes[i] for i in path]
        after = other[8 : 8 + len(PARENTS)]
        answer = probe.feed(session, n, [after], path=[path], parents=[PARENTS])[0]
        compare_nodes(probe, meter, kept, after, PARENTS, answer, "a tree on a kept branch")
        # Keep one root, and only then append a chain.
        session.forward(Forward(keep=len(kept), path=[[1]], logits="none"))
        kept = kept + [after[1]]
        meter.holds(session.row_tokens().tolist() == kept, "recorded tokens are wrong")
        answer = probe.feed(session, len(kept), [other[20:23]])[0]
        meter.logits(answer, probe.fresh(kept + other[20:23], 3), "a chain on a kept branch")
        # What was kept out of a tree can be rolled back like anything else.
        if C.ROLLBACK in probe.model.capabilities:
            kept = kept[: n + 2]
            answer = probe.feed(session, n + 2, [other[23:25]])[0]
            meter.logits(answer, probe.fresh(kept + other[23:25], 2), "back into a kept branch")


def _drop(probe: Probe, meter: Meter) -> None:
    prefix, other = probe.short, probe.other
    nodes, n = other[: len(PARENTS)], len(prefix)
    new = probe.tokens[n : n + 3] or other[8:11]
    with probe.open(C.TREE, rows=LEAVES) as session:
        probe.feed(session, 0, [prefix])
        probe.feed(session, n, [nodes], parents=[PARENTS])
        answer = probe.feed(session, n, [new])[0]
        meter.logits(answer, probe.fresh(prefix + new, 3), "after a dropped tree")
        kept = prefix + new
        probe.feed(session, len(kept), [nodes], parents=[PARENTS])
        session.forward(Forward(keep=len(kept), logits="none"))
        answer = probe.feed(session, len(kept), [other[9:11]])[0]
        meter.logits(answer, probe.fresh(kept + other[9:11], 2), "after a tree dropped by itself")
        kept = kept + other[9:11]
        probe.feed(session, len(kept), [nodes], parents=[PARENTS])
        if C.ROLLBACK in probe.model.capabilities:
            answer = probe.feed(session, n - 3, [new])[0]
            want = probe.fresh(prefix[: n - 3] + new, 3)
            meter.logits(answer, want, "back behind a dropped tree")


def _rows(probe: Probe, meter: Meter) -> None:
    other = probe.other
    prefixes = [probe.short[:9], probe.short[2:7]]
    parents = [PARENTS, [-1, 0, 0, 1, -1]]
    nodes = [other[: len(PARENTS)], other[8:13]]
    paths = [[0, 3], [0, 1, 3]]
    with probe.open(C.TREE | C.ROWS | C.FORK, rows=2 * LEAVES) as session:
        probe.feed(session, 0, prefixes, rows=[0, 0])
        lengths = [len(prefix) for prefix in prefixes]
        answers = probe.feed(session, lengths, nodes, parents=pad(parents))
        for b in range(2):
            compare_nodes(
                probe, meter, prefixes[b], nodes[b], parents[b], answers[b], f"tree of row {b}"
            )
        new = [other[13:14], other[14:17]]
        answers = probe.feed(session, lengths, new, path=pad(paths))
        for b in range(2):
            kept = prefixes[b] + [nodes[b][i] for i in paths[b]]
            want = probe.fresh(kept + new[b], len(new[b]))
            meter.logits(answers[b], want, f"kept branch of row {b}")


_TREE = C.LAST_LOGITS | C.ALL_LOGITS | C.TREE

CHECKS = (
    Spec(
        name="tree",
        title="branches of a draft tree equal separate chains",
        needs=_TREE,
        run=_branches,
        invariance=False,
    ),
    Spec(
        name="tree-keep",
        title="a kept branch continues like the chain",
        needs=_TREE,
        run=_keep_branch,
        invariance=False,
    ),
    Spec(
        name="tree-drop",
        title="a dropped tree leaves nothing behind",
        needs=_TREE,
        run=_drop,
        invariance=False,
    ),
    Spec(
        name="tree-rows",
        title="rows carry draft trees of their own",
        needs=_TREE | C.ROWS | C.FORK,
        run=_rows,
        invariance=False,
    ),
)
