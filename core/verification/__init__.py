"""CLUE: is a finished trace right, judged by how the model's own hidden states change over it.

The states at the end of a trace's reasoning minus those at its beginning are compared with the mean
of traces known to be right and of traces known to be wrong.
"""

from .centroids import Centroids, Experience, Judgement, layer_distance, read_centroids
from .delta import DeltaReader
from .ranking import final_answer, majority, nearest_first
from .span import Span, TraceRule, encode_trace

__all__ = [
    "Centroids",
    "DeltaReader",
    "Experience",
    "Judgement",
    "Span",
    "TraceRule",
    "encode_trace",
    "final_answer",
    "layer_distance",
    "majority",
    "nearest_first",
    "read_centroids",
]
