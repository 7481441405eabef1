"""Antislop: a sampler that goes back when a banned phrase has come about."""

from .rules import Rule as Rule
from .strategy import Antislop as Antislop

__all__ = ["Antislop", "Rule"]
