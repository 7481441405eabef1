"""What a session accepts, refuses and records, before any engine is asked."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToyTransformer, small_tokenizer

from steersman.core.errors import CapabilityError, ContextOverflow, UsageError
from steersman.core.model import Capability, Forward, Output, Plan, Session

C = Capability
ALL = ~C.NONE
V, D, L = 13, 8, 2


def toy(without: Capability = C.NONE, **options: Any) -> ToyTransformer:
    return ToyTransformer(
        tokenizer=small_tokenizer(), width=D, layers=L, without=without, **options
    )


def opened(
    tokens: list[list[int]] | None = None, *, rows: int = 4, needs: Capability = ALL
) -> Session:
    """A session of one or more rows of three tokens."""
    model = toy()
    session = model.session(max_rows=rows, needs=needs & model.capabilities, context=16)
    tokens = tokens or [[1, 2, 3]]
    source = None if len(tokens) == 1 else [0] * len(tokens)
    session.forward(Forward(keep=0, tokens=tokens, rows=source, logits="none"))
    return session


def planned(session: Session, **fields: Any) -> Plan:
    fields.setdefault("keep", 3)
    return session._plan(Forward(**fields))


# -- refused ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "token = V": ({"tokens": [[V]]}, r"tokens 13 outside -1\.\.12"),
    "token huge": ({"tokens": [[10**12]]}, "tokens 1000000000000 outside"),
    "token -2": ({"tokens": [[-2]]}, "tokens -2 outside"),
    "token as array": ({"tokens": np.array([[V]])}, "tokens 13 outside"),
    "float token": ({"tokens": [[1.0]]}, "tokens must be integers, got float64"),
    "text token": ({"tokens": [["a"]]}, "tokens must be integers"),
    "bool token": ({"tokens": np.array([[True]])}, "tokens must be integers, got bool"),
    "flat tokens": ({"tokens": [1, 2]}, r"tokens must have 2 dimension\(s\), got 1"),
    "left padding": ({"tokens": [[-1, 1]]}, "only to the right"),
    "hole in a row": ({"tokens": [[1, -1, 2]]}, "only to the right"),
    "all padding": ({"tokens": [[-1, -1]]}, "every row is padding"),
    "rows of tokens": ({"tokens": [[1], [2]]}, "tokens for 2 rows, expected 1"),
    "keep too long": ({"keep": 4, "tokens": [[1]]}, r"keep \[4\] outside 0\.\.\[3\]"),
    "keep negative": ({"keep": -1, "tokens": [[1]]}, r"keep \[-1\] outside"),
    "keep per row": ({"keep": [3, 3], "tokens": [[1]]}, "keep has 2 entries for 1 rows"),
    "keep nested": ({"keep": [[3]], "tokens": [[1]]}, "keep must have 1 dimension"),
    "keep float": ({"keep": np.array([2.5]), "tokens": [[1]]}, "keep must be integers"),
    "row out of range": ({"rows": [1], "tokens": [[1]]}, r"rows 1 outside 0\.\.0"),
    "row negative": ({"rows": [-1], "tokens": [[1]]}, "rows -1 outside"),
    "no rows": ({"rows": [], "logits": "none"}, "0 rows, session holds 1 to 4"),
    "too many rows": ({"rows": [0] * 5, "logits": "none"}, "5 rows, session holds 1 to 4"),
    "keep float alone": ({"keep": 2.5, "tokens": [[1]]}, "keep must be integers"),
    "keep text": ({"keep": "3", "tokens": [[1]]}, "keep must be integers"),
    "rows float": ({"rows": [0.0], "tokens": [[1]]}, "rows must be integers"),
    "path without tree": ({"path": [[0]], "tokens": [[1]]}, "no draft tree is pending"),
    "parent of itself": ({"tokens": [[1, 2]], "parents": [[-1, 1]]}, "parent 1 of node 1"),
    "parent after": ({"tokens": [[1, 2]], "parents": [[1, -1]]}, "parent 1 of node 0"),
    "parent -2": ({"tokens": [[1]], "parents": [[-2]]}, "parent -2 of node 0"),
    "parents shape": ({"tokens": [[1, 2]], "parents": [[-1]]}, r"parents \(1, 1\), expected"),
    "parents of a block": (
        {"tokens": [[1]], "parents": [[-1]], "causal": False},
        "a draft tree is causal",
    ),
    "parents of soft tokens": (
        {"embeds": np.zeros((1, 1, D)), "parents": [[-1]]},
        "made of token ids",
    ),
    "tokens and embeds": (
        {"tokens": [[1]], "embeds": np.zeros((1, 1, D))},
        "tokens or embeds, not both",
    ),
    "embeds flat": ({"embeds": np.zeros((1, D))}, r"embeds \(1, 8\), expected \(1, n, 8\)"),
    "embeds width": ({"embeds": np.zeros((1, 1, D + 1))}, r"embeds \(1, 1, 9\)"),
    "embeds rows": ({"embeds": np.zeros((2, 1, D))}, r"embeds \(2, 1, 8\)"),
    "no embeds": ({"embeds": np.zeros((1, 0, D))}, "nothing to append"),
    "nothing to return": ({}, "nothing to append, so there is nothing to return"),
    "no tokens": ({"tokens": [[]]}, "nothing to append"),
    "hidden of nothing": ({"logits": "none", "hidden": (0,)}, "nothing to append"),
    "hidden too deep": ({"tokens": [[1]], "hidden": (L + 1,)}, r"hidden 3 outside 0\.\.2"),
    "hidden negative": ({"tokens": [[1]], "hidden": (-1,)}, "hidden -1 outside"),
    "attention too deep": ({"tokens": [[1]], "attentions": (L,)}, r"attentions 2 outside 0\.\.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_argument_is_named_and_nothing_runs(name: str) -> None:
    fields, message = REFUSED[name]
    session = opened()
    calls = session.model.calls["forward"]  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=message):
        session.forward(Forward(**{"keep": 3, **fields}))
    assert session.model.calls["forward"] == calls  # type: ignore[attr-defined]
    assert session.lengths.tolist() == [3]
    assert session.row_tokens().tolist() == [1, 2, 3]


PATHS: dict[str, tuple[dict[str, Any], str]] = {
    "rows of path": ({"path": [[0], [1]]}, "path for 2 rows, expected 1"),
    "flat path": ({"path": [0]}, r"path must have 2 dimension\(s\)"),
    "node out of range": ({"path": [[4]]}, r"path 4 outside 0\.\.3"),
    "starts below the root": ({"path": [[2]]}, "not a chain from a root"),
    "skips a node": ({"path": [[0, 3]]}, "not a chain from a root"),
    "goes up": ({"path": [[2, 0]]}, "not a chain from a root"),
    "two roots": ({"path": [[0, 1]]}, "not a chain from a root"),
    "left padding": ({"path": [[-1, 0]]}, "only to the right of a path"),
    "keep below the tree": ({"keep": 2, "path": [[0]]}, "keep equal to where its tree began"),
    "keep inside the tree": ({"keep": 4}, r"keep \[4\] outside 0\.\.\[3\]"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_bad_path_is_named_and_the_tree_stays(name: str) -> None:
    fields, message = PATHS[name]
    session = opened()
    # 0 - 2 - 3 and 1
    session.forward(Forward(keep=3, tokens=[[4, 5, 6, 7]], parents=[[-1, -1, 0, 2]]))
    with pytest.raises(UsageError, match=message):
        session.forward(Forward(**{"keep": 3, "tokens": [[1]], **fields}))
    session.forward(Forward(keep=3, path=[[0, 2, 3]], logits="none"))
    assert session.row_tokens().tolist() == [1, 2, 3, 4, 6, 7]


USES: dict[Capability, dict[str, Any]] = {
    C.FORK: {"rows": [0], "tokens": [[1]]},
    C.TREE: {"tokens": [[1]], "parents": [[-1]]},
    C.HIDDEN: {"tokens": [[1]], "hidden": (0,)},
    C.ATTENTIONS: {"tokens": [[1]], "attentions": (0,)},
    C.EMBEDS: {"embeds": np.zeros((1, 1, D))},
    C.BLOCK: {"tokens": [[1]], "causal": False},
}


@pytest.mark.parametrize("flag", USES, ids=lambda c: c.name)
def test_what_was_not_named_on_opening_is_refused(flag: Capability) -> None:
    assert Forward(keep=0, **USES[flag]).needs() & flag
    session = toy().session(needs=ALL & ~flag)
    with pytest.raises(UsageError, match=f"opened without {flag.name}; name them in needs="):
        session.forward(Forward(keep=0, **USES[flag]))
    assert session.lengths.tolist() == [0]


@pytest.mark.parametrize("flag", USES, ids=lambda c: c.name)
def test_what_the_model_lacks_is_refused_on_opening(flag: Capability) -> None:
    with pytest.raises(CapabilityError, match=f"session needs {flag.name} from 'target'"):
        toy(without=flag).session(needs=flag)


@pytest.mark.parametrize(
    ("flag", "logits"), [(C.LAST_LOGITS, "last"), (C.ALL_LOGITS, "all")], ids=["last", "all"]
)
def test_logits_the_model_lacks_are_refused(flag: Capability, logits: Any) -> None:
    session = toy(without=flag).session()
    with pytest.raises(CapabilityError, match=f"forward needs {flag.name}"):
        session.forward(Forward(keep=0, tokens=[[1]], logits=logits))
    session.forward(Forward(keep=0, tokens=[[1]], logits="none"))


@pytest.mark.parametrize("width", [1, 2])
def test_going_back_needs_rollback_but_emptying_does_not(width: int) -> None:
    session = TableModel(without=C.ROLLBACK).session()
    tokens = np.array([[4, 5]])[:, :width]
    session.forward(Forward(keep=0, tokens=np.array([[1, 2, 3]])))
    with pytest.raises(CapabilityError, match="forward needs ROLLBACK"):
        session.forward(Forward(keep=1, tokens=tokens))
    session.forward(Forward(keep=3, tokens=tokens))
    session.forward(Forward(keep=0, tokens=tokens))
    assert session.lengths.tolist() == [width]


def test_missing_capability_names_the_engines_that_have_it() -> None:
    with pytest.raises(CapabilityError) as caught:
        toy(without=C.HIDDEN | C.HEAD).require(C.HIDDEN | C.HEAD | C.FORK, who="Dola")
    assert str(caught.value) == (
        "Dola needs HIDDEN and HEAD from 'target'; toy-transformer on toy offers none; "
        "backends that do: llamacpp, torch, mlx"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": [[1] * 14]},
        {"tokens": [[1] * 14], "parents": [[-1, *range(13)]]},
        {"embeds": np.zeros((1, 14, D))},
    ],
    ids=["tokens", "tree", "embeds"],
)
def test_overflow_is_raised_before_the_cache_is_touched(fields: dict[str, Any]) -> None:
    session = opened()
    with pytest.raises(ContextOverflow, match="17 tokens do not fit into 16"):
        session.forward(Forward(keep=3, **fields))
    assert session.lengths.tolist() == [3]
    session.forward(Forward(keep=3, tokens=[[1] * 13]))
    with pytest.raises(ContextOverflow, match="17 tokens"):
        session.forward(Forward(keep=16, tokens=np.array([[1]])))
    assert session.lengths.tolist() == [16]


def test_rows_must_fit() -> None:
    with pytest.raises(UsageError, match="max_rows must be at least 1"):
        toy().session(max_rows=0)


# -- accepted -----------------------------------------------------------------------------------


def test_plan_of_ragged_rows() -> None:
    session = opened([[1, 2, 3], [4, 5, 6]])
    plan = planned(session, keep=[3, 1], tokens=[[7, 8, 9], [7, -1, -1]])
    assert plan.identity
    assert (plan.batch, plan.width) == (2, 3)
    assert plan.base.tolist() == plan.start.tolist() == [3, 1]
    assert plan.counts.tolist() == [3, 1]
    assert plan.end.tolist() == [6, 2]
    assert plan.positions.tolist() == [[3, 4, 5], [1, 0, 0]]
    assert plan.tokens is not None
    assert plan.tokens.dtype == np.int64


def test_plan_of_moved_rows() -> None:
    session = opened([[1, 2, 3], [4, 5, 6]])
    plan = planned(session, rows=[1, 1, 0], tokens=[[7], [8], [-1]])
    assert not plan.identity
    assert plan.rows.tolist() == [1, 1, 0]
    assert plan.counts.tolist() == [1, 1, 0]
    # The first row alone keeps its index, but the second one goes: rows must change.
    assert not planned(session, rows=[0], tokens=[[7]]).identity


def test_plan_of_a_tree_and_of_the_branch_kept_from_it() -> None:
    session = opened()
    parents = [[-1, 0, 0, 1, -1]]
    plan = planned(session, tokens=[[4, 5, 6, 7, -1]], parents=parents)
    assert plan.positions.tolist() == [[3, 4, 4, 5, 0]]
    assert plan.ancestors is not None
    assert plan.ancestors[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    session.forward(Forward(keep=3, tokens=[[4, 5, 6, 7, -1]], parents=parents))
    assert session.lengths.tolist() == [3]
    plan = planned(session, path=[[0, 1, -1]], tokens=[[8]])
    assert plan.base.tolist() == [3]
    assert plan.start.tolist() == [5]
    assert plan.positions.tolist() == [[5]]


def test_record_follows_rows_trees_and_soft_tokens() -> None:
    session = opened([[1, 2, 3], [4, 5, 6]])
    tree = {"tokens": [[7, 8, -1], [9, 10, 11]], "parents": [[-1, 0, -1], [-1, -1, 1]]}
    session.forward(Forward(keep=[3, 2], **tree))
    assert session.lengths.tolist() == [3, 2]
    # The rows swap places while each keeps a branch of its own tree.
    session.forward(Forward(keep=[2, 3], rows=[1, 0], path=[[1, 2], [0, -1]], tokens=[[1], [-1]]))
    assert session.row_tokens(0).tolist() == [4, 5, 10, 11, 1]
    assert session.row_tokens(1).tolist() == [1, 2, 3, 7]
    session.forward(Forward(keep=[5, 4], embeds=np.zeros((2, 2, D))))
    assert session.row_tokens(1).tolist() == [1, 2, 3, 7, -1, -1]
    session.forward(Forward(keep=1, rows=[1], logits="none"))
    assert session.batch == 1
    assert session.row_tokens().tolist() == [1]


def test_a_tree_that_is_not_named_is_dropped() -> None:
    session = opened()
    session.forward(Forward(keep=3, tokens=[[4, 5]], parents=[[-1, 0]]))
    session.forward(Forward(keep=3, tokens=[[6]]))
    assert session.row_tokens().tolist() == [1, 2, 3, 6]
    with pytest.raises(UsageError, match="no draft tree is pending"):
        session.forward(Forward(keep=4, path=[[0]], logits="none"))


def test_common_prefix_stops_at_soft_tokens() -> None:
    session = opened([[1, 2, 3], [4, 5, 6]])
    assert session.common_prefix([1, 2, 5]) == 2
    assert session.common_prefix([1, 2, 3, 4, 5]) == 3
    assert session.common_prefix([4], row=1) == 1
    assert session.common_prefix([]) == 0
    session.forward(Forward(keep=1, embeds=np.zeros((2, 1, D))))
    assert session.common_prefix([1, -1]) == 1


def test_tokens_of_other_integer_types_and_libraries(xp: Any) -> None:
    session = opened()
    for values in (xp.asarray([[1, 2]]), np.array([[1, 2]], np.uint8), ((1, 2),)):
        plan = planned(session, tokens=values)
        assert plan.tokens is not None
        assert plan.tokens.tolist() == [[1, 2]]


# -- failures while running ----------------------------------------------------------------------


class Failing(Session):
    """Raises as often as told, in the middle of a call."""

    failures = 0

    def _run(self, plan: Plan) -> Output:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("engine")
        return Output(logits=np.zeros((plan.batch, V), np.float32))


def test_a_failed_call_leaves_the_records_alone() -> None:
    session = Failing(TableModel(), max_rows=2, needs=C.FORK, context=16)
    session.forward(Forward(keep=0, tokens=[[1, 2, 3]]))
    session.failures = 1
    with pytest.raises(RuntimeError, match="engine"):
        session.forward(Forward(keep=1, rows=[0, 0], tokens=[[4], [5]]))
    assert session.batch == 1
    assert session.row_tokens().tolist() == [1, 2, 3]
    session.forward(Forward(keep=3, tokens=[[4]]))
    assert session.row_tokens().tolist() == [1, 2, 3, 4]


def test_closed_and_busy_sessions_refuse() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Failing):
        def _run(self, plan: Plan) -> Output:
            entered.set()
            assert leave.wait(10)
            return super()._run(plan)

    session = Slow(TableModel(), max_rows=1, needs=C.NONE, context=16)
    ask = Forward(keep=0, tokens=[[1]])
    thread = threading.Thread(target=session.forward, args=(ask,))
    thread.start()
    assert entered.wait(10)
    with pytest.raises(UsageError, match="used by two threads at once"):
        session.forward(ask)
    leave.set()
    thread.join()
    session.forward(Forward(keep=1, tokens=[[2]]))
    with session:
        pass
    session.close()
    with pytest.raises(UsageError, match="already closed"):
        session.forward(ask)


def test_capability_names() -> None:
    assert C.NONE.names() == []
    assert (C.FORK | C.LAST_LOGITS).names() == ["LAST_LOGITS", "FORK"]
    assert ALL.names() == [flag.name for flag in Capability]


def test_an_open_block_is_no_prefix_until_it_is_fed_causally() -> None:
    """A block that was cut short (a cancel) must not pass for tokens of the next prompt."""
    session = opened()
    block = {"keep": 3, "tokens": [[4, 5]]}
    session.forward(Forward(**block, causal=False))
    assert session.row_tokens().tolist() == [1, 2, 3, -1, -1]
    assert session.common_prefix([1, 2, 3, 4, 5]) == 3
    session.forward(Forward(**block))
    assert session.common_prefix([1, 2, 3, 4, 5]) == 5
