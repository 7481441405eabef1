"""Whether two tokenizers mean the same by the same ids."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from .model import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What two vocabularies have in common.

    Attributes
    ----------
    ids : bool (V,)
        Which ids of the first tokenizer stand for the same bytes in the second. Padding (ids
        without bytes, and ids beyond the smaller vocabulary) is not shared, and no difference.
    differs : int or None
        The first id that stands for other bytes; None if the tokenizers agree.
    """

    ids: npt.NDArray[np.bool_]
    differs: int | None


_known: WeakKeyDictionary[Tokenizer, WeakKeyDictionary[Tokenizer, Shared]] = WeakKeyDictionary()


def shared_tokens(a: Tokenizer, b: Tokenizer) -> Shared:
    """Compare two tokenizers id by id (about 0.1 s for 50,000 ids; remembered afterwards)."""
    with contextlib.suppress(TypeError, KeyError):
        return _known[a][b]
    ids = np.zeros(a.vocab_size, np.bool_)
    differs = None
    if a is b:
        ids[:] = True
    else:
        for i in range(min(a.vocab_size, b.vocab_size)):
            mine, theirs = a.token_bytes(i), b.token_bytes(i)
            if mine == theirs:
                ids[i] = bool(mine)
            elif mine and theirs:
                differs = i
                break
    found = Shared(ids=ids, differs=differs)
    with contextlib.suppress(TypeError):  # one that cannot be referred to weakly
        _known.setdefault(a, WeakKeyDictionary())[b] = found
    return found


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether every id that both tokenizers use stands for the same bytes.

    One vocabulary may be longer, as long as they agree on some tokens and differ on none.
    """
    shared = shared_tokens(a, b)
    return shared.differs is None and bool(shared.ids.any())
