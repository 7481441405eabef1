"""From a prompt to its covers, before any call to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...errors import UsageError
from ...model import IntArray, Tokenizer
from ..text import token_piece
from ..types import Token
from .canonical import Canonical, canonical_of
from .covers import Covers
from .cuts import SOFT_REST, SOFT_TAIL
from .parts import Pending, Settings


def begin_covers(
    tokenizer: Tokenizer, prompt: Sequence[int] | IntArray, settings: Settings, more: bytes = b""
) -> Covers:
    """Return the covers of a prompt's text, before any call to the model.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt : sequence of int
        Tokens; control tokens among them stay where they are, and nothing crosses them.
    settings : Settings
    more : bytes
        Bytes that follow the prompt's own; they need not be whole characters.

    Raises
    ------
    UsageError
        The text is a single token and the vocabulary has none that could stand before it.
    """
    text: Canonical = canonical_of(tokenizer)
    ids = np.asarray(prompt, np.int64)
    special = np.flatnonzero(np.isin(ids, text.vocabulary.specials))
    first = int(special[-1]) + 1 if len(special) else 0  # where ordinary text begins
    pieces = [text.vocabulary.pieces[int(i)] for i in ids[first:]]
    starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
    data = b"".join(pieces) + more
    count = _tokens_before_cut(text, data, pieces, starts, settings, bool(more))
    history, tail, start = ids[: first + count], data[int(starts[count]) :], count == 0
    if not len(history):
        before = tokenizer.bos_id
        if before is None:
            before = min(tokenizer.eos_ids, default=None)
        if before is not None:
            history = np.array([before], np.int64)
        elif len(ids):
            history, tail, start = ids[:1], data[int(starts[1]) :], False
        else:
            raise UsageError("byte_level: an empty prompt, and no token to begin with")
    fixed = len(pieces[-1]) if settings.search == "healing" and pieces and not more else 0
    found = Covers(
        text=text,
        settings=settings,
        history=history,
        start=start,
        fixed=fixed if len(tail) == fixed else 0,
        tail=tail,
        ends=(frozenset({()}),),
        pending=(Pending(tokens=(), begin=0, weight=0.0),),
    )
    ends = [found.ends_of(tail[:size]) for size in range(1, len(tail) + 1)]
    return replace(found, ends=(frozenset({()}), *ends))


def text_after(
    tokenizer: Tokenizer, prompt: IntArray, tokens: Sequence[Token], settings: Settings
) -> tuple[IntArray, bytes]:
    """Return a text as :func:`begin_covers` takes it: token ids, and bytes after them.

    Parameters
    ----------
    prompt : int64 (T,)
    tokens : sequence of Token
        What follows the prompt; only their bytes count, but for control tokens.
    """
    ids, more = prompt, b""
    for token in tokens:
        if token.id in tokenizer.special_ids and token.piece is None:
            covers = begin_covers(tokenizer, ids, settings, more)
            ids, more = covers.append_special(token.id).history, b""
        else:
            more += token_piece(token, tokenizer)
    return ids, more


def _tokens_before_cut(
    text: Canonical,
    data: bytes,
    pieces: Sequence[bytes],
    starts: IntArray,
    settings: Settings,
    more: bool,
) -> int:
    """Return how many of the text's tokens stand before the cut."""
    if settings.search == "naive":
        return len(pieces)
    if settings.search == "healing" and not more:
        return max(0, len(pieces) - 1)
    where = {int(at): count for count, at in enumerate(starts)}
    at = text.last_cut(data)
    while at and at not in where:  # tokens of someone else's making cross the boundary
        at = text.last_cut(data[:at])
    if len(data) - at <= SOFT_TAIL:
        return where.get(at, 0)
    # No boundary near: begin at a token's edge, far enough back for covers to differ only later.
    for count in range(len(pieces), -1, -1):
        if len(data) - int(starts[count]) >= SOFT_REST:
            rest = text.encode(data[int(starts[count]) :], False)
            if rest is not None or count == 0:
                return count
    return 0
