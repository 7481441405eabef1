"""Value-guided beam search against its definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TableModel, TableSession, ToyTransformer

from steersman.core.decode import Sample, ValueBeam
from steersman.core.decode.events import Event, Finished, Note, TokenEvent
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request
from steersman.core.errors import CapabilityError, UsageError
from steersman.core.logits import Chain, Penalties, Temperature, TopK
from steersman.core.model import Capability, Forward, Model, Output, Plan
from steersman.core.profile import load_profile
from steersman.core.values import ValueHead, ValueShape, init_weights, save_value_head

PROMPT = (0, 1, 2)
GOAL = 5  # a text is right if this token stands before its end
COOL = Chain((TopK(k=6), Temperature(t=0.8)))


class PairModel(TableModel):
    """A table of order 1 whose hidden state is the pair of the last two tokens, one-hot."""

    def __init__(self, **options: Any) -> None:
        super().__init__(order=1, **options)
        self.capabilities |= Capability.HIDDEN | Capability.HEAD
        self.info = replace(self.info, width=self.tokenizer.vocab_size**2)

    def session(self, **options: Any) -> PairSession:
        options["context"] = options.get("context") or self.info.context
        return PairSession(self, **{"max_rows": 1, "needs": Capability.NONE, **options})

    def norm(self, hidden: Any) -> Any:
        return hidden

    def place(self, text: list[int]) -> int:
        return int(text[-2]) * self.tokenizer.vocab_size + int(text[-1])


class PairSession(TableSession):
    def _run(self, plan: Plan) -> Output:
        out = super()._run(plan)
        if not plan.hidden:
            return out
        hidden = np.full((plan.batch, plan.width, self.model.info.width), 7.0, np.float32)
        for b, count in enumerate(plan.counts):
            for i in range(int(count)):
                text = self.rows[b][: len(self.rows[b]) - int(count) + i + 1]
                hidden[b, i] = 0
                hidden[b, i, self.model.place(text)] = 1  # type: ignore[attr-defined]
        return Output(logits=out.logits, hidden=dict.fromkeys(plan.hidden, hidden))


def exact_values(model: TableModel) -> np.ndarray:
    """Return P(right) after every token, text without limit: the solution of v = r + P v."""
    size = model.tokenizer.vocab_size
    (eos,) = model.tokenizer.eos_ids
    step = model.table[:size].copy()
    reward = np.zeros(size)
    reward[GOAL] = step[GOAL, eos]
    step[:, eos] = 0
    step[eos] = 0
    return np.linalg.solve(np.eye(size) - step, reward)


def head_file(model: TableModel, values: np.ndarray, path: Path) -> str:
    """Write a linear head: ``values[b]`` for the pair (a, b); for (a, end), whether a is right."""
    size = model.tokenizer.vocab_size
    (eos,) = model.tokenizer.eos_ids
    table = np.tile(values, (size, 1))
    table[:, eos] = np.arange(size) == GOAL
    shape = ValueShape(features=size**2)
    weights = init_weights(shape, seed=0) | {"weight": table.reshape(-1).astype(np.float32)}
    save_value_head(ValueHead(shape=shape, weights=weights, layer=0, model=""), path)
    return str(path)


@pytest.fixture
def model() -> PairModel:
    return PairModel(seed=4)


@pytest.fixture
def guided(model: PairModel, tmp_path: Path) -> str:
    return head_file(model, exact_values(model), tmp_path / "exact.safetensors")


@pytest.fixture
def blind(model: PairModel, tmp_path: Path) -> str:
    path = tmp_path / "constant.safetensors"
    shape = ValueShape(features=model.info.width)
    head = ValueHead(
        shape=shape, weights=init_weights(shape, seed=0, offset=0.5), layer=0, model=""
    )
    save_value_head(head, path)
    return str(path)


def run(
    model: Model,
    strategy: Any,
    *,
    seed: int = 0,
    max_tokens: int = 12,
    prompt: tuple[int, ...] = PROMPT,
    sessions: Sessions | None = None,
    **options: Any,
) -> list[Event]:
    held = Sessions(model) if sessions is None else sessions
    request = Request(
        prompt=np.array(prompt),
        models=held.models,
        eos_ids=options.pop("eos", model.tokenizer.eos_ids),
        max_tokens=max_tokens,
        context=model.info.context,
        **options,
    )
    return list(decode(strategy, held.prepare(strategy, name="t"), request, Rng(seed)))


def ids(events: list[Event]) -> tuple[int, ...]:
    assert isinstance(events[-1], Finished)
    return events[-1].token_ids


def notes(events: list[Event]) -> list[Any]:
    return [e.values["value_beam"] for e in events if isinstance(e, Note)]


def success(events: list[Event]) -> bool:
    end = events[-1]
    assert isinstance(end, Finished)
    return end.reason == "eos" and (*PROMPT, *end.token_ids)[-1] == GOAL


# -- against plain sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [Chain(), COOL, Chain((Penalties(repetition=1.3),))])
@pytest.mark.parametrize("options", [{}, {"step_tokens": 3}, {"dedup": True}])
def test_one_candidate_is_sampling(
    model: PairModel, guided: str, chain: Chain, options: Any
) -> None:
    for seed in range(5):
        expected = ids(run(model, Sample(chain=chain), seed=seed))
        for file in (guided, None):
            one = ValueBeam(value_file=file, candidates=1, beams=1, chain=chain, **options)
            assert ids(run(model, one, seed=seed)) == expected


@pytest.mark.parametrize(("step_tokens", "seeds"), [(1, 100), (4, 25)])
def test_a_constant_value_keeps_the_first_candidates(
    model: PairModel, blind: str, step_tokens: int, seeds: int
) -> None:
    right = 0
    for seed in range(seeds):
        strategy = ValueBeam(value_file=blind, candidates=4, beams=2, step_tokens=step_tokens)
        events = run(model, strategy, seed=seed, max_tokens=40)
        assert all(note["kept"] == [0, 1] for note in notes(events))
        # The first candidate of the first text draws as a text alone does.
        if seed < 25:
            assert ids(events) == ids(run(model, Sample(), seed=seed, max_tokens=40))
        right += success(events)
    value = float(exact_values(model)[PROMPT[-1]])
    # Four standard deviations: wrong for one in sixteen thousand sets of seeds.
    assert right == pytest.approx(seeds * value, abs=4 * np.sqrt(seeds * value * (1 - value)))


def test_true_values_find_more_right_texts(model: PairModel, guided: str) -> None:
    plain = float(exact_values(model)[PROMPT[-1]])
    strategy = ValueBeam(value_file=guided, candidates=8, beams=2)
    found = np.mean([success(run(model, strategy, seed=s, max_tokens=40)) for s in range(40)])
    assert plain < 0.5
    assert found >= 0.95


# -- against the definition ------------------------------------------------------------------------


def by_definition(
    model: PairModel, values: np.ndarray, strategy: ValueBeam, seed: int, max_tokens: int
) -> tuple[tuple[int, ...], list[list[float]]]:
    """Return the text, and the values of what each step kept, by a plain search over texts."""
    (eos,) = model.tokenizer.eos_ids
    rng, share = Rng(seed), strategy.candidates // strategy.beams

    def ended(text: tuple[int, ...]) -> bool:
        return bool(text) and (text[-1] == eos or len(text) == max_tokens)

    def value(text: tuple[int, ...]) -> float:
        whole = (*PROMPT, *text)
        return float(whole[-2] == GOAL) if whole[-1] == eos else float(values[whole[-1]])

    beams: list[tuple[int, ...]] = [()] * strategy.beams
    kept_values = []
    while not all(map(ended, beams)):
        pool = []
        for place, beam in enumerate(beams):
            if ended(beam):
                pool.append(beam)
                continue
            for i in range(share):
                text, row = beam, place * share + i
                for _ in range(strategy.step_tokens):
                    probs = model.probs([*PROMPT, *text])
                    u = rng.uniform(row, len(PROMPT) + len(text))
                    token = int(np.searchsorted(np.cumsum(probs), u, side="right"))
                    text = (*text, token)
                    piece = model.tokenizer.token_bytes(token)
                    if ended(text) or (strategy.delimiter and strategy.delimiter.encode() in piece):
                        break
                pool.append(text)
        first, later = [], []
        for text in pool:
            (later if strategy.dedup and text in first else first).append(text)
        # Python's sort is stable too.
        ranked = sorted(first, key=lambda t: -value(t)) + sorted(later, key=lambda t: -value(t))
        beams = ranked[: strategy.beams]
        kept_values.append([value(t) for t in beams])
    best = max(beams, key=value)
    return tuple(t for t in best if t != eos), kept_values


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize(("step_tokens", "delimiter"), [(1, ""), (3, ""), (6, "b")])
def test_search_by_definition(
    model: PairModel, guided: str, dedup: bool, step_tokens: int, delimiter: str
) -> None:
    if delimiter:
        assert sum(b"b" in model.tokenizer.token_bytes(i) for i in range(13)) in range(1, 6)
    lengths = set()
    for seed in range(12):
        strategy = ValueBeam(
            value_file=guided, candidates=6, beams=3, step_tokens=step_tokens,
            delimiter=delimiter, dedup=dedup,
        )  # fmt: skip
        events = run(model, strategy, seed=seed, max_tokens=7)
        text, values = by_definition(model, exact_values(model), strategy, seed, 7)
        assert ids(events) == text
        assert [note["values"] for note in notes(events)] == [
            pytest.approx(row, abs=1e-5) for row in values
        ]
        lengths.add(len(text))
    assert len(lengths) > 1  # texts that ended were carried beside others


def test_without_a_head_the_mean_logprob_decides(model: PairModel) -> None:
    for seed in range(6):
        events = run(model, ValueBeam(candidates=4, beams=2), seed=seed, logprobs=0)
        text, history, total = list(ids(events)), list(PROMPT), []
        if events[-1].reason == "eos":  # type: ignore[union-attr]
            text += model.tokenizer.eos_ids
        for token in text:
            total.append(np.log(model.probs(history)[token]))
            history.append(token)
        assert notes(events)[-1]["values"][0] == pytest.approx(np.mean(total), abs=1e-5)
        tokens = [e for e in events if isinstance(e, TokenEvent)]
        assert all(t.raw_logprob is not None for t in tokens)


def test_calls_and_limits(model: PairModel, guided: str) -> None:
    strategy = ValueBeam(value_file=guided, candidates=4, beams=2)
    model.calls.clear()
    run(model, strategy, max_tokens=5, eos=frozenset())
    assert model.calls["forward"] == 1 + 5
    assert model.calls["tokens"] == len(PROMPT) + 4 * 5
    assert ids(run(model, strategy, max_tokens=0)) == ()
    assert len(ids(run(model, strategy, max_tokens=1, eos=frozenset()))) == 1


def test_bad_settings(model: PairModel, tmp_path: Path, guided: str) -> None:
    for options, said in (
        ({"candidates": 0}, "candidates must be in"),
        ({"candidates": 5, "beams": 2}, "beams must divide"),
        ({"step_tokens": 0}, "step_tokens must be"),
    ):
        with pytest.raises(UsageError, match=said):
            ValueBeam(**options)
    with pytest.raises(CapabilityError, match="HIDDEN"):
        run(TableModel(), ValueBeam(value_file=guided))
    with pytest.raises(UsageError, match="made for layer 0 of a model of width"):
        run(ToyTransformer(), ValueBeam(value_file=guided))
    profile = tmp_path / "mine.yaml"
    profile.write_text("strategy:\n  value_beam: {value_file: exact.safetensors}\n")
    assert load_profile(str(profile)).strategy.value_file == guided


# -- caches and libraries --------------------------------------------------------------------------


def random_head(model: Model, path: Path, *, width: int = 0) -> str:
    rng = np.random.default_rng(3)
    shape = ValueShape(features=model.info.width, width=width)
    weights = {
        name: rng.normal(size=size).astype(np.float32) for name, size in shape.parameters.items()
    }
    head = ValueHead(
        shape=shape, weights=weights, layer=model.info.layers, model=model.info.fingerprint
    )
    save_value_head(head, path)
    return str(path)


@pytest.mark.parametrize("step_tokens", [1, 3])
def test_every_library_finds_the_same_text(lib: Any, tmp_path: Path, step_tokens: int) -> None:
    prompt = tuple(b"the sea")
    texts = []
    for xp in (lib.xp, np):
        model = ToyTransformer(xp)
        file = random_head(model, tmp_path / "h.safetensors", width=5)
        strategy = ValueBeam(
            value_file=file, candidates=4, beams=2, step_tokens=step_tokens, delimiter="e",
            chain=COOL,
        )  # fmt: skip
        texts.append(ids(run(model, strategy, prompt=prompt, max_tokens=6)))
    assert texts[0] == texts[1]


def test_afterwards_the_cache_is_as_good_as_fresh(tmp_path: Path) -> None:
    model = ToyTransformer()
    strategy = ValueBeam(
        value_file=random_head(model, tmp_path / "h.safetensors"), candidates=6, beams=2,
        step_tokens=2, dedup=True,
    )  # fmt: skip
    prompt = tuple(b"once")
    with Sessions(model) as sessions:
        text = ids(run(model, strategy, prompt=prompt, sessions=sessions))
        turn = (*prompt, *text, *b" and")
        again = ids(run(model, strategy, prompt=turn, sessions=sessions, seed=2))
        assert again == ids(run(model, strategy, prompt=turn, seed=2))
        session = sessions.prepare(Sample(), name="t")["target"]
        for row in range(session.batch):
            held = session.row_tokens(row)
            rows = np.array([row])
            kept = session.forward(
                Forward(keep=len(held) - 1, tokens=held[None, -1:], rows=rows)
            ).logits
            with model.session(max_rows=1, needs=Capability.FORK) as fresh:
                expected = fresh.forward(Forward(keep=0, tokens=held[None])).logits
            np.testing.assert_array_equal(kept, expected)
            break  # naming one row drops the others


@pytest.mark.weights
def test_on_every_engine(engine_model: Model, tmp_path: Path) -> None:
    file = random_head(engine_model, tmp_path / "h.safetensors")
    strategy = load_profile("value-beam").override(
        {"value_beam.value_file": file, "value_beam.candidates": 4}
    ).bind(engine_model.tokenizer).strategy  # fmt: skip
    prompt = tuple(engine_model.tokenizer.encode("2 + 2 ="))
    events = run(engine_model, strategy, prompt=prompt, max_tokens=3)
    assert events[-1].reason in ("eos", "length")  # type: ignore[union-attr]
    values = [note["values"] for note in notes(events)]
    # The last value again, from the text computed afresh.
    text = [*prompt, *ids(events)]
    if events[-1].reason == "length":  # type: ignore[union-attr]
        needs = Capability.HIDDEN | Capability.HEAD
        with engine_model.session(needs=needs) as session:
            layer = engine_model.info.layers
            out = session.forward(Forward(keep=0, tokens=[text], hidden=(layer,)))
            fresh = strategy.head.values(engine_model, out.hidden[layer][0, -1:, :])[0]
        assert max(values[-1]) == pytest.approx(float(fresh), rel=1e-2, abs=0.1)
