"""How beam search ends: at the limit, and with many end tokens among the candidates."""

from __future__ import annotations

import numpy as np
from toys import TableModel

from steersman.core.decode import BeamSearch
from steersman.core.decode.events import Finished
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request

START, A, B, X = 0, 1, 2, 3


def end(model: TableModel, beams: int, eos: frozenset[int], max_tokens: int) -> Finished:
    strategy = BeamSearch(beams=beams)
    with Sessions(model) as sessions:
        request = Request(
            prompt=np.array([START]),
            models=sessions.models,
            eos_ids=eos,
            max_tokens=max_tokens,
            context=model.info.context,
        )
        ready = sessions.prepare(strategy, name="beam")
        *_, last = decode(strategy, ready, request, Rng(0))
    assert isinstance(last, Finished)
    return last


def table(model: TableModel, rows: dict[int, dict[int, float]]) -> TableModel:
    """Return a model with these probabilities after each token; uniform elsewhere."""
    vocab = model.tokenizer.vocab_size
    values = np.full((vocab + 1, vocab), 1 / vocab)
    for before, chances in rows.items():
        values[before] = (1 - sum(chances.values())) / (vocab - len(chances))
        for token, chance in chances.items():
            values[before, token] = chance
    return TableModel(table=values)


def test_at_the_limit_a_live_text_beats_ended_ones_that_score_less() -> None:
    (eos,) = TableModel().tokenizer.eos_ids
    model = table(
        TableModel(),
        {
            START: {eos: 0.40, A: 0.35, B: 0.24},
            A: {X: 0.95},
            B: {eos: 0.95},
        },
    )
    # Mean log-probabilities: "" (ended) -0.92, B (ended) -0.74, A X (cut) -0.55. Both places for
    # ended texts are taken, and the best text is the one that is still going on.
    last = end(model, beams=2, eos=frozenset({eos}), max_tokens=2)
    assert last.token_ids == (A, X)
    assert last.reason == "length"


def test_all_beams_go_on_however_many_end_tokens_lead() -> None:
    vocab = TableModel().tokenizer.vocab_size
    ends = frozenset(range(vocab - 4, vocab))
    # Ends hold four of the six best places; a third text must still be found to go on with.
    chances = {token: 0.1 for token in ends} | {A: 0.3, B: 0.25, X: 0.04}
    sure = {t: {t: 0.999} for t in (A, B, X)}
    model = table(TableModel(), {START: chances, **sure})
    last = end(model, beams=3, eos=ends, max_tokens=6)
    assert last.token_ids == (A,) * 6
    # The prompt, then five calls of three rows each.
    assert model.calls["tokens"] == 1 + 5 * 3
