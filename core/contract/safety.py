"""Checks that a session survives bad calls, threads, a full context and a second close."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import ContextOverflow, SteersmanError, UsageError
from ..model import Capability, Forward
from .probe import Probe, Spec
from .report import Floats, Meter

C = Capability


def _bad_calls(probe: Probe, meter: Meter) -> None:
    model, prefix = probe.model, probe.short
    n, vocab, layers = len(prefix), model.info.vocab_size, model.info.layers
    bad: dict[str, Forward] = {
        "token id too large": Forward(keep=n, tokens=[[vocab]]),
        "token id far too large": Forward(keep=n, tokens=[[10**9]]),
        "token id -2": Forward(keep=n, tokens=[[-2]]),
        "padding on the left": Forward(keep=n, tokens=[[-1, 0]]),
        "float ids": Forward(keep=n, tokens=[[0.5]]),  # type: ignore[list-item]
        "flat tokens": Forward(keep=n, tokens=[0, 1]),  # type: ignore[list-item]
        "nothing to append": Forward(keep=n, tokens=[[]]),
        "keep too large": Forward(keep=n + 1, tokens=[[0]]),
        "keep negative": Forward(keep=-1, tokens=[[0]]),
        "too many rows": Forward(keep=n, tokens=[[0]] * 2),
        "path without a tree": Forward(keep=n, tokens=[[0]], path=[[0]]),
        "row out of range": Forward(keep=n, tokens=[[0]], rows=[1]),
        "parent after its child": Forward(keep=n, tokens=[[0, 1]], parents=[[1, -1]]),
        "layer out of range": Forward(keep=n, tokens=[[0]], hidden=(layers + 1,)),
        "attention layer out of range": Forward(keep=n, tokens=[[0]], attentions=(layers,)),
        "tokens and embeds": Forward(keep=n, tokens=[[0]], embeds=np.zeros((1, 1, 1))),
        "embeds of another width": Forward(
            keep=n, embeds=np.zeros((1, 1, model.info.width + 1), np.float32)
        ),
    }
    needs = model.capabilities & ~(C.LAST_LOGITS | C.ALL_LOGITS)
    with probe.open(needs) as session:
        probe.feed(session, 0, [prefix])
        for name, ask in bad.items():
            if ask.needs() & ~model.capabilities:
                continue
            try:
                session.forward(ask)
            except SteersmanError:
                pass
            except Exception as error:
                meter.holds(False, f"{name}: {type(error).__name__} instead of UsageError")
            else:
                meter.holds(False, f"{name}: accepted")
            meter.holds(session.lengths.tolist() == [n], f"{name}: the cache changed")
        answer = probe.feed(session, n, [probe.other[:3]])[0]
        meter.logits(answer, probe.fresh(prefix + probe.other[:3], 3, needs), "after bad calls")


def _overflow(probe: Probe, meter: Meter) -> None:
    asked = 24
    with probe.open(context=asked) as session:
        size = session.context
        # Engines round up to whole blocks of cells; a session says what it really has.
        if not asked <= size <= asked + 512:
            meter.holds(False, f"asked for {asked} positions, session has {size}")
            return
        tokens = [probe.tokens[i % len(probe.tokens)] for i in range(size + 1)]
        probe.feed(session, 0, [tokens[: size - 2]])
        try:
            session.forward(Forward(keep=size - 2, tokens=[tokens[size - 2 :]]))
        except ContextOverflow:
            pass
        else:
            meter.holds(False, f"{size + 1} tokens went into a context of {size}")
        meter.holds(session.lengths.tolist() == [size - 2], "an overflow changed the cache")
        answer = probe.feed(session, size - 2, [tokens[size - 2 : size]])[0]
        meter.logits(answer, probe.fresh(tokens[:size], 2), "context filled to the last place")


class _CallsBack:
    """Tokens that, while they are being read, let another thread use the same session."""

    def __init__(self, tokens: list[int], call: Callable[[], object]) -> None:
        self._tokens, self._call = tokens, call

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        _in_thread(self._call)
        return np.asarray([self._tokens])


def _in_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join()


def _one_session(probe: Probe, meter: Meter) -> None:
    tokens, seen = probe.short, []
    with probe.open() as session:
        probe.feed(session, 0, [tokens])

        def intrude() -> None:
            try:
                session.forward(Forward(keep=0, tokens=[probe.other[:3]]))
                seen.append("accepted")
            except UsageError:
                seen.append("refused")
            except Exception as error:
                seen.append(type(error).__name__)

        new = probe.other[3:6]
        ask: Any = _CallsBack(new, intrude)
        out = session.forward(Forward(keep=len(tokens), tokens=ask, logits=probe.want))
        meter.holds(seen[:1] == ["refused"], f"a second thread was {seen}")
        meter.logits(probe.answers(out, [3])[0], probe.fresh(tokens + new, 3), "after an intrusion")


def _two_sessions(probe: Probe, meter: Meter) -> None:
    streams, prompt, end = [probe.tokens, probe.other], 12, 18

    def run(tokens: list[int]) -> Floats:
        with probe.open() as session:
            parts = [probe.feed(session, 0, [tokens[:prompt]])[0]]
            parts += [probe.feed(session, i, [tokens[i : i + 1]])[0] for i in range(prompt, end)]
        return np.concatenate(parts)

    serial = [run(tokens) for tokens in streams]
    found: dict[int, Floats | BaseException] = {}

    def worker(i: int) -> None:
        try:
            found[i] = run(streams[i])
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=worker, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(serial):
        got = found[i]
        if isinstance(got, BaseException):
            meter.holds(False, f"thread {i}: {type(got).__name__}: {got}")
        else:
            meter.logits(got, want, f"session of thread {i}")


def _close(probe: Probe, meter: Meter) -> None:
    session, other = probe.open(), probe.open()
    probe.feed(session, 0, [probe.short])
    probe.feed(other, 0, [probe.short])
    session.close()
    session.close()
    try:
        probe.feed(session, 0, [probe.short])
        meter.holds(False, "a closed session answered")
    except UsageError:
        pass
    n = len(probe.short)
    answer = probe.feed(other, n, [probe.other[:2]])[0]
    want = probe.fresh(probe.short + probe.other[:2], 2)
    meter.logits(answer, want, "a session beside a closed one")
    other.close()


CHECKS = (
    Spec(
        name="bad-calls",
        title="a call with bad arguments is refused and changes nothing",
        needs=C.LAST_LOGITS,
        run=_bad_calls,
    ),
    Spec(
        name="overflow",
        title="a full context is an error, and can be filled exactly",
        needs=C.LAST_LOGITS,
        run=_overflow,
    ),
    Spec(
        name="one-session",
        title="a session refuses a second thread",
        needs=C.LAST_LOGITS,
        run=_one_session,
    ),
    Spec(
        name="two-sessions",
        title="two sessions in two threads answer as in turn",
        needs=C.LAST_LOGITS,
        run=_two_sessions,
    ),
    Spec(
        name="close",
        title="closing twice is harmless",
        needs=C.LAST_LOGITS,
        run=_close,
    ),
)
