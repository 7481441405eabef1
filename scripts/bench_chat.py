#!/usr/bin/env python3
"""How smooth the chat stays while a long answer streams in.

A scripted engine sends Markdown tokens at a fixed rate into the real application, without a
terminal. A heartbeat measures how long the screen was busy at a time: the longest gaps are what a
person would feel. Figures are given for each fifth of the answer, since a chat that parses
everything anew gets slower towards the end.

    scripts/bench_chat.py --tokens 5000 --rate 150
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

PARAGRAPH = (
    "Here is a paragraph with *some* **emphasis**, a `name`, and enough words to wrap. ",
    "It goes on for a while, as answers do, and then it ends.\n\n",
    "1. first\n2. second\n3. third\n\n",
    "```python\nfor i in range(10):\n    print(i)\n```\n\n",
)


def tokens(count: int) -> Iterator[str]:
    """Yield ``count`` pieces of about four characters."""
    text = "".join(PARAGRAPH)
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    for i in range(count):
        yield pieces[i % len(pieces)]


class ScriptedEngine:
    """Stands in for the chat's engine: sends tokens at a fixed rate."""

    def __init__(self, args: Any, count: int, rate: float) -> None:
        self.args, self.count, self.rate = args, count, rate
        self.context = (0, 0)
        self.model = SimpleNamespace(info=SimpleNamespace(name="scripted", backend="none"))

    def prepare(self, profile: Any) -> Any:
        """Return the stand-in for a model."""
        return self.model

    def stream(self, thread: Any, profile: Any, *, cancel: Any, **options: Any) -> Iterator[Any]:
        """Yield the events of a long answer."""
        from steersman.core.decode.events import Finished, Started, Timings, TokenEvent

        yield Started(prompt_token_ids=(), seed=0)
        begun, text = time.perf_counter(), []
        for i, piece in enumerate(tokens(self.count)):
            wait = begun + i / self.rate - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            text.append(piece)
            yield TokenEvent(index=i, id=0, bytes=piece.encode(), text=piece)
        timings = Timings(
            prompt_tokens=0,
            cached_tokens=0,
            prefill_s=0,
            generated_tokens=self.count,
            decode_s=time.perf_counter() - begun,
        )
        yield Finished(reason="eos", text="".join(text), tail="", token_ids=(), timings=timings)

    def close(self) -> None:
        """Nothing to free."""


async def measure(count: int, rate: float) -> None:
    """Run one answer and print the figures."""
    from steersman.tui.app import SteersmanApp
    from steersman.tui.history import History

    app = SteersmanApp(profile="greedy", history=History(":memory:"))
    app.engine = ScriptedEngine(app.engine.args, count, rate)  # type: ignore[assignment]
    async with app.run_test(size=(110, 40)) as pilot:
        app.prompt.load_text("go")
        await pilot.press("enter")
        while not app.busy:
            await asyncio.sleep(0.001)
        gaps: list[tuple[float, float]] = []
        begun = last = time.perf_counter()
        cpu = time.process_time()
        while app.busy:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            gaps.append((now - begun, now - last - 0.005))
            last = now
        took, cpu = last - begun, time.process_time() - cpu
    print(f"{count} tokens at {rate:g} tok/s took {took:.1f} s (nominal {count / rate:.1f} s)")
    print(f"processor time of the whole program: {cpu:.1f} s, {1000 * cpu / count:.2f} ms a token")
    for part in range(5):
        low, high = took * part / 5, took * (part + 1) / 5
        here = sorted(gap for at, gap in gaps if low <= at <= high)
        if here:
            p95 = here[int(len(here) * 0.95)]
            print(
                f"fifth {part + 1}: longest gap {1000 * here[-1]:.0f} ms, "
                f"95 % below {1000 * p95:.0f} ms"
            )


def main() -> int:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=150.0, help="tokens per second")
    args = parser.parse_args()
    asyncio.run(measure(args.tokens, args.rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
