"""Labels for the router: which tokens of a small model would lead a large one astray."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..api import generate
from ..model import IntArray, Model

Continue = Callable[[Sequence[int]], str]
_SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f\n]")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
JUDGE = """Two versions of one passage differ from the marked word on.

Context:
{context}

Version A: {a}
Version B: {b}

Does version B change the meaning, the reasoning or the conclusion of version A? Answer with 1 for \
yes or 0 for no, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels of one text's tokens.

    Attributes
    ----------
    divergent : int64 (n,)
        1: to be routed, 0: not, -1: not known (a judge gave no answer), to be left out.
    differs : bool (n,)
        Where the small model would have chosen another token.
    """

    divergent: IntArray
    differs: np.ndarray


def mismatch_labels(choice: IntArray, answer: Sequence[int]) -> Labels:
    """Return labels that call every differing token divergent: the most cautious router.

    Parameters
    ----------
    choice : int64 (n,)
        The small model's greedy tokens, each given the large model's text before it.
    answer : sequence of int (n,)
        The large model's text.
    """
    differs = np.asarray(choice) != np.asarray(answer)
    return Labels(divergent=differs.astype(np.int64), differs=differs)


def answer_labels(
    model: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    choice: IntArray,
    *,
    max_tokens: int,
    checks: int,
    final: Callable[[str], str | None] | None = None,
) -> Labels:
    """Return labels by trying: does the large model still reach its answer from the other token?

    At each differing token the small model's choice is put in, the large model finishes greedily,
    and the token is divergent if the final answer changes.

    Parameters
    ----------
    model : Model
        The large one.
    prompt, answer : sequence of int
    choice : int64 (n,)
    max_tokens : int
        Of each continuation.
    checks : int
        Differing tokens that are tried, evenly spread; the others get the label -1.
    final : callable, optional
        Text to final answer, None if it has none; the last number in it by default.
    """
    final = final or last_number
    labels = mismatch_labels(choice, answer)
    decode = model.tokenizer.token_bytes
    goal = final(b"".join(map(decode, answer)).decode(errors="replace"))
    places = np.flatnonzero(labels.differs)
    tried = set(places[_spread(len(places), checks)].tolist())
    divergent = np.zeros(len(answer), np.int64)
    divergent[places] = -1
    for at in sorted(tried):
        begun = [*answer[:at], int(choice[at])]
        text = _finish(model, [*prompt, *begun], max_tokens)
        whole = b"".join(map(decode, begun)).decode(errors="replace") + text
        divergent[at] = int(final(whole) != goal)
    return Labels(divergent=divergent, differs=labels.differs)


def judge_labels(
    model: Model,
    judge: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    choice: IntArray,
    *,
    max_tokens: int,
    checks: int,
) -> Labels:
    """Return labels by asking a judge whether the small model's sentence means something else.

    The large model continues both its own text and the one with the small model's token to the end
    of the sentence; the judge, any chat model, sees both with the token marked.

    Parameters
    ----------
    model, judge : Model
    prompt, answer : sequence of int
    choice : int64 (n,)
    max_tokens : int
        Of each sentence.
    checks : int
        Differing tokens that are judged, evenly spread; the others get the label -1.
    """
    labels = mismatch_labels(choice, answer)
    places = np.flatnonzero(labels.differs)
    divergent = np.zeros(len(answer), np.int64)
    divergent[places] = -1
    for at in places[_spread(len(places), checks)].tolist():
        before = _text(model, answer[:at])
        rest = _text(model, answer[at + 1 :])
        other = _finish(model, [*prompt, *answer[:at], int(choice[at])], max_tokens, sentence=True)
        question = JUDGE.format(
            context=before[-2000:],
            a=_marked(_text(model, [answer[at]]), rest),
            b=_marked(_text(model, [int(choice[at])]), other),
        )
        reply = generate(
            judge, [{"role": "user", "content": question}], profile="greedy", max_tokens=16
        )
        divergent[at] = parse_verdict(reply.text)
    return Labels(divergent=divergent, differs=labels.differs)


def parse_verdict(reply: str) -> int:
    """Return a judge's 1 or 0; -1 if the reply holds neither as a word of its own."""
    found = re.search(r"(?<![\w.])([01])(?![\w.]*\w)", reply)
    return int(found.group(1)) if found else -1


def last_number(text: str) -> str | None:
    """Return the last number of a text in plain digits."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def _spread(count: int, most: int) -> IntArray:
    """Return at most ``most`` of ``count`` places, evenly spread."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def _text(model: Model, ids: Sequence[int]) -> str:
    return b"".join(map(model.tokenizer.token_bytes, ids)).decode(errors="replace")


def _marked(token: str, rest: str) -> str:
    end = _SENTENCE.search(rest)
    return f"<<{token.strip()}>>{rest[: end.end()] if end else rest}"


def _finish(model: Model, ids: Sequence[int], max_tokens: int, *, sentence: bool = False) -> str:
    stop = (".", "!", "?", "\n") if sentence else ()
    return generate(model, list(ids), profile="greedy", max_tokens=max_tokens, stop=stop).text
