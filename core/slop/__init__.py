"""What a model says too often: words and phrases of its texts against those of people."""

from .count import Counts, count_texts
from .human import Human, human_of_texts, read_human
from .rank import Entry, Quotas, SlopProfile, slop_profile

__all__ = [
    "Counts",
    "Entry",
    "Human",
    "Quotas",
    "SlopProfile",
    "count_texts",
    "human_of_texts",
    "read_human",
    "slop_profile",
]
