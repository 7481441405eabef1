"""Reordering the hits of a first-stage retriever with a language model.

>>> from steersman.core import load, rerank
>>> with load("smollm2") as model:
...     ranking = rerank(model, "what do fleas eat", ["Tax law", "Fleas feed on blood"])
>>> [hit.index for hit in ranking.top_k(1)]
"""

from .feedback import distill_query
from .first import First
from .generate import Generate
from .prompt import Prompt, sanitise
from .ranking import Ranked, Ranking, Usage, strictly_falling
from .reranker import METHODS, Method, Reranker, WindowCall, rerank
from .windows import windows

__all__ = [
    "METHODS",
    "First",
    "Generate",
    "Method",
    "Prompt",
    "Ranked",
    "Ranking",
    "Reranker",
    "Usage",
    "WindowCall",
    "distill_query",
    "rerank",
    "sanitise",
    "strictly_falling",
    "windows",
]
