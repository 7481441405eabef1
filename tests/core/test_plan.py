"""The short way of planning one token must agree with the general one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from toys import TableModel

from steersman.core.errors import ContextOverflow, UsageError
from steersman.core.model import Forward, Plan


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize("keep", [0, 2, 3])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_one_token_is_planned_like_any_other_call(keep: int, dtype: Any) -> None:
    session = TableModel().session()
    session.forward(Forward(keep=0, tokens=[[1, 2, 3]]))
    ask = Forward(keep=keep, tokens=np.array([[4]], dtype))
    short = session._plan_token(ask)
    session._plan_token = lambda ask: None  # type: ignore[method-assign, assignment]
    general = session._plan(ask)
    assert short is not None
    for field in fields(Plan):
        assert _same(getattr(short, field.name), getattr(general, field.name)), field.name
    assert short.width == general.width == 1


@pytest.mark.parametrize(
    "ask",
    [
        Forward(keep=4, tokens=np.array([[1]])),
        Forward(keep=-1, tokens=np.array([[1]])),
        Forward(keep=3, tokens=np.array([[-1]])),
        Forward(keep=3, tokens=np.array([[10**9]])),
        Forward(keep=3, tokens=np.array([[1.5]])),
        Forward(keep=3, tokens=np.array([[True]])),
    ],
)
def test_a_bad_token_is_left_to_the_general_way(ask: Forward) -> None:
    session = TableModel().session()
    session.forward(Forward(keep=0, tokens=[[1, 2, 3]]))
    assert session._plan_token(ask) is None
    with pytest.raises(UsageError):
        session.forward(ask)
    assert session.row_tokens().tolist() == [1, 2, 3]


def test_one_token_beyond_the_context_is_an_error() -> None:
    session = TableModel().session(context=3)
    session.forward(Forward(keep=0, tokens=[[1, 2, 3]]))
    with pytest.raises(ContextOverflow):
        session.forward(Forward(keep=3, tokens=np.array([[1]])))
