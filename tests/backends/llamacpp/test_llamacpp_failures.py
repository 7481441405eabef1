"""The llama.cpp adapter after calls that fail, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steersman.core.errors import (
    BackendError,
    UsageError,
)
from steersman.core.model import Capability as C
from steersman.core.model import Forward

pytest.importorskip("llama_cpp")
from steersman.backends.llamacpp.handles import Context

from .llamacpp_support import divergence, fresh, last, padded

pytestmark = pytest.mark.weights


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
