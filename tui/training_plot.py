"""The loss curves that ``steersman train`` writes beside its results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def write_loss_plot(
    path: Path, history: Sequence[tuple[int, float, float | None]], *, title: str
) -> None:
    """Draw training and validation loss against the step; whole file or none.

    Parameters
    ----------
    path : Path
        Ends in .svg, .png or .pdf.
    history : sequence of (step, training loss, validation loss or None)
    title : str
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.plot([h[0] for h in history], [h[1] for h in history], label="training")
    held = [(step, value) for step, _, value in history if value is not None]
    if held:
        axis.plot(*zip(*held), label="validation")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_title(title, parse_math=False)
    axis.legend()
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format=path.suffix[1:].lower())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)
