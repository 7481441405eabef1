"""Deciding token by token which of two models should speak: the router of R2R and its labels."""

from .network import RouterShape, init_weights, router_logits
from .router import Router
from .threshold import choose_threshold

__all__ = ["Router", "RouterShape", "choose_threshold", "init_weights", "router_logits"]
