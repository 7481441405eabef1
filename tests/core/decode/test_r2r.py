"""Routing between two models, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TableModel, ToyTransformer

from steersman.core import generate
from steersman.core.array import to_numpy
from steersman.core.decode import R2R, Sample
from steersman.core.decode.events import Event, Finished, Note
from steersman.core.decode.loop import decode
from steersman.core.decode.rng import Rng
from steersman.core.decode.sessions import Sessions
from steersman.core.decode.types import Request
from steersman.core.errors import CapabilityError, UsageError
from steersman.core.logits import Chain, Penalties, Temperature
from steersman.core.model import Capability, Forward
from steersman.core.profile import load_profile
from steersman.core.routing import Router, RouterShape, init_weights
from steersman.core.routing.features import NEEDS, text_features
from steersman.core.routing.router import save_router

GREEDY = Chain((Temperature(t=0),))
PROMPT = (0, 1, 2)


def run(
    models: dict[str, Any], strategy: Any, *, seed: int = 0, max_tokens: int = 12, **options: Any
) -> list[Event]:
    with Sessions(models) as sessions:
        request = Request(
            prompt=np.array(options.pop("prompt", PROMPT)),
            models=models,
            eos_ids=options.pop("eos", frozenset()),
            max_tokens=max_tokens,
            context=models["target"].info.context,
        )
        return list(decode(strategy, sessions.prepare(strategy, name="t"), request, Rng(seed)))


def ids(events: list[Event]) -> tuple[int, ...]:
    assert isinstance(events[-1], Finished)
    return events[-1].token_ids


def notes(events: list[Event]) -> list[Any]:
    return [e.values for e in events if isinstance(e, Note) and "routed" in e.values]


def pair(**options: Any) -> dict[str, Any]:
    return {"target": TableModel(seed=1, **options), "small": TableModel(seed=2, **options)}


@pytest.mark.parametrize("chain", [Chain(), GREEDY, Chain((Penalties(repetition=1.4),))])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_at_the_ends_are_either_model_alone(chain: Chain, seed: int) -> None:
    models = pair()
    for threshold, alone in ((1e6, "small"), (0.0, "target")):
        mixed = run(models, R2R(threshold=threshold, chain=chain), seed=seed)
        plain = run({"target": models[alone]}, Sample(chain=chain), seed=seed)
        assert ids(mixed) == ids(plain)
        assert {n["routed"] for n in notes(mixed)} == {alone}


@pytest.mark.parametrize("router", ["entropy", "random"])
def test_equal_models_make_the_router_irrelevant(router: Any) -> None:
    model = TableModel(seed=3)
    models = {"target": model, "small": model}
    texts = {
        ids(run(models, R2R(router=router, threshold=t, chain=GREEDY))) for t in (0.0, 0.5, 0.9)
    }
    assert len(texts) == 1


def test_entropy_decides() -> None:
    models = pair(sharpness=2.5)
    events = run(models, R2R(threshold=0.8, chain=GREEDY), max_tokens=40)
    text = list(PROMPT)
    for token, note in zip(ids(events), notes(events), strict=True):
        probs = models["small"].probs(text)
        entropy = -sum(p * np.log(p) for p in probs if p > 1e-20)
        assert note["score"] == pytest.approx(entropy, abs=1e-3)
        speaker = "target" if entropy >= 0.8 else "small"
        assert note["routed"] == speaker
        assert token == int(np.argmax(models[speaker].probs(text)))
        text.append(token)
    assert {n["routed"] for n in notes(events)} == {"small", "target"}


def test_the_large_model_reads_each_token_once() -> None:
    models = pair(sharpness=2.5)
    events = run(models, R2R(threshold=0.8, chain=GREEDY), max_tokens=40)
    large = models["target"].calls
    routed = [i for i, n in enumerate(notes(events)) if n["routed"] == "target"]
    assert large["forward"] == len(routed)
    # All that was written before its last call, the prompt included.
    assert large["tokens"] == len(PROMPT) + routed[-1]
    assert large["rollback"] == 0
    assert models["small"].calls["rollback"] == 0
    assert models["small"].calls["tokens"] == len(PROMPT) + 40 - 1


def test_cached_catch_up_equals_a_fresh_read() -> None:
    models = {"target": ToyTransformer(seed=1), "small": ToyTransformer(seed=2)}
    strategy = R2R(router="random", threshold=0.6, chain=GREEDY)
    prompt = tuple(b"catch up")
    with Sessions(models) as sessions:
        opened = sessions.prepare(strategy, name="t")
        request = Request(
            prompt=np.array(prompt), models=models, eos_ids=frozenset(), max_tokens=20, context=64
        )
        *events, last = decode(strategy, opened, request, Rng(0))
        assert isinstance(last, Finished)
        history = np.array([*prompt, *last.token_ids])
        for role, session in opened.items():
            held = int(session.lengths[0])
            kept = session.forward(Forward(keep=held - 1, tokens=history[None, held - 1 : held]))
            with models[role].session() as fresh:
                again = fresh.forward(Forward(keep=0, tokens=history[None, :held]))
            np.testing.assert_allclose(to_numpy(kept.logits), to_numpy(again.logits), atol=1e-4)


def test_an_oracle_router_writes_the_large_models_text(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pair()

    def differs(self: R2R, before: Any, answer: Any, token: Any, rng: Any) -> float:
        return float(token.id != int(np.argmax(models["target"].probs(before.history.tolist()))))

    monkeypatch.setattr(R2R, "_score", differs)
    events = run(models, R2R(threshold=1.0, chain=GREEDY), max_tokens=30)
    assert ids(events) == ids(
        run({"target": models["target"]}, Sample(chain=GREEDY), max_tokens=30)
    )
    assert 0 < sum(n["routed"] == "small" for n in notes(events)) < 30


def test_share_is_bounded() -> None:
    events = run(pair(), R2R(threshold=0.0, max_share=0.25), max_tokens=40)
    assert sum(n["routed"] == "target" for n in notes(events)) == 10


def test_ends_and_resumes() -> None:
    models = pair()
    strategy = R2R(threshold=0.8)
    whole = ids(run(models, strategy))
    assert run(models, strategy, eos=frozenset({whole[3]}))[-1].reason == "eos"
    assert ids(run(models, strategy, max_tokens=0)) == ()
    from steersman.core.decode import Antislop

    wrapped = run(models, Antislop(inner=strategy))
    assert ids(wrapped) == whole


def trained(tmp_path: Path, models: dict[str, Any], **changes: Any) -> str:
    pytest.importorskip("safetensors")
    shape = RouterShape(features=models["small"].info.width, top=5, width=8, blocks=1)
    fields: dict[str, Any] = {
        "shape": shape,
        "weights": init_weights(shape, seed=4),
        "threshold": 0.5,
        "small": models["small"].info.fingerprint,
        "target": models["target"].info.fingerprint,
    }
    path = tmp_path / "router.safetensors"
    save_router(Router(**{**fields, **changes}), path)
    return str(path)


def test_neural_router_sees_what_training_saw(tmp_path: Path) -> None:
    models = {"target": ToyTransformer(seed=1), "small": ToyTransformer(seed=2)}
    strategy = R2R(router="neural", router_file=trained(tmp_path, models), chain=GREEDY)
    prompt = tuple(b"features")
    events = run(models, strategy, prompt=prompt, max_tokens=10)
    small, router = models["small"], strategy.loaded
    assert router is not None
    with small.session(needs=NEEDS) as session:
        seen = text_features(small, session, prompt, ids(events), top=5)
    for i, note in enumerate(notes(events)):
        embedding = np.asarray(small.embed(np.array([seen.choice[i]]))[0])
        score = router.probability(seen.top_logits[i], seen.hidden[i], embedding)
        assert note["score"] == pytest.approx(score, abs=2e-4)


def test_readable_refusals(tmp_path: Path) -> None:
    models = {"target": ToyTransformer(seed=1), "small": ToyTransformer(seed=2)}
    with pytest.raises(CapabilityError, match=r"needs a model for role 'small'"):
        run({"target": models["target"]}, R2R())
    blind = {**models, "small": ToyTransformer(without=Capability.HIDDEN)}
    file = trained(tmp_path, models)
    with pytest.raises(CapabilityError, match="HIDDEN"):
        run(blind, R2R(router="neural", router_file=file))
    other = trained(tmp_path, models, small="another")
    with pytest.raises(UsageError, match="other weights as 'small'"):
        run(models, R2R(router="neural", router_file=other))
    with pytest.raises(UsageError, match="different tokens"):
        run({"target": ToyTransformer(), "small": TableModel()}, R2R())
    with pytest.raises(UsageError, match="neural needs router_file"):
        R2R(router="neural")


@pytest.mark.weights
def test_on_real_weights(engine_model: Any, tmp_path: Path) -> None:
    """With one model in both roles every router gives that model's text, on every engine."""
    models = {"small": engine_model}
    prompt = "The capital of France is"
    plain = generate(engine_model, prompt, profile="greedy", max_tokens=6)
    r2r = load_profile("r2r").override({"temperature.t": 0})
    mixed = generate(engine_model, prompt, profile=r2r, models=models, max_tokens=6)
    assert mixed.token_ids == plain.token_ids
    width = engine_model.info.width
    shape = RouterShape(features=width, top=100, width=16, blocks=1)
    file = trained(
        tmp_path, {"small": engine_model, "target": engine_model}, shape=shape,
        weights=init_weights(shape, seed=0),
    )  # fmt: skip
    neural = r2r.override({"r2r.router_file": file})
    mixed = generate(engine_model, prompt, profile=neural, models=models, max_tokens=6)
    assert mixed.token_ids == plain.token_ids
