"""The torch adapter after calls that fail, with bad arguments, and in several threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from steersman.core.errors import (
    BackendError,
    UsageError,
)
from steersman.core.model import Capability, Forward

from ..tiny_torch import tokens
from .torch_support import EVERYTHING, WAYS, Opener, everything, same


class _Break:
    """Stands for a projection in a middle layer and fails once."""

    def __init__(self, inner: Any, error: BaseException) -> None:
        self.inner, self.error = inner, error
        self.armed = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.armed:
            self.armed = False
            raise self.error
        return self.inner(*args, **kwargs)


def _break(model: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    if model.info.extra["path"] == "native":
        from dataclasses import replace

        layers = list(model._layers)
        layers[1] = replace(layers[1], down=_Break(layers[1].down, error))
        monkeypatch.setattr(model, "_layers", layers)
    else:
        mlp = model.module.get_decoder().layers[1].mlp
        monkeypatch.setattr(mlp, "forward", _Break(mlp.forward, error))


@pytest.mark.parametrize(("name", "path"), WAYS[:3])
@pytest.mark.parametrize("error", [RuntimeError("out of memory\nlong story"), KeyboardInterrupt()])
@pytest.mark.parametrize("case", ["append", "rollback", "fork", "path"])
def test_a_failed_call_leaves_a_usable_session(
    case: str,
    error: BaseException,
    name: str,
    path: str,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = opened(name, path), tokens(20)
    ask: dict[str, Any] = {
        "append": {"keep": 20, "tokens": [[3, 4]]},
        "rollback": {"keep": 9, "tokens": [[3, 4]]},
        "fork": {"keep": 9, "rows": [0, 0], "tokens": [[3, 4], [5, 6]]},
        "path": {"keep": 20, "path": [[1]], "tokens": [[3, 4]]},
    }[case]
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        if case == "path":
            tree = Forward(keep=20, tokens=[[8, 9]], parents=[[-1, -1]], logits="none")
            session.forward(tree)
        expected: type[BaseException] = BackendError
        message = "out of memory$"
        if isinstance(error, KeyboardInterrupt):
            expected, message = KeyboardInterrupt, "^$"
        with monkeypatch.context() as patch:
            _break(model, error, patch)
            with pytest.raises(expected, match=message):
                session.forward(Forward(**ask))
        # Whatever stood behind ``keep`` may be overwritten: it is not offered any more.
        kept = 9 if case == "rollback" else 20
        assert session.lengths.tolist() == [kept]
        assert session.row_tokens().tolist() == ids[:kept]
        out = session.forward(Forward(keep=kept, tokens=[[11]]))
    with model.session() as fresh:
        want = fresh.forward(Forward(keep=0, tokens=[[*ids[:kept], 11]]))
    same(out.logits, want.logits, 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_soft_tokens_must_be_finite(bad: float, opened: Opener) -> None:
    """A NaN would stay in the cache and reach later positions even behind a mask."""
    model = opened("llama", "native")
    soft = np.zeros((1, 2, 64), np.float32)
    soft[0, 1, 5] = bad
    with model.session(needs=Capability.EMBEDS) as session:
        session.forward(Forward(keep=0, tokens=[[3]], logits="none"))
        with pytest.raises(UsageError, match="NaN or an infinity"):
            session.forward(Forward(keep=1, embeds=soft))
        assert session.lengths.tolist() == [1]


@pytest.mark.parametrize("path", ["native", "hf"])
def test_ids_out_of_range_never_reach_the_device(path: str, opened: Opener) -> None:
    model = opened("llama", path)
    for bad in (-1, 320, 1 << 40):
        with pytest.raises(UsageError, match=str(bad)):
            model.embed([3, bad])
        with pytest.raises(UsageError, match=str(bad)), model.session() as session:
            session.forward(Forward(keep=0, tokens=[[bad, 3]]))
    with pytest.raises(UsageError, match="integers"):
        model.embed([0.5])  # type: ignore[list-item]


def test_width_of_hidden_states_is_checked(opened: Opener) -> None:
    with pytest.raises(UsageError, match="64"):
        opened("llama", "native").head(np.zeros((2, 63), np.float32))


@pytest.mark.parametrize("path", ["native", "hf"])
def test_results_belong_to_the_caller(path: str, opened: Opener) -> None:
    model, ids = opened("llama", path), tokens(6)
    ask = Forward(keep=6, tokens=[[9]], **everything(model))
    with model.session(needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        first = session.forward(ask)
        copy = first.logits.clone()
        for array in (first.logits, *first.hidden.values(), *first.attentions.values()):
            assert array.dtype == torch.float32
            assert not array.requires_grad
            array.zero_()  # an inference tensor would refuse
        assert torch.equal(session.forward(ask).logits, copy)


@pytest.mark.parametrize(("name", "path"), WAYS[:3])
def test_threads_share_a_model(name: str, path: str, opened: Opener) -> None:
    """Four sessions at once, each with another kind of call: bit for bit as alone."""
    model = opened(name, path)

    def work(seed: int) -> list[Any]:
        ids, out = tokens(24, seed), []
        rows = [ids[:9], ids[9:14] + [-1] * 4] if seed % 2 else [ids[:9], ids[9:18]]
        want = (1, 2) if seed % 2 else ()
        with model.session(max_rows=2, needs=EVERYTHING) as session:
            session.forward(Forward(keep=0, tokens=[ids[:1]], logits="none"))
            ask = Forward(keep=0, rows=[0, 0], tokens=rows, hidden=want, attentions=want)
            for _ in range(6):
                answer = session.forward(ask)
                out = [answer.logits, *answer.hidden.values(), *answer.attentions.values()]
                ask = Forward(keep=3, tokens=rows, hidden=want, attentions=want)
        return out

    alone = [work(seed) for seed in range(4)]
    found: list[Any] = [None] * 4

    def run(seed: int) -> None:
        found[seed] = work(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, got in zip(alone, found):
        assert got is not None and len(want) == len(got)
        assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_parameters_can_be_trained_on_the_general_path(opened: Opener) -> None:
    model: Any = opened("llama", "hf")
    ids = torch.tensor([tokens(8)])
    loss = model.module(input_ids=ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(loss, [model.module.get_input_embeddings().weight])
    assert float(gradient.abs().max()) > 0
    with pytest.raises(UsageError, match="path='hf'"):
        _ = opened("llama", "native").module  # type: ignore[attr-defined]
