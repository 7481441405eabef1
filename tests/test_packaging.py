"""Wheel and sdist: what is in them, and that the wheel works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_wheel_has_code_profiles_types_and_licence(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("core", "backends", "tui"):
        source = {
            f"steersman/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / folder).rglob("*.py")
        }
        assert source <= names
        assert f"steersman/{folder}/py.typed" in names
    profiles = {f"steersman/profiles/{p.name}" for p in (ROOT / "profiles").glob("*.yaml")}
    assert len(profiles) >= 8
    assert profiles <= names
    assert "steersman/tui/app.tcss" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [n for n in names if n.startswith(("tests/", "scripts/", ".editable"))]
    assert "steersman/__init__.py" not in names  # a namespace package


def test_sdist_has_what_the_scripts_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "core/model.py",
        "tests/conftest.py",
        "scripts/test",
        "constraints.txt",
        "LICENSE",
    ):
        assert name in names


def test_the_wheel_runs_from_elsewhere(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import steersman.core.api as api, steersman.tui.cli as cli\n"
        f"assert api.__file__.startswith({str(tmp_path)!r}), api.__file__\n"
        "raise SystemExit(cli.main(['profiles', 'list']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "STEERSMAN_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "llama.cpp-default" in done.stdout
