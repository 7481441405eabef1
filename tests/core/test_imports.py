"""What may import what: core knows no framework, and nothing is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FRAMEWORKS = {"torch", "mlx", "mlx_lm", "llama_cpp", "transformers", "gguf", "tokenizers"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("core", FRAMEWORKS | {"textual", "steersman.backends", "steersman.tui"}),
        ("backends", {"textual", "steersman.tui", "steersman.core.decode"}),
        ("tui", FRAMEWORKS | {"steersman.backends"}),
    ],
)
def test_arrows_point_one_way(folder: str, banned: set[str]) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
            assert not prefixes & banned, f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in ("core", "backends", "tui"), f"{path}: import steersman.{name}"


@pytest.mark.parametrize(
    "code",
    [
        "import steersman.core",
        "from steersman.core import load, stream, score, rerank",
        "from steersman.core import load_profile; load_profile('balanced')",
        "from steersman.tui.cli import main; main(['--help'])",
    ],
)
def test_no_engine_is_imported_before_one_is_used(code: str) -> None:
    check = f"{code}\nimport sys\nfound = {FRAMEWORKS | {'textual'}!r} & set(sys.modules)\n"
    check += "sys.exit(f'imported: {found}' if found else 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
