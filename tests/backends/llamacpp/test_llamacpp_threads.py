"""Life and death of models on llama.cpp, also in several threads."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from steersman.core.errors import (
    UsageError,
)
from steersman.core.model import Forward

pytest.importorskip("llama_cpp")
from steersman.backends.llamacpp.cache import Cache

from .llamacpp_support import TEXT, fresh

pytestmark = pytest.mark.weights


def test_closing_in_any_order(another: Any, ids: list[int]) -> None:
    session, forgotten = another.session(), another.session()
    tokenizer = another.tokenizer
    logits = session.forward(Forward(keep=0, tokens=[ids[:4]])).logits
    want = logits.copy()
    del forgotten
    another.close()
    another.close()
    session.close()
    assert np.array_equal(logits, want)
    for call in (
        lambda: session.forward(Forward(keep=0, tokens=[[1]])),
        lambda: another.session(),
        lambda: another.embed([1]),
        lambda: another.embedding,
        lambda: another.head(np.zeros((1, 576))),
        lambda: tokenizer.encode("x"),
        lambda: tokenizer.token_bytes(4242),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_weights_are_freed_with_the_last_holder(another: Any, ids: list[int]) -> None:
    session = another.session()
    handle = weakref.ref(another.handle)
    logits = session.forward(Forward(keep=0, tokens=[ids[:4]])).logits
    another.close()
    assert handle() is not None  # the context behind ``logits`` still stands on the weights
    del logits
    gc.collect()
    assert handle() is None


def test_several_threads(llamacpp_model: Any, ids: list[int]) -> None:
    want = {n: fresh(llamacpp_model, ids[:n])[-1] for n in (5, 12, 20, 33)}
    wrong: list[str] = []

    def work(n: int) -> None:
        with llamacpp_model.session() as session:
            for _ in range(3):
                for begin in range(0, n, 4):
                    tokens = [ids[begin : min(n, begin + 4)]]
                    out = session.forward(Forward(keep=begin, tokens=tokens))
                if not np.array_equal(out.logits[0], want[n]):
                    wrong.append(f"{n} tokens")
                llamacpp_model.head(np.ones((1, 576), np.float32))
                llamacpp_model.tokenizer.encode(TEXT)

    threads = [threading.Thread(target=work, args=(n,)) for n in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closing_waits_for_a_call_in_another_thread(
    llamacpp_model: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, released = threading.Event(), threading.Event()
    real = Cache.feed

    def slow(self: Cache, entries: Any) -> Any:
        entered.set()
        assert released.wait(20)
        return real(self, entries)

    session = llamacpp_model.session()
    monkeypatch.setattr(Cache, "feed", slow)
    results: list[Any] = []
    ask = Forward(keep=0, tokens=[ids[:5]], logits="all")
    worker = threading.Thread(target=lambda: results.append(session.forward(ask).logits))
    worker.start()
    assert entered.wait(20)
    closer = threading.Thread(target=session.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    released.set()
    worker.join()
    closer.join()
    monkeypatch.undo()
    assert np.array_equal(results[0][0], fresh(llamacpp_model, ids[:5]))


def test_the_engine_is_silent(llamacpp_model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with llamacpp_model.session() as session:
        session.forward(Forward(keep=0, tokens=[[1, 2, 3]]))
    assert capfd.readouterr() == ("", "")
