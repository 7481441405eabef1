"""What speculation remembers beyond one text: tables of what models said, and how drafts fared.

It is a cache. It decides what is drafted, so it changes how fast a text comes, never the
distribution of the text, and under the match rule not even the text. It lives in this process and
goes when the model does; a file holds it only when somebody saves it.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ...logits import Chain
from ...model import Model
from .budget import Rates
from .ngram import NgramTable

_TABLES = 4  # per model; the least recently used one goes first


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A table and how its proposals fared. Both may be used by several threads at once."""

    table: NgramTable
    rates: Rates = field(default_factory=Rates)


_MEMORIES: WeakKeyDictionary[Model, OrderedDict[str, Memory]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def memory_of(model: Model, chain: Chain, entries: int) -> Memory:
    """Return what all texts of ``model`` under the settings of ``chain`` share in this process."""
    key = repr(chain.stages)
    with _LOCK:
        kept = _MEMORIES.setdefault(model, OrderedDict())
        if key not in kept:
            kept[key] = Memory(table=NgramTable(entries))
        kept.move_to_end(key)
        while len(kept) > _TABLES:
            kept.popitem(last=False)
        return kept[key]


def remember(model: Model, chain: Chain, table: NgramTable) -> None:
    """Let texts of ``model`` under the settings of ``chain`` start from ``table``."""
    memory_of(model, chain, table.most)
    with _LOCK:
        _MEMORIES[model][repr(chain.stages)] = Memory(table=table)


def forget(model: Model) -> None:
    """Drop everything that is remembered for ``model``."""
    with _LOCK:
        _MEMORIES.pop(model, None)


def made_with(model: Model, chain: Chain) -> dict[str, str]:
    """Return what a table belongs to: fingerprints of weights and tokenizer, and the chain."""
    digest = hashlib.sha256()
    for token in range(model.tokenizer.vocab_size):
        piece = model.tokenizer.token_bytes(token)
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return {
        "model": model.info.fingerprint or model.info.name,
        "tokenizer": digest.hexdigest()[:32],
        "chain": repr(chain.stages),
    }
