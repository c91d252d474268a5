"""What growth came to: exponents, what they say, a picture, and files."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from tabulate import tabulate

from ..checkpoint import JSON
from ..config_schema import Config
from ..files import write_atomically, write_text_atomically
from .growth import Axis, Point, configured
from .names import REFERENCE

QUANTITIES = {
    "seconds": "seconds a step",
    "peak_bytes": "peak memory (bytes)",
    "tensor_bytes": "tensors alive (bytes)",
    "flops": "operations",
}
"""What is fitted and drawn of every contender, and its name in the picture; fields of `step.Row`."""
_PHASES = ("forward", "input-gradient", "gram", "weight-gradient")
_SYMBOLS: Mapping[Axis, str] = {"batch": "B", "depth": "d", "width": "w"}


@dataclass(frozen=True)
class Slope:
    """How a quantity grows along an axis: as the size to this power.

    Attributes:
        axis: what is varied.
        optimizer: the contender.
        quantity: a field of `step.Row`, or "flops " and a phase.
        slope: of the straight line through all points, both logarithmic, by least squares.
        slope_at_end: between the two largest sizes.
    """

    axis: Axis
    optimizer: str
    quantity: str
    slope: float
    slope_at_end: float


def slopes(points: Sequence[Point]) -> list[Slope]:
    """Of every contender and quantity along every axis of at least two sizes; not of a quantity that is 0 somewhere."""
    found = []
    for axis, optimizer, line in _lines(points):
        quantities = [*QUANTITIES, *(f"flops {phase}" for phase in line[0].flops_by_phase)]
        for quantity in quantities:
            values = [_value(point, quantity) for point in line]
            if len(line) > 1 and min(values) > 0:
                x, y = [math.log(point.size) for point in line], [math.log(value) for value in values]
                slope = statistics.linear_regression(x, y).slope
                found.append(Slope(axis, optimizer, quantity, slope, (y[-1] - y[-2]) / (x[-1] - x[-2])))
    return found


def notes(config: Config, points: Sequence[Point]) -> list[str]:
    """What the exponents say, a sentence or two for each contender with Gram matrices along each axis."""
    fitted = {(s.axis, s.optimizer, s.quantity): s for s in slopes(points)}
    said = []
    for axis, optimizer, line in _lines(points):
        gram = fitted.get((axis, optimizer, "flops gram"))
        if gram is None:
            continue
        letter, last = _SYMBOLS[axis], line[-1]

        def power(quantity: str, letter: str = letter, key: tuple[Axis, str] = (axis, optimizer)) -> str:
            slope = fitted.get((*key, quantity))
            return "-" if slope is None else f"{letter}^{slope.slope:.2f}"

        plain = [f"{phase} {power(f'flops {phase}')}" for phase in _PHASES if phase != "gram"]
        share = 100 * last.flops_by_phase["gram"] / last.row.flops
        over = next(p for p in points if p.axis == axis and p.size == last.size and p.row.optimizer == REFERENCE)
        said.append(
            f"{axis}, {optimizer}: operations grow as {', '.join(plain)}; Gram matrices as {letter}^{gram.slope:.2f}, "
            f"{letter}^{gram.slope_at_end:.2f} at the end, where they are {share:.0f} % of all operations. "
            f"{_reason(axis, config)} Time grows as {power('seconds')}, operations as {power('flops')}, tensors as "
            f"{power('tensor_bytes')}; at {letter} = {last.size} a step takes "
            f"{last.row.seconds / over.row.seconds:.2f} times {REFERENCE}'s time and "
            f"{last.row.flops / over.row.flops:.2f} times its operations."
        )
    return said


def _reason(axis: Axis, config: Config) -> str:
    """What exponents are expected."""
    match axis:
        case "batch":
            scope = config.optimizer.scope
            groups = f" up to the recursion group's {scope} samples, B beyond" if isinstance(scope, int) else ""
            return (
                "Every sample has a forward pass, an input-gradient and a share of the weight-gradient of its own (B); "
                f"of a Gram matrix, forming per-sample gradients is B, products of pairs of samples are B^2{groups}. "
                "Where per-sample gradients are kept, the weight-gradient is little more than their weighted sum."
            )
        case "depth":
            return (
                "Blocks are all alike (d), and a Gram matrix is of one layer alone (d); what lies below 1 is the first "
                "and the last layers, which are there once."
            )
        case "width":
            return (
                "A layer between hidden channels is w^2, the first and the last are w; so are per-sample gradients and "
                "their products; pairs of positions are w. Activations are w, weights and per-sample gradients w^2."
            )


def content(config: Config, points: Sequence[Point]) -> dict[str, JSON]:
    """All of it, for JSON."""
    return {
        "growth_network": heading(config),
        "growth": [{**_flat(point), "flops_by_phase": dict(point.flops_by_phase)} for point in points],
        "growth_slopes": [asdict(slope) for slope in slopes(points)],
        "growth_notes": list(notes(config, points)),
    }


def write(folder: Path, config: Config, points: Sequence[Point]) -> None:
    """growth.csv, growth-slopes.csv, growth.md and growth.png."""
    write_text_atomically(folder / "growth.csv", _csv([_flat(point, phases=True) for point in points]))
    write_text_atomically(folder / "growth-slopes.csv", _csv([asdict(slope) for slope in slopes(points)]))
    write_text_atomically(folder / "growth.md", _page(config, points))
    _plot(folder / "growth.png", points, heading(config))


def heading(config: Config) -> str:
    """What was varied."""
    model, (channels, height, width) = config.model, config.bench.image
    start = configured(config)
    sizes = [f"batch {start.batch}"]
    sizes += [f"depth {start.depth}"] if start.depth is not None else []
    sizes += [f"width {start.width}"] if start.width is not None else []
    return (
        f"{model.name}, images of {channels} x {height} x {width}, {config.train.dtype}, "
        f"scope {config.optimizer.scope}: {', '.join(sizes)}, one of them varied at a time"
    )


# ----------------------------------------------------------------------------------------------------------
# Tables and picture


def _lines(points: Sequence[Point]) -> Iterator[tuple[Axis, str, list[Point]]]:
    """The points of every contender along every axis, small ones first."""
    for axis in get_args(Axis):
        for optimizer in dict.fromkeys(point.row.optimizer for point in points if point.axis == axis):
            yield axis, optimizer, [p for p in points if p.axis == axis and p.row.optimizer == optimizer]


def _value(point: Point, quantity: str) -> float:
    if quantity in QUANTITIES:
        return float(getattr(point.row, quantity))
    return point.flops_by_phase.get(quantity.removeprefix("flops "), 0.0)


def _flat(point: Point, *, phases: bool = False) -> dict[str, JSON]:
    row: dict[str, JSON] = {k: v for k, v in asdict(point.row).items() if not isinstance(v, dict)}
    by_phase: dict[str, JSON] = {f"flops {phase}": point.flops_by_phase.get(phase, 0.0) for phase in _PHASES}
    return {"axis": point.axis, **asdict(point.sizes), **row, **(by_phase if phases else {})}


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _page(config: Config, points: Sequence[Point]) -> str:
    fitted = {(s.axis, s.optimizer, s.quantity): s for s in slopes(points)}
    columns = [*QUANTITIES, *(f"flops {phase}" for phase in _PHASES)]
    titles = ("axis", "optimizer", "time", "peak memory", "tensors", "operations", *(f"op., {p}" for p in _PHASES))
    exponents = [
        (
            axis,
            optimizer,
            *(
                f"{s.slope:.2f} ({s.slope_at_end:.2f})" if (s := fitted.get((axis, optimizer, c))) is not None else "-"
                for c in columns
            ),
        )
        for axis, optimizer, line in _lines(points)
        if len(line) > 1
    ]
    measured = [
        (
            p.axis,
            p.size,
            p.row.optimizer,
            f"{1e3 * p.row.seconds:.4g}",
            f"{p.row.time_ratio_to_sgd:.2f}",
            f"{p.row.peak_bytes / 1e6:.4g}",
            f"{p.row.tensor_bytes / 1e6:.4g}",
            f"{p.row.flops / 1e9:.4g}",
        )
        for p in points
    ]
    heads = ("axis", "size", "optimizer", "ms a step", "time / sgd's", "peak MB", "tensors MB", "10^9 operations")
    parts = [
        "# How a step grows",
        heading(config) + ".",
        "![Growth](growth.png)",
        "Exponents: of the line through all sizes, in brackets between the two largest.",
        tabulate(exponents, titles, tablefmt="github", disable_numparse=True, colalign=["left", "left", *["right"] * 8])
        if exponents
        else "None: no axis has two sizes.",
        "\n".join(f"* {note}" for note in notes(config, points)),
        tabulate(measured, heads, tablefmt="github", disable_numparse=True),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plot(path: Path, points: Sequence[Point], title: str) -> None:
    """A column for every axis, a row for every quantity, and one for the phases of the first contender that has Gram
    matrices; all logarithmic."""
    # Imported here: it takes a second. The Figure class draws without a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axes = list(dict.fromkeys(point.axis for point in points))
    player = next((p.row.optimizer for p in points if "gram" in p.flops_by_phase), None)
    rows = len(QUANTITIES) + (player is not None)
    figure = Figure(figsize=(4.2 * len(axes), 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        for number, (quantity, name) in enumerate(QUANTITIES.items()):
            for other, optimizer, line in _lines(points):
                if other == axis:
                    values = [_value(point, quantity) for point in line]
                    grid[number][column].plot([p.size for p in line], values, marker="o", markersize=4, label=optimizer)
            grid[number][column].set(ylabel=name)
        for other, optimizer, line in _lines(points):
            if other == axis and optimizer == player:
                for phase in _PHASES:
                    values = [_value(point, f"flops {phase}") for point in line]
                    grid[-1][column].plot([p.size for p in line], values, marker="o", markersize=4, label=phase)
                grid[-1][column].set(ylabel=f"operations of {player}")
        for row in grid:
            sizes = sorted({point.size for point in points if point.axis == axis})
            row[column].set_xscale("log")
            row[column].set_yscale("log", nonpositive="mask")
            row[column].set_xticks(sizes)
            row[column].xaxis.set_major_formatter(ScalarFormatter())
            row[column].xaxis.set_minor_locator(NullLocator())
            row[column].set(
                xlabel={"batch": "batch size", "depth": "depth (blocks)", "width": "width (channels)"}[axis]
            )
            row[column].grid(alpha=0.3, which="both")
            row[column].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
