"""`curves.png`: training loss and validation accuracy against training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .files import write_atomically
from .run_directory import Record


def plot_curves(path: Path, runs: Mapping[str, Sequence[Record]], title: str) -> None:
    """Draws the curves of one or several runs into one picture.

    Args:
        path: the PNG file to write.
        runs: label in the legend -> lines of the run's metrics.
        title: above the picture.
    """
    # Imported here: it takes a second, and only the end of a run needs it. The Figure class draws without a
    # display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for label, records in runs.items():
        steps, losses = _series(records, "train/loss")
        loss.plot(steps, losses, label=label, linewidth=1.2)
        steps, accuracies = _series(records, "val/accuracy")
        accuracy.plot(steps, [100 * value for value in accuracies], label=label, marker="o", markersize=3)
    # A logarithmic axis has no place for the loss 0, which a float32 run can reach.
    loss.set_yscale("log", nonpositive="mask")
    loss.set(xlabel="training step", ylabel="training loss (cross-entropy)", title="Training loss")
    accuracy.set(xlabel="training step", ylabel="validation accuracy (%)", title="Validation accuracy")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _series(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have the value."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]
