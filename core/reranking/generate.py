"""The listwise baseline: generate the whole permutation, ``[B] > [A] > ...``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..array import array_namespace
from ..model import Capability
from .identifiers import LETTERS
from .reader import Comparison, Steps, WindowReader

_BRACKETED = re.compile(r"\[\s*([A-Z])\s*\]")
_ALONE = re.compile(r"\b([A-Z])\b")


def parse_permutation(text: str, size: int) -> tuple[tuple[int, ...], bool]:
    """Read a permutation of ``size`` places from an answer.

    Letters are taken in order of appearance; repeats and letters beyond the window are dropped and
    missing ones appended in their present order. Letters in brackets count; only if there are none
    do capital letters that stand alone.

    Parameters
    ----------
    text : str
        Such as ``"[B] > [A] > [C]"``.
    size : int
        1..26.

    Returns
    -------
    order : tuple of int (size,)
    malformed : bool
        True if anything had to be dropped or appended.
    """
    letters = _BRACKETED.findall(text) or _ALONE.findall(text)
    places = [LETTERS.index(letter) for letter in letters]
    kept = list(dict.fromkeys(place for place in places if place < size))
    missing = [place for place in range(size) if place not in kept]
    return (*kept, *missing), len(places) != size or bool(missing)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Greedy generation of the permutation, the way listwise rerankers did before FIRST.

    The prompt is the one ``first`` reads, ``[`` included, so the two differ in decoding alone.
    Decoding ends at the model's end token, when every letter of the window has been named, or
    after ``max_tokens``.

    Parameters
    ----------
    max_tokens : int, optional
        Limit per window; None takes what a full permutation needs, plus a few.

    References
    ----------
    Sun et al., "Is ChatGPT Good at Search?", arXiv:2304.09542; Pradeep et al., "RankZephyr",
    arXiv:2312.02724.
    """

    max_tokens: int | None = None
    requires: Mapping[str, Capability] = field(
        default_factory=lambda: {"target": Capability.LAST_LOGITS}, init=False, repr=False
    )
    logit_kind: str = field(default="none", init=False, repr=False)

    def compare(self, reader: WindowReader, query: str, passages: Sequence[str]) -> Comparison:
        """Order one window of 2..26 passages; see :meth:`First.compare`."""
        return reader.drive(self.steps(reader, query, passages))

    def steps(self, reader: WindowReader, query: str, passages: Sequence[str]) -> Steps[Comparison]:
        """Order one window, asking for logits instead of calling the model."""
        size = len(passages)
        tokenizer = reader.model.tokenizer
        limit = self.max_tokens
        if limit is None:
            full = " > ".join(f"[{letter}]" for letter in LETTERS[:size])
            limit = len(tokenizer.encode(full)) + 8
        logits = yield reader.fit(query, passages, reserve=limit)
        answer = bytearray(b"[")
        named: set[str] = set()
        for step in range(limit):
            token = int(array_namespace(logits).argmax(logits))
            if token in tokenizer.eos_ids:
                break
            if token not in tokenizer.special_ids:
                answer += tokenizer.token_bytes(token)
            named.update(x for x in _BRACKETED.findall(answer.decode(errors="replace")))
            if len(named & set(LETTERS[:size])) == size or step + 1 == limit:
                reader.counters.generated_tokens += 1
                break
            logits = yield token
        response = answer.decode(errors="replace")
        order, malformed = parse_permutation(response, size)
        reader.counters.malformed += malformed
        return Comparison(order=order, response=response, malformed=malformed)
