"""Training objectives as array functions: ``(loss, ...)`` from outputs and labels.

Each is one formula in array-API code, so that it has gradients on torch and values anywhere.
"""

from .classification import binary_cross_entropy

__all__ = ["binary_cross_entropy"]
