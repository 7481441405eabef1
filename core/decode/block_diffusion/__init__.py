"""Block diffusion: several tokens of a block are fixed in one pass of an adapted model."""

from .confidence import Algorithm, confidences, to_fix
from .credit import CreditRule, Credits, add_credit
from .mask import find_mask
from .strategy import BlockDiffusion

__all__ = [
    "Algorithm",
    "BlockDiffusion",
    "CreditRule",
    "Credits",
    "add_credit",
    "confidences",
    "find_mask",
    "to_fix",
]
