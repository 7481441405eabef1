"""A conversation as the line chat keeps it, and its files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steersman.core.errors import InvalidInput

from .envelope import to_json

FORMAT = "steersman.conversation.v1"


@dataclass
class Conversation:
    """Messages in order, each with facts on how it came about.

    Attributes
    ----------
    messages : list of mapping
        ``role`` and ``content``; answers also hold model, backend, profile, seed and so on.
    """

    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def prompt(self) -> list[dict[str, str]]:
        """Return what goes to the model."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return start + [{"role": m["role"], "content": m["content"]} for m in self.messages]

    def drop_answer(self) -> str | None:
        """Remove the last answer and return the message it answered; None if there is none."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            return None
        content: str = self.messages.pop()["content"]
        return content

    def save(self, path: Path) -> None:
        """Write JSONL (a header line, then a line per message), or Markdown for ``*.md``.

        The file appears whole or not at all, and never replaces one.

        Raises
        ------
        InvalidInput
            It exists, or cannot be written.
        """
        text = self._markdown() if path.suffix.lower() == ".md" else self._jsonl()
        try:
            write_new(path, text)
        except FileExistsError:
            raise InvalidInput(f"{path}: exists already; choose another name") from None
        except OSError as exc:
            raise InvalidInput(f"{path}: cannot be written: {exc.strerror}") from None

    def _jsonl(self) -> str:
        header: Mapping[str, Any] = {
            "format": FORMAT,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "messages": len(self.messages) + bool(self.system),
        }
        start = [{"role": "system", "content": self.system}] if self.system else []
        return "".join(to_json(line) + "\n" for line in (header, *start, *self.messages))

    def _markdown(self) -> str:
        parts = [f"**System:** {self.system}\n"] if self.system else []
        for message in self.messages:
            who = "You" if message["role"] == "user" else label(message)
            parts.append(f"### {who}\n\n{message['content']}\n")
        return "\n".join(parts)


def label(message: Mapping[str, Any]) -> str:
    """Return what made an answer: model, engine, profile, and how often it took something back."""
    known = [str(message[k]) for k in ("model", "backend", "profile") if message.get(k)]
    if rewinds := message.get("rewinds"):
        known.append("took back 1 passage" if rewinds == 1 else f"took back {rewinds} passages")
    return ", ".join(known) or "Assistant"


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.link(temporary, path)  # fails when the target exists; a rename would replace it
    finally:
        os.unlink(temporary)
