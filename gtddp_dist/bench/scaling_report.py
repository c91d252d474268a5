"""What grids came to, joined: a table as CSV and Markdown, and a picture."""

from __future__ import annotations

import csv
import io
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, cast

from tabulate import tabulate

from ..errors import OK, UserError
from ..files import write_atomically, write_text_atomically

FORMAT = "gtddp-scaling"
_VERSION = 1
_SAME = ("configuration", "model", "optimizer", "batch_size", "micro_batches")
"""What all grids of one table have in common."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured on one grid.

    Attributes:
        pipe, data: the grid.
        mode: "strong": the batch is the same on every grid; "weak": that of a replica is.
        batch_size: samples of a step, over all replicas.
        seconds, fastest, slowest: of a step; the first is the median.
        sent_mb: largest number of megabytes that a rank sends in a step.
        busy, least_busy: share of the time that a rank does not wait for others: the mean over ranks, the least.
    """

    pipe: int
    data: int
    mode: Literal["strong", "weak"]
    batch_size: int
    seconds: float
    fastest: float
    slowest: float
    sent_mb: float
    busy: float
    least_busy: float

    @property
    def ranks(self) -> int:
        return self.pipe * self.data

    @property
    def samples_per_second(self) -> float:
        return self.batch_size / self.seconds


@dataclass(frozen=True)
class Scaled:
    """A row beside the smallest grid of its mode.

    Attributes:
        row: what was measured.
        efficiency: samples a second and rank, over those of the smallest grid.
    """

    row: Row
    efficiency: float


def scaled(rows: Sequence[Row]) -> list[Scaled]:
    """All rows with their efficiency: strong before weak, grids of few ranks first."""
    found = []
    for mode in ("strong", "weak"):
        own = sorted((row for row in rows if row.mode == mode), key=lambda row: (row.ranks, row.pipe))
        if own:
            per_rank = own[0].samples_per_second / own[0].ranks
            found += [Scaled(row, row.samples_per_second / row.ranks / per_rank) for row in own]
    return found


def join(folder: Path, *, as_json: bool) -> int:
    """Joins the figures of all grids in a folder: prints them, and writes scaling.csv, scaling.md and scaling.png.

    Raises:
        UserError: no figures there, or those of different configurations.
    """
    heading, rows = read_grids(folder)
    table = scaled(rows)
    markdown = _table(table, "github")
    write_text_atomically(folder / "scaling.csv", _csv(table))
    write_text_atomically(folder / "scaling.md", f"{heading}\n\n{markdown}\n")
    _plot(folder / "scaling.png", table, heading)
    print(json.dumps({"rows": [_fields(item) for item in table]}) if as_json else f"{heading}\n\n{_table(table)}")
    return OK


def read_grids(folder: Path) -> tuple[str, list[Row]]:
    """A heading, and the rows of all grids whose figures are in a folder.

    Raises:
        UserError: a file that cannot be used, or figures of different configurations; names the file.
    """
    files = sorted(folder.glob("grid-pipe-*-data-*.json"))
    if not files:
        raise UserError(
            f"{folder}: no figures of a grid there (grid-pipe-*-data-*.json): measure with --grid and --out"
        )
    first: Mapping[str, object] | None = None
    rows: list[Row] = []
    for file in files:
        content = _read(file)
        first = first or content
        for key in _SAME:
            if content[key] != first[key]:
                raise UserError(
                    f"{file}: {key} is {content[key]!r}, in {files[0].name} {first[key]!r}: the figures are of "
                    "different configurations; keep each in a folder of its own"
                )
        rows += [_row(file, item) for item in cast(list[object], content["rows"])]
    assert first is not None
    batch = first["batch_size"]
    heading = (
        f"{first['optimizer']} on {first['model']}: strong scaling with batch {batch}, weak scaling with {batch} a "
        f"replica; {first['micro_batches']} micro-batches"
    )
    return heading, rows


def _read(file: Path) -> Mapping[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}; measure this grid again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != _VERSION:
        raise UserError(f"{file}: no figures of bench scaling of version {_VERSION}; measure this grid again")
    missing = [key for key in (*_SAME, "rows") if key not in content]
    if missing or not isinstance(content["rows"], list) or not content["rows"]:
        raise UserError(f"{file}: missing {', '.join(missing) or 'rows'}; measure this grid again")
    return content


def _row(file: Path, item: object) -> Row:
    names = {field.name: str(field.type) for field in fields(Row)}
    if not isinstance(item, dict) or item.keys() != names.keys():
        raise UserError(f"{file}: rows: expected objects with the keys {', '.join(names)}; measure this grid again")
    for name, kind in names.items():
        value = item[name]
        right = value in typing.get_args(Literal["strong", "weak"])
        if kind in ("int", "float"):
            number = isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
            right = number and 0 <= value < float("inf")
        if not right:
            raise UserError(f"{file}: rows: {name} is {value!r}; measure this grid again")
    return Row(**item)


# ----------------------------------------------------------------------------------------------------------
# Table and picture


def _fields(item: Scaled) -> dict[str, object]:
    derived = {
        "ranks": item.row.ranks,
        "samples_per_second": item.row.samples_per_second,
        "efficiency": item.efficiency,
    }
    return {**asdict(item.row), **derived}


def _csv(table: Sequence[Scaled]) -> str:
    text = io.StringIO()
    rows = [_fields(item) for item in table]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(table: Sequence[Scaled], form: str = "simple") -> str:
    headers = (
        "scaling",
        "grid",
        "ranks",
        "batch",
        "seconds a step",
        "samples/s",
        "efficiency (%)",
        "MB sent",
        "busy (%)",
        "least busy (%)",
    )
    rows = [
        (
            item.row.mode,
            f"pipe={item.row.pipe},data={item.row.data}",
            item.row.ranks,
            item.row.batch_size,
            f"{item.row.seconds:.4g}",
            f"{item.row.samples_per_second:.4g}",
            f"{100 * item.efficiency:.1f}",
            f"{item.row.sent_mb:.4g}",
            f"{100 * item.row.busy:.1f}",
            f"{100 * item.row.least_busy:.1f}",
        )
        for item in table
    ]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=("left", "left", *["right"] * 8))


def _plot(path: Path, table: Sequence[Scaled], heading: str) -> None:
    """Samples a second against ranks, both logarithmic; a line for each number of segments, and what would be ideal."""
    # Imported here: it takes a second. The Figure class draws without a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), ("strong", "weak"), strict=True):
        own = [item.row for item in table if item.row.mode == mode]
        worlds = sorted({row.ranks for row in own})
        for pipe in sorted({row.pipe for row in own}):
            line = [row for row in own if row.pipe == pipe]
            speeds = [row.samples_per_second for row in line]
            axes.plot([row.ranks for row in line], speeds, marker="o", label=f"pipe={pipe}")
        if own:
            per_rank = own[0].samples_per_second / own[0].ranks
            axes.plot(worlds, [per_rank * n for n in worlds], color="grey", linestyle="--", label="ideal")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(worlds)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_locator(NullLocator())
        axes.set(xlabel="ranks", ylabel="samples a second", title=f"{mode} scaling")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(heading, fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
