"""Token values: how likely a text begun so ends well; labels, head and sampled texts."""

from .head import ValueShape, head_values, init_weights
from .labels import PrefixTree, label_rows, prefix_tree
from .value_head import ValueHead, read_value_head, save_value_head

__all__ = [
    "PrefixTree",
    "ValueHead",
    "ValueShape",
    "head_values",
    "init_weights",
    "label_rows",
    "prefix_tree",
    "read_value_head",
    "save_value_head",
]
