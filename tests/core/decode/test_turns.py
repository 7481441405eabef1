"""One conversation, many strategies: what an earlier text left in the cache changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from toys import ToyTransformer

from steersman.core.decode import STRATEGIES, BeamSearch, DoLa
from steersman.core.decode.events import Finished
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request


def turn(sessions: Sessions, name: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
    strategy = STRATEGIES[name]()
    request = Request(
        prompt=np.array(prompt),
        models=sessions.models,
        eos_ids=frozenset(),
        max_tokens=3,
        context=sessions.target.info.context,
    )
    *_, last = decode(strategy, sessions.prepare(strategy, name=name), request, Rng(3))
    assert isinstance(last, Finished)
    return last.token_ids


@pytest.mark.parametrize("second", STRATEGIES)
def test_any_strategy_after_any_other_equals_a_fresh_start(second: str) -> None:
    model = ToyTransformer(layers=4)
    roles = {role: model for cls in STRATEGIES.values() for role in ("target", *cls().requires)}
    begun = tuple(b"hi!")
    with Sessions(roles) as fresh:
        expected = turn(fresh, second, begun[:1])
    for first in STRATEGIES:
        with Sessions(roles) as kept, Sessions(roles) as fresh:
            longer = (*begun, *turn(kept, first, begun), *b" and")
            assert turn(kept, second, longer) == turn(fresh, second, longer), first
            # Back to the very first token, of which a strategy may want hidden states too.
            assert turn(kept, second, begun[:1]) == expected, first


def test_going_to_and_fro_reopens_nothing() -> None:
    model = ToyTransformer(layers=4)
    wide, deep = BeamSearch(beams=3), DoLa()
    with Sessions(model) as sessions:
        sessions.prepare(wide, name="beam")
        kept = sessions.prepare(deep, name="dola")["target"]
        assert sessions.prepare(wide, name="beam")["target"] is kept
        assert sessions.prepare(deep, name="dola")["target"] is kept
