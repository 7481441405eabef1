"""Searching a collection with a language model and no training: PromptReps.

>>> from steersman.core import build_index, load, search
>>> with load("smollm2") as model:
...     index = build_index(model, {"a": "Tax law.", "b": "Fleas feed on blood."}, "my-index")
...     print([hit.docid for hit in search(model, index, "what do fleas eat")])
"""

from ..fusion import fuse, fuse_hybrid, min_max
from .build import Built, IndexWriter, build, build_index
from .documents import Document, read_documents
from .index import MODES, Hit, Index, Searcher, open_index, search
from .prompt import WordPrompt
from .represent import PromptReps, Representation, Representer
from .sparse import Bag

__all__ = [
    "MODES",
    "Bag",
    "Built",
    "Document",
    "Hit",
    "Index",
    "IndexWriter",
    "PromptReps",
    "Representation",
    "Representer",
    "Searcher",
    "WordPrompt",
    "build",
    "build_index",
    "fuse",
    "fuse_hybrid",
    "min_max",
    "open_index",
    "read_documents",
    "search",
]
