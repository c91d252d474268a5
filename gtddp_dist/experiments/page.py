"""Files of an experiment: its tables as CSV and Markdown, its pictures, its page, and the index of all pages."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from ..files import write_atomically, write_text_atomically
from .plan import DEFAULT_SEEDS, Plan
from .pool import Origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TableCell = str | int | float | bool | None
Rows = list[list[TableCell]]
_DPI = 130


@dataclass(frozen=True)
class Table:
    """Numbers of an experiment.

    Attributes:
        name: `<experiment>-<name>.csv` is its file; "": `<experiment>.csv`.
        title: above it, on the page.
        columns: heading -> format of its numbers on the page (".3g"); "" for text. The CSV has all digits.
        rows: a cell for each column; None where there is no number.
        on_page: whether the page shows it, or only links to the file.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[TableCell]]
    on_page: bool = True

    def csv(self) -> str:
        """The file's text."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return text.getvalue()

    def markdown(self) -> str:
        """The table of the page."""
        rows = [
            [_escaped(_shown(cell, form)) for cell, form in zip(row, self.columns.values(), strict=True)]
            for row in self.rows
        ]
        head = [_escaped(name) for name in self.columns]
        align = ["right" if form else "left" for form in self.columns.values()]
        return tabulate(rows, head, tablefmt="github", disable_numparse=True, colalign=align)


@dataclass(frozen=True)
class Findings:
    """What an experiment came to.

    Attributes:
        setting: what was run, in sentences.
        conclusion: what follows, in sentences made from the numbers.
        tables: every number of the page is in one of them.
        figures: ending of the file's name ("" for the only one) -> picture.
        captions: ending -> sentence below the picture.
    """

    setting: str
    conclusion: str
    tables: Sequence[Table]
    figures: Mapping[str, Figure]
    captions: Mapping[str, str] = field(default_factory=dict)


def write_page(
    out: Path, name: str, title: str, question: str, plan: Plan, found: Findings, origins: Sequence[Origin]
) -> Path:
    """Writes CSVs, PNGs and last `OUT/<name>.md`; its path."""
    lines = [f"# {title}", "", question, "", found.conclusion, "", "## What was run", "", found.setting, ""]
    for ending, figure in found.figures.items():
        file = out / f"{name}{ending and '-'}{ending}.png"
        write_atomically(file, functools.partial(figure.savefig, dpi=_DPI))
        caption = found.captions.get(ending, title)
        lines += [f"![{caption}]({file.name})", "", caption, ""]
    for table in found.tables:
        file = out / f"{name}{table.name and '-'}{table.name}.csv"
        write_text_atomically(file, table.csv())
        if table.on_page:
            lines += [f"## {table.title}", "", table.markdown(), "", f"([{file.name}]({file.name}))", ""]
        else:
            lines += [f"{table.title}: [{file.name}]({file.name})", ""]
    lines += _footer(name, plan, origins)
    path = out / f"{name}.md"
    write_text_atomically(path, "\n".join(lines))
    return path


def command_of(name: str, plan: Plan) -> str:
    """The command line that makes an experiment's page."""
    words = [f"data.name={plan.data}", f"seeds={plan.seeds}", *plan.words]
    return " ".join(["gtddp reproduce", name, *(["--quick"] if plan.quick else []), *words])


def _footer(name: str, plan: Plan, origins: Sequence[Origin]) -> list[str]:
    def all_of(values: Sequence[str]) -> str:
        return "; ".join(sorted(set(values)))

    dates = sorted({origin.date for origin in origins})
    return [
        "## How",
        "",
        f"    {command_of(name, plan)}",
        "",
        *(["The quick form: too short to say anything about the method.", ""] if plan.quick else []),
        f"* date: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        f"* hardware: {all_of([origin.cpu for origin in origins])}",
        f"* versions: {all_of([origin.versions for origin in origins])}",
        f"* revision: {all_of([origin.revision for origin in origins])}",
        "",
    ]


def write_index(out: Path, titles: Mapping[str, str], data_sets: Sequence[str]) -> None:
    """Writes `OUT/README.md`: a line for each experiment, and what was not run, with the command that runs it."""
    lines = [
        "# The papers' tables and figures",
        "",
        "Made by `gtddp reproduce`; every number comes from a CSV file here.",
        "",
    ]
    there = [name for name in titles if (out / f"{name}.md").is_file()]
    lines += [f"* [{name}]({name}.md): {titles[name]}" for name in there]
    lines += ["", "## Not run", ""]
    lines += [f"* {name}: {title}: `gtddp reproduce {name}`" for name, title in titles.items() if name not in there]
    lines += [
        f"* {data}, all of it: `gtddp reproduce all data.name={data} data.dir=DIR seeds={DEFAULT_SEEDS} --out "
        f"results-{data}`"
        for data in data_sets
        if data != "digits"
    ]
    write_text_atomically(out / "README.md", "\n".join([*lines, ""]))


def number_of(cell: TableCell) -> float:
    """A cell that holds a number."""
    assert isinstance(cell, int | float), cell
    return float(cell)


def _escaped(text: str) -> str:
    """As a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _shown(cell: TableCell, form: str) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return format(cell, form) if form and isinstance(cell, int | float) else str(cell)
