"""Keeping only some layers of a model: how a choice is written, checked and named.

A model without some of its layers is a cheap relative of itself: same tokenizer, same embedding,
same head, so it can draft for the whole one or disagree with it (self-speculation,
arXiv:2309.08168). Every engine builds it from the kept layers, renumbered from 0.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

from .errors import UsageError

LayerChoice = int | str | Sequence[int]

_EXAMPLE = 'write a number (the first so many) or a list such as "0-9,20-29"'
_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_MOST = 1 << 16


def read_layers(choice: LayerChoice) -> int | tuple[int, ...]:
    """Check how a choice of layers is written, before a model is known.

    Parameters
    ----------
    choice : int, str or sequence of int
        A number n (also as text) means the first n layers; a text such as ``"0-9,20-29"``, or the
        numbers themselves, means those layers, both ends included, counted from 0.

    Returns
    -------
    int or tuple of int
        n, or the strictly rising numbers.

    Raises
    ------
    UsageError
        One line that names the value and how to write it.
    """
    numbers: list[int] = []
    if isinstance(choice, str):
        text = "".join(choice.split())
        if text.isdecimal() and len(text) <= 6:
            return read_layers(int(text))
        for part in text.split(","):
            found = _PART.fullmatch(part)
            if found is None:
                raise UsageError(f"layers {choice!r}: {_EXAMPLE}")
            first, last = int(found[1]), int(found[2] or found[1])
            if last < first or last >= _MOST:
                raise UsageError(f"layers {choice!r}: {part!r} is not a rising range")
            numbers += range(first, last + 1)
    elif isinstance(choice, int) and not isinstance(choice, bool):
        if choice < 1:
            raise UsageError(f"layers {choice}: at least 1 must be kept")
        return choice
    elif isinstance(choice, Sequence) and choice:
        numbers = [*choice]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
            raise UsageError(f"layers {choice!r}: {_EXAMPLE}")
    else:
        raise UsageError(f"layers {choice!r}: {_EXAMPLE}")
    for before, after in itertools.pairwise(numbers):
        if after <= before:
            raise UsageError(
                f"layers {layers_text(numbers)}: {after} stands after {before}; "
                "numbers must rise, each once"
            )
    return tuple(numbers)


def choose_layers(choice: LayerChoice | None, total: int, *, model: str) -> tuple[int, ...] | None:
    """Return the layers to keep of a model that has ``total``; None when that is all of them.

    Raises
    ------
    UsageError
        The choice is not written rightly, or names a layer that the model does not have.
    """
    if choice is None:
        return None
    read = read_layers(choice)
    kept = tuple(range(read)) if isinstance(read, int) else read
    if kept[0] < 0 or kept[-1] >= total:
        said = f"the first {read}" if isinstance(read, int) else layers_text(kept)
        raise UsageError(f"layers {said}: {model} has {total} layers, numbered 0..{total - 1}")
    return None if len(kept) == total else kept


def layers_text(layers: Sequence[int]) -> str:
    """Return the short form of layer numbers: ``(0, 1, 2, 7)`` is ``"0-2,7"``.

    It reads back to the same layers; a lone layer is written ``"7-7"``, since ``"7"`` would mean
    the first seven.
    """
    parts: list[list[int]] = []
    for i in layers:
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    if len(parts) == 1:
        return f"{parts[0][0]}-{parts[0][1]}"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def kept_facts(
    name: str, fingerprint: str, extra: Mapping[str, str], kept: Sequence[int] | None
) -> dict[str, object]:
    """Return the fields of ``ModelInfo`` that tell which layers of which weights these are.

    The fingerprint is the same on every engine, as that of the whole weights is.
    """
    if kept is None:
        return {"name": name, "fingerprint": fingerprint, "extra": dict(extra)}
    text = layers_text(kept)
    return {
        "name": f"{name} layers {text}",
        "fingerprint": hashlib.sha256(f"{fingerprint} layers {text}".encode()).hexdigest(),
        "extra": {**extra, "layers": text},
    }


def check_period(kept: Sequence[int] | None, period: int, *, where: str, why: str) -> None:
    """Refuse a choice that gives a layer another kind, where the kind follows from its number.

    Parameters
    ----------
    period : int
        The kind of layer ``i`` depends on ``i % period``.
    where, why : str
        For the message: which file or model, and what depends on the number.

    Raises
    ------
    UsageError
        With the nearest remedy.
    """
    for new, old in enumerate(kept or ()):
        if new % period != old % period:
            raise UsageError(
                f"layers: {where}: {why} by their number, every {period}; layer {old} would become "
                f"number {new}: leave out whole groups of {period}, or use --backend torch"
            )
