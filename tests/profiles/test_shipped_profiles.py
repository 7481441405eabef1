"""Every profile that ships: loads, says what it is for, cites, and survives its own YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.core import strict_yaml
from steersman.core.profile import (
    builtin_folder,
    list_profiles,
    load_profile,
)
from steersman.core.profile_build import from_document

FILES = sorted(builtin_folder().glob("*.yaml"))
PROMISED = {
    "greedy", "balanced", "creative", "precise", "beam", "contrastive", "dola", "best-of-n",
    "mirostat", "llama.cpp-default", "openai-like",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path))


def test_the_promised_ones_are_listed_without_error() -> None:
    listed = {e.name: e for e in list_profiles()}
    assert set(listed) >= PROMISED
    assert [e.error for e in listed.values() if e.error] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_profile(path: Path) -> None:
    profile = load_profile(path)
    assert 10 < len(profile.description) < 90
    assert profile.references
    text = path.read_text()
    assert text.startswith("# "), "begins with a comment that says what it is for"
    assert all(len(line) <= 100 for line in text.splitlines())
    again = from_document(strict_yaml.parse(profile.to_yaml(), source="copy"), name=profile.name)
    assert again.strategy == profile.strategy and again.fingerprint == profile.fingerprint


def test_what_the_names_promise() -> None:
    assert load_profile("greedy").strategy.chain.greedy
    assert load_profile("dola").strategy.chain.greedy
    neutral = load_profile("openai-like").strategy.chain
    assert neutral.active == ()
    llama = load_profile("llama.cpp-default").strategy.chain
    assert [(s.name, *vars(s).values()) for _, s in llama.active] == [
        ("top_k", 40),
        ("top_p", 0.95),
        ("min_p", 0.05),
        ("temperature", 0.8),
    ]
