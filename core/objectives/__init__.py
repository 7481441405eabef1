"""Training objectives as array functions of outputs and labels.

Each is one formula in array-API code, so that it has gradients on torch and values anywhere.
"""

from .classification import binary_cross_entropy
from .ranking import lambdarank, listnet, ranknet, ranks_of
from .token_values import token_value_loss

__all__ = [
    "binary_cross_entropy",
    "lambdarank",
    "listnet",
    "ranknet",
    "ranks_of",
    "token_value_loss",
]
