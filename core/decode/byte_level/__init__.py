"""Exact byte-level probabilities of token models, and what can be done with them."""

from __future__ import annotations

from .begin import begin_covers
from .cover import Cover, TokenHealing
from .covers import Covers
from .parts import Law, Settings
from .score import byte_logprobs
from .strategy import ByteLevel

__all__ = [
    "ByteLevel",
    "Cover",
    "Covers",
    "Law",
    "Settings",
    "TokenHealing",
    "begin_covers",
    "byte_logprobs",
]
