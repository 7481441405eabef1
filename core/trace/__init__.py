"""The decision trace: how every token of a text came about, in a file.

``TraceWriter.record`` writes the events of a stream as they pass; ``read_trace`` checks such a file
and yields its lines; ``Replay`` makes steps of them that can be walked forwards and backwards, with
no model; ``summarise`` counts. The format is described in ``docs/traces.md``.
"""

from .format import DEFAULT_LIMIT, FORMAT, MAX_LINE, MAX_LINES, VERSION, describe_note
from .reader import Line, read_trace
from .replay import Frame, Piece, Recording, Replay
from .stats import summarise
from .writer import TraceWriter

__all__ = [
    "DEFAULT_LIMIT",
    "FORMAT",
    "MAX_LINE",
    "MAX_LINES",
    "VERSION",
    "Frame",
    "Line",
    "Piece",
    "Recording",
    "Replay",
    "TraceWriter",
    "describe_note",
    "read_trace",
    "summarise",
]
