"""The picture of a sweep: its metric against the learning rate, a curve for each optimizer or variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from .result import Result
from .space import show
from .spec import SweepSpec

RATE = "optimizer.lr"
_MARKERS = "osD^vPX*"
_TICKS = 10  # of fewer values each has its tick


def plot_sweep(path: Path, results: Sequence[Result], spec: SweepSpec, keys: Sequence[str], title: str) -> bool:
    """Draws the picture: at each rate the mean over the seeds, and a band from the lowest to the highest of them.

    Where other parameters vary too, the one of their combinations with the best mean counts at each rate. A cross at
    the foot stands for a trial that failed there. Without several learning rates the first numeric parameter that
    varies is the axis.

    Args:
        path: the PNG file to write.
        results: of all trials.
        spec: of the sweep.
        keys: parameters that vary.
        title: above the picture.

    Returns whether there is anything to draw: trials that are done, and a number that varies.
    """
    axis = _axis(results, keys)
    if axis is None:
        return False
    # Imported here: it takes a second, and draws without a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    others = [key for key in keys if key not in (axis, "train.seed")]
    seeds = "train.seed" in keys
    labels = dict.fromkeys(result.trial.label for result in sorted(results, key=lambda result: result.trial.name))
    for number, label in enumerate(labels):
        members = [result for result in results if result.trial.label == label]
        color, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
        curve = _curve(members, spec, axis, others)
        rates = [rate for rate, _ in curve]
        means = [sum(values) / len(values) for _, values in curve]
        line = "" if spec.method == "random" else "-"
        axes.plot(rates, means, line, label=label, color=color, marker=marker, markersize=5, linewidth=1.5)
        if seeds:
            low, high = [min(values) for _, values in curve], [max(values) for _, values in curve]
            if spec.method == "random":
                spread = [
                    [mean - low[i] for i, mean in enumerate(means)],
                    [high[i] - mean for i, mean in enumerate(means)],
                ]
                axes.errorbar(rates, means, yerr=spread, fmt="none", ecolor=color, alpha=0.5)
            else:
                axes.fill_between(rates, low, high, color=color, alpha=0.2, linewidth=0)
        failed = sorted({result.value(axis) for result in members if result.status.state in ("failed", "killed")})
        if failed:
            # At one height for each label, above the axis: where they would lie nobody knows.
            height = [0.02 + 0.03 * number] * len(failed)
            axes.plot(failed, height, "x", color=color, transform=axes.get_xaxis_transform(), label=f"{label}: failed")
    rates = sorted({result.value(axis) for result in results})
    if rates[0] > 0 and rates[-1] / rates[0] > 5:
        axes.set_xscale("log")
    if len(rates) <= _TICKS:
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xticks([], minor=True)
    if "accuracy" in spec.metric:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif not spec.more_is_better and axes.get_ylim()[0] > 0 and axes.get_ylim()[1] / axes.get_ylim()[0] > 20:
        axes.set_yscale("log")
    note = "mean, lowest and highest of the seeds" if seeds else "one seed"
    if others:
        note += f"; best of {', '.join(others)}"
    name = "learning rate" if axis == RATE else axis
    axes.set(xlabel=f"{name} ({axis})" if axis == RATE else name, ylabel=_NAMES[spec.metric], title=f"{title}\n{note}")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    return True


_NAMES = {
    "val/accuracy": "validation accuracy at the end",
    "val/accuracy_best": "best validation accuracy of the run",
    "val/loss": "validation loss at the end (cross-entropy)",
    "train/loss": "training loss of the last epoch (cross-entropy)",
    "seconds_per_step": "seconds a training step",
}


def _axis(results: Sequence[Result], keys: Sequence[str]) -> str | None:
    """The key that the metric is drawn against; None where no trial is done, or no number varies."""
    if all(result.status.state != "done" for result in results):
        return None
    numeric = [
        key
        for key in keys
        if key != "train.seed"
        and all(
            isinstance(result.trial.values.get(key), int | float) and not isinstance(result.trial.values.get(key), bool)
            for result in results
        )
    ]
    return RATE if RATE in numeric else next(iter(numeric), None)


def _curve(
    members: Sequence[Result], spec: SweepSpec, axis: str, others: Sequence[str]
) -> list[tuple[float, list[float]]]:
    """Rate and the metric of its seeds, by increasing rate; of several settings at a rate the best on average."""
    found: dict[float, dict[tuple[str, ...], list[float]]] = {}
    for result in members:
        value = result.metric(spec.metric)
        if value is not None:
            setting = tuple(show(result.trial.values.get(key)) for key in others)
            found.setdefault(result.value(axis), {}).setdefault(setting, []).append(value)
    best = max if spec.more_is_better else min
    return [
        (rate, best(settings.values(), key=lambda values: sum(values) / len(values)))
        for rate, settings in sorted(found.items())
    ]
