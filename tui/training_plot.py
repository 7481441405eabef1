"""What ``steersman train`` tells of a training: a table, its losses, and their curves as a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import output
from .envelope import Envelope


def report_training(
    envelope: Envelope,
    path: Path,
    history: Sequence[tuple[int, float, float]],
    *,
    kind: str,
    title: str,
    of: str,
    facts: Mapping[str, Any],
    result: Mapping[str, Any],
    also: Sequence[str] = (),
) -> None:
    """Fill ``envelope`` with what was trained, draw the losses, and print the table.

    Parameters
    ----------
    path : Path
        File that was written; the plot stands beside it, where matplotlib is installed.
    history : sequence of (step, training loss, validation loss)
    kind : str
        Name of the file among the artifacts.
    title : str
        Of the plot.
    of : str
        What was held out: "texts".
    facts : mapping
        What training measured.
    result : mapping
        More of the result, before the history.
    also : sequence of str
        Keys of ``result`` that the table has as well.
    """
    envelope.artifacts = {kind: path}
    if find_spec("matplotlib") is not None:
        plot = path.with_suffix(".svg")
        write_loss_plot(plot, history, title=title)
        envelope.artifacts["plot"] = plot
    envelope.metrics = dict(facts)
    losses = [{"step": step, "training": t, "validation": held} for step, t, held in history]
    envelope.result = {**result, "history": losses}
    if envelope.json:
        return
    rows = [[key, value] for key, value in facts.items()] + [[key, result[key]] for key in also]
    print(output.table(rows, header=[f"on the held-out {of}", ""]))
    envelope.note_artifacts()


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
