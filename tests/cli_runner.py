"""Calls the command line in this process, on toy models."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_tokenizer import CHATML, ToyTokenizer
from toys import TableModel

from steersman.tui import output
from steersman.tui.cli import main


@dataclass(frozen=True)
class Result:
    """What one call left: exit code and the two streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        return json.loads(self.out)


class Runner:
    """``cli("generate", "-p", "x", stdin=..., terminal=...)`` returns a :class:`Result`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        self.patch = monkeypatch
        self.home = home
        self.loads: list[dict[str, Any]] = []
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("STEERSMAN_HOME", str(home))
        monkeypatch.chdir(home)

    def use(self, model: Callable[[], Any]) -> None:
        """Let every load return ``model()``; what was asked for is noted in ``loads``."""

        def load(**options: Any) -> Any:
            self.loads.append(options)
            return model()

        self.patch.setattr("steersman.core.load", load)

    def __call__(
        self,
        *args: str,
        stdin: str | bytes | None = None,
        terminal: Sequence[str] = (),
    ) -> Result:
        """Run; ``terminal`` names the streams ("stdin", "stdout", "stderr") that are one."""
        data = stdin.encode() if isinstance(stdin, str) else stdin or b""
        streams = {
            "stdin": io.TextIOWrapper(io.BytesIO(data), "utf-8"),
            "stdout": io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True),
            "stderr": io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True),
        }
        with self.patch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            chosen = [streams[name] for name in terminal]
            patch.setattr(output, "is_terminal", lambda s: any(s is c for c in chosen))
            code = main(list(args))
        texts = {}
        for name in ("stdout", "stderr"):
            streams[name].flush()
            raw = streams[name].buffer.getvalue()  # type: ignore[attr-defined]
            texts[name] = raw.decode("utf-8", "surrogateescape")
        return Result(code, texts["stdout"], texts["stderr"])


def scripted(pieces: Sequence[bytes], *, context: int = 512, chat: bool = True) -> TableModel:
    """Return a model that, whatever the prompt, says ``pieces`` one after the other and ends.

    The first token follows any token that is none of ``pieces``; every byte is a token too, so any
    prompt can be encoded.
    """
    tokenizer = ToyTokenizer(
        [bytes([i]) for i in range(256)] + [b"\x00piece" + bytes([i]) for i in range(len(pieces))],
        controls=("<bos>", "<eos>", "<|im_start|>", "<|im_end|>"),
        eos=("<eos>",),
        chat_template=CHATML if chat else None,
    )
    # The pieces themselves must not be what prompts are encoded with.
    tokenizer.pieces = tuple([bytes([i]) for i in range(256)] + list(pieces))
    size = tokenizer.vocab_size
    (eos,) = tokenizer.eos_ids
    table = np.full((size + 1, size), 1e-9)
    for token in range(size + 1):
        place = token - 256
        following = 256 + place + 1 if 0 <= place < len(pieces) else 256
        table[token, following if following < 256 + len(pieces) else eos] = 1.0
    table /= table.sum(axis=-1, keepdims=True)
    return TableModel(table=table, tokenizer=tokenizer, context=context)
