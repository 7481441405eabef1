"""The plot of ``steersman slop profile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .safe_text import show_line

if TYPE_CHECKING:
    from steersman.core.slop import Entry, SlopProfile

_BARS = 30


def write_plot(path: Path, found: SlopProfile) -> None:
    """Draw the most over-used words, phrases and n-grams; the file appears whole or not at all."""
    import os

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 8), layout="constrained")
    figure.suptitle(
        f"Over-used in {found.texts} texts ({found.chars:,} characters), against {found.human}",
        parse_math=False,
    )
    _bars(axes[0], [e for e in found.words if e.ratio], "words: times as often as people", True)
    _bars(axes[1], found.phrases, "phrases: occurrences", False)
    _bars(axes[2], found.ngrams, "n-grams without stopwords: per 100,000 characters", None)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format=path.suffix[1:].lower())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)


def _bars(axis: Any, entries: Sequence[Entry], title: str, ratio: bool | None) -> None:
    shown = list(entries[:_BARS])[::-1]
    values = [e.ratio if ratio else e.count if ratio is False else e.rate for e in shown]
    labels = [show_line(e.text) for e in shown]
    axis.barh(range(len(shown)), values, color="tab:blue")
    axis.set_yticks(range(len(shown)), labels, parse_math=False)
    axis.set_title(title)
    if ratio:
        axis.set_xscale("log")
    axis.margins(y=0.01)
