"""CLUE: the paper's formulas on worked numbers, their invariances, and reading real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import ToyTokenizer, ToyTransformer

from steersman.core.array import to_numpy
from steersman.core.errors import Cancelled, ContextOverflow, InvalidInput, UsageError
from steersman.core.model import Capability, Forward
from steersman.core.verification import (
    Centroids,
    DeltaReader,
    Experience,
    Span,
    TraceRule,
    encode_trace,
    final_answer,
    layer_distance,
    majority,
    nearest_first,
    read_centroids,
)

RIGHT = np.array([[[1.5, 0], [0, 2.5]], [[0.5, 0], [0, 1.5]]])
WRONG = np.array([[[-1.5, 0.5], [0, -2]], [[-0.5, -0.5], [0, -2]]])
NEW = np.array([[0.2, 0.1], [0.3, -0.4]], np.float32)
CANDIDATES = [
    ("7", [[0.9, 0.1], [0.1, 1.8]], 0.182514),
    ("5", [[0.2, 0.1], [0.3, -0.4]], 1.612452),
    ("5", [[-0.8, 0], [0.2, -1.5]], 2.652855),
    ("7", [[0.5, 0.5], [0, 1]], 0.853553),
    ("5", [[0, 0], [0, 0.4]], 1.3),
]


def fitted(right: Any, wrong: Any) -> Centroids:
    experience = Experience()
    for kind, deltas in ((True, right), (False, wrong)):
        for delta in deltas:
            experience.add(np.asarray(delta), correct=kind)
    return experience.centroids()


def random_sets(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(7, 3, 5)) + 0.3, rng.normal(size=(5, 3, 5)), rng.normal(size=(20, 3, 5))


def test_worked_numbers() -> None:
    held = fitted(RIGHT, WRONG)
    np.testing.assert_allclose(held.success, [[1, 0], [0, 2]])
    np.testing.assert_allclose(held.failure, [[-1, 0], [0, -2]])
    found = held.judge(NEW)
    assert found.success == pytest.approx(1.612452, abs=1e-6)
    assert found.failure == pytest.approx(1.416021, abs=1e-6)
    assert not found.correct
    assert held.separation() == pytest.approx([2, 4])


def test_the_mean_over_layers_is_not_the_frobenius_norm() -> None:
    held = fitted(RIGHT, WRONG)
    delta = np.array([[-4, -1], [2, 2]], np.float32)
    found = held.judge(delta)
    assert (found.success, found.failure) == pytest.approx((3.549510, 3.817207), abs=1e-6)
    assert found.correct
    for centroid in (held.success, held.failure):
        assert np.linalg.norm(delta - centroid) == pytest.approx(5.477226, abs=1e-6)


def test_distance_on_every_library(lib: Any) -> None:
    held = fitted(RIGHT, WRONG)
    deltas = lib([d for _, d, _ in CANDIDATES])
    found = to_numpy(layer_distance(deltas, lib(held.success)))
    np.testing.assert_allclose(found, [d for _, _, d in CANDIDATES], atol=1e-6)
    scaled = to_numpy(layer_distance(deltas, lib(held.success), lib([2.0, 2.0])))
    np.testing.assert_allclose(scaled, found / 2, rtol=1e-6)


def test_reranking() -> None:
    held = fitted(RIGHT, WRONG)
    distances = [held.judge(np.array(d, np.float32)).success for _, d, _ in CANDIDATES]
    answers = [a for a, _, _ in CANDIDATES]
    order = nearest_first(distances)
    assert order == [0, 3, 4, 1, 2]
    assert answers[order[0]] == "7"
    everyone = majority(answers, range(5))
    nearest = majority(answers, order[:2])
    assert everyone is not None
    assert nearest is not None
    assert (answers[everyone], answers[nearest]) == ("5", "7")


def test_ties_and_candidates_that_cannot_vote() -> None:
    assert nearest_first([1.0, None, 1.0, 0.5, None]) == [3, 0, 2, 1, 4]
    assert majority(["a", "b", "b", "a"], [1, 0, 2, 3]) == 1  # two votes each: the best voter's
    assert majority([None, None], [0, 1]) is None
    assert majority([None, "x"], [0, 1]) == 1


def test_own_centroid_and_swapped_classes() -> None:
    right, wrong, new = random_sets()
    held, swapped = fitted(right, wrong), fitted(wrong, right)
    assert held.judge(held.success).success == 0
    assert held.judge(held.failure).failure == 0
    for delta in new.astype(np.float32):
        assert held.judge(delta).correct != swapped.judge(delta).correct
    tie = Centroids(success=-NEW, failure=NEW, scale=np.ones(2, np.float32), counts=(1, 1))
    assert not tie.judge(np.zeros_like(NEW)).correct


def test_running_sums_equal_batch_means_in_any_order() -> None:
    right, wrong, _ = random_sets()
    held, other = fitted(right, wrong), fitted(right[::-1], wrong[[3, 1, 0, 4, 2]])
    np.testing.assert_allclose(held.success, right.mean(0), atol=1e-6)
    np.testing.assert_allclose(held.failure, wrong.mean(0), atol=1e-6)
    np.testing.assert_allclose(other.success, held.success, atol=1e-6)
    np.testing.assert_allclose(other.failure, held.failure, atol=1e-6)
    within = [*((right - right.mean(0)) ** 2).sum(-1), *((wrong - wrong.mean(0)) ** 2).sum(-1)]
    np.testing.assert_allclose(held.scale, np.sqrt(np.mean(within, axis=0)), rtol=1e-5)


def test_invariances() -> None:
    right, wrong, new = random_sets()
    rng = np.random.default_rng(1)
    shift = rng.normal(size=(3, 5))
    turns = np.stack([np.linalg.qr(rng.normal(size=(5, 5)))[0] for _ in range(3)])
    base = fitted(right, wrong)
    moved = fitted(right + shift, wrong + shift)
    larger = fitted(3 * right, 3 * wrong)

    def turned(x: np.ndarray) -> np.ndarray:
        return np.einsum("...ld,lde->...le", x, turns)

    rotated = fitted(turned(right), turned(wrong))
    for delta in new:
        want = base.judge(delta.astype(np.float32))
        for held, seen, factor in (
            (moved, delta + shift, 1), (larger, 3 * delta, 3), (rotated, turned(delta), 1),
        ):  # fmt: skip
            got = held.judge(seen.astype(np.float32))
            assert got.success == pytest.approx(factor * want.success, rel=1e-5)
            assert got.failure == pytest.approx(factor * want.failure, rel=1e-5)
            assert got.correct == want.correct


def test_synthetic_classes() -> None:
    rng = np.random.default_rng(0)
    drawn = []
    for sign in (1, -1):
        deltas = rng.normal(size=(200, 4, 16))
        deltas[:, -1, 0] += sign
        drawn.append(deltas)
    (right, more_right), (wrong, more_wrong) = (np.split(deltas, 2) for deltas in drawn)
    for layers, want in ((slice(None), 0.84), (slice(-1, None), 0.86)):
        held = fitted(right[:, layers], wrong[:, layers])
        good = [held.judge(d[layers].astype(np.float32)).correct for d in more_right]
        bad = [not held.judge(d[layers].astype(np.float32)).correct for d in more_wrong]
        assert np.mean(good + bad) == pytest.approx(want)


def test_an_empty_class_is_refused() -> None:
    experience = Experience()
    with pytest.raises(InvalidInput, match="got 0 right and 0 wrong"):
        experience.centroids()
    experience.add(NEW, correct=True)
    with pytest.raises(InvalidInput, match="got 1 right and 0 wrong"):
        experience.centroids()


# -- spans ----------------------------------------------------------------------------------------


def split(rule: TraceRule, tokenizer: Any, prompt: str, response: str) -> tuple[bytes, bytes]:
    """Return what stands up to the first position, and between the two."""
    span = rule.locate(tokenizer, *encode_trace(tokenizer, prompt, response, rule))
    assert span is not None
    pieces = [tokenizer.token_bytes(int(t)) for t in span.tokens]
    return b"".join(pieces[: span.start + 1]), b"".join(pieces[span.start + 1 :])


@pytest.mark.parametrize("special", [False, True])
def test_tags(special: bool) -> None:
    controls = ("<bos>", "<eos>", *(("<think>", "</think>") if special else ()))
    tokenizer = ToyTokenizer(
        [bytes([i]) for i in range(256)] + [b"think>", b"</"], controls=controls
    )
    rule = TraceRule()
    got = split(rule, tokenizer, "Q", "<think>a<think>b</think>c</think> 7")
    assert got == (b"Q<think>", b"a<think>b</think>c</think>")
    in_prompt = split(rule, tokenizer, "Q<think>", "a</think> 7")
    assert in_prompt == (b"Q<think>", b"a</think>")
    for response in ("no tags", "<think>cut off", "</think>x<think>"):
        assert rule.locate(tokenizer, *encode_trace(tokenizer, "Q", response, rule)) is None
    cut = TraceRule(max_tokens=2)
    ids = encode_trace(tokenizer, "Q", "<think>aaaaaaaa</think>", cut)
    assert cut.locate(tokenizer, *ids) is None


def test_spans_without_tags() -> None:
    tokenizer = ToyTransformer().tokenizer
    assert split(TraceRule(span="response"), tokenizer, "Q", "ab 7") == (b"Q", b"ab 7")
    marked = TraceRule(span="response", answer_marker="####")
    assert split(marked, tokenizer, "Q #### x", "ab #### 7") == (b"Q #### x", b"ab ")
    cut = TraceRule(span="response", max_tokens=2)
    assert split(cut, tokenizer, "Q", "zzzz") == (b"Q", b"zz")
    end = min(tokenizer.eos_ids)
    span = TraceRule(span="response").locate(tokenizer, [65], [66, end])
    assert span is not None
    assert list(span.tokens) == [65, 66]
    assert TraceRule(span="response").locate(tokenizer, [65], [end]) is None


def test_final_answers() -> None:
    assert final_answer(r"so \boxed{\frac{1}{2}} is it") == r"\frac{1}{2}"
    assert final_answer("48+24 = 72\n#### 72") == "72"
    assert final_answer(r"\boxed{1} then \boxed{ 2 }.") == "2"
    assert final_answer("no answer") is None
    assert final_answer(r"\boxed{") is None


# -- reading --------------------------------------------------------------------------------------


def one_pass(model: Any, span: Span, *, norm: bool = True) -> np.ndarray:
    """Delta of a single call that returns every position."""
    layers = tuple(range(1, model.info.layers + 1))
    with model.session(needs=Capability.HIDDEN) as session:
        hidden = session.forward(
            Forward(keep=0, tokens=span.tokens[None], logits="none", hidden=layers)
        ).hidden
    rows = [hidden[i][0, ...] for i in layers]
    if norm:
        rows[-1] = model.norm(rows[-1])
    whole = np.stack([to_numpy(r) for r in rows])
    return whole[:, -1] - whole[:, span.start]


def test_reading_equals_one_pass(xp: Any) -> None:
    model = ToyTransformer(xp, layers=3)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 200, 9)
    spans = [
        Span(tokens=np.concatenate([prompt, rng.integers(0, 200, n)]), start=8) for n in (1, 7, 4)
    ]
    spans.append(Span(tokens=rng.integers(0, 200, 6), start=0))
    for norm in (True, False):
        rule = TraceRule(span="response", final_norm=norm)
        with DeltaReader(model, rule) as reader:
            for span in spans:
                np.testing.assert_allclose(
                    reader.read(span), one_pass(model, span, norm=norm), rtol=1e-4, atol=1e-5
                )


def test_a_prompt_is_read_once() -> None:
    model = ToyTransformer()
    prompt = np.arange(50)
    with DeltaReader(model, TraceRule(span="response")) as reader:
        for tail in ([1, 2, 3], [4, 5], [6]):
            reader.read(Span(tokens=np.array([*prompt, *tail]), start=49))
    assert model.calls["tokens"] == 50 + 3 + 2 + 1


def test_last_layer_only_and_a_model_that_cannot_go_back() -> None:
    span = Span(tokens=np.arange(9), start=3)
    model = ToyTransformer(layers=3)
    rule = TraceRule(span="response", layers="last")
    with DeltaReader(model, rule) as reader:
        np.testing.assert_allclose(reader.read(span), one_pass(model, span)[-1:], atol=1e-6)
    stiff = ToyTransformer(layers=3, without=Capability.ROLLBACK)
    with DeltaReader(stiff, TraceRule(span="response")) as reader:
        for _ in range(2):
            np.testing.assert_allclose(reader.read(span), one_pass(model, span), atol=1e-6)


def test_too_long_and_cancelled() -> None:
    model = ToyTransformer(context=16)
    with DeltaReader(model, TraceRule()) as reader:
        with pytest.raises(ContextOverflow, match="20 tokens .* holds 16"):
            reader.read(Span(tokens=np.arange(20), start=3))
        reader.read(Span(tokens=np.arange(16), start=3))
    with (
        DeltaReader(model, TraceRule(), cancelled=lambda: True) as reader,
        pytest.raises(Cancelled),
    ):
        reader.read(Span(tokens=np.arange(12), start=3))


# -- files ----------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    model = ToyTransformer()
    rule = TraceRule(span="response", answer_marker="####")
    facts = rule.model_facts(model)
    experience = Experience()
    experience.add(RIGHT[0], correct=True)
    experience.add(WRONG[0], correct=False)
    path = tmp_path / "c.safetensors"
    held = experience.centroids(rule=rule, model=facts)
    held.save(path)
    again = read_centroids(path)
    np.testing.assert_array_equal(again.success, held.success)
    assert (again.rule, again.counts, again.model) == (rule, (1, 1), facts)
    again.check(facts, where=str(path))
    for key, value in (("weights", "other"), ("dtype", "q4"), ("template", "x")):
        with pytest.raises(UsageError, match=rf"c\.safetensors: made with {key}"):
            again.check({**facts, key: value}, where=str(path))
    path.write_bytes(b"no such thing" * 10)
    with pytest.raises(InvalidInput, match="not a file of steersman verify fit"):
        read_centroids(path)


@pytest.mark.weights
def test_real_states_do_not_depend_on_how_they_were_come_by(engine_model: Any) -> None:
    """A teacher-forced pass gives what capture during generation gives."""
    model, rule = engine_model, TraceRule(span="response")
    ids = encode_trace(model.tokenizer, "What is 2 + 2?", " It is 4, of course.", rule)
    span = rule.locate(model.tokenizer, *ids)
    assert span is not None
    with DeltaReader(model, rule) as reader:
        found = reader.read(span)
    assert found.shape == (model.info.layers, model.info.width)
    layers = tuple(range(1, model.info.layers + 1))
    states = {}
    with model.session(needs=Capability.HIDDEN) as session:
        for place, token in enumerate(span.tokens):
            want = layers if place in (span.start, len(span.tokens) - 1) else ()
            ask = Forward(keep=place, tokens=np.array([[token]]), logits="none", hidden=want)
            hidden = session.forward(ask).hidden
            if want:
                rows = [hidden[i][0, -1, :] for i in layers]
                rows[-1] = model.norm(rows[-1])
                states[place] = np.stack([np.asarray(to_numpy(r), np.float32) for r in rows])
    step = states[len(span.tokens) - 1] - states[span.start]
    size = np.sqrt((found**2).sum(-1)).mean()
    assert float(layer_distance(found, step)) <= 1e-3 * size
