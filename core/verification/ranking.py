"""Choosing among several answers: by distance, and by votes of those that are near."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def nearest_first(distances: Sequence[float | None]) -> list[int]:
    """Return the places of candidates by rising distance.

    Equal distances keep their order; candidates without one come last.
    """
    far = float("inf")
    keys = [far if d is None else d for d in distances]
    return sorted(range(len(keys)), key=lambda i: (distances[i] is None, keys[i]))


def majority(answers: Sequence[str | None], order: Sequence[int]) -> int | None:
    """Return the place whose answer most of ``order`` gives; None where none has an answer.

    Parameters
    ----------
    answers : sequence of str or None
        One per candidate; None cannot vote.
    order : sequence of int
        Who votes, best first: among answers with equally many votes the one whose best voter comes
        first wins, and that voter's place is returned.
    """
    voters = [place for place in order if answers[place] is not None]
    votes = Counter(answers[place] for place in voters)
    most = max(votes.values(), default=0)
    return next((place for place in voters if votes[answers[place]] == most), None)


_MARKED = re.compile(r"####[ \t]*([^\n]*)")


def final_answer(text: str) -> str | None:
    r"""Return the last ``\boxed{...}`` or ``#### ...`` of a text, white space and ``$`` removed.

    None where there is none, or where it is empty.
    """
    found = _boxed(text)
    if found is None:
        marked = _MARKED.findall(text)
        found = marked[-1] if marked else None
    if found is None:
        return None
    bare = re.sub(r"\s+|\$", "", found).rstrip(".").replace(",\\!", "").replace("\\!", "")
    return bare or None


def _boxed(text: str) -> str | None:
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    begin, depth = at + len("\\boxed{"), 1
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin:i]
    return None
