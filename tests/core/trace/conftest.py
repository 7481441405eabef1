"""Fixtures of the tests of traces."""

from __future__ import annotations

import pytest

from steersman.core.decode import STRATEGIES
from steersman.core.profile import Profile, load_profile

from .trace_support import (
    Rewinding,
)


@pytest.fixture
def rewinding(monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setitem(STRATEGIES, "rewinding", Rewinding)
    profile = load_profile("balanced").override({"strategy": "rewinding"})
    return profile.override({"generation.max_tokens": 6})
