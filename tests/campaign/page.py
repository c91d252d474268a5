"""The page of all parts, made from their CSV files alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from gtddp_dist.files import write_text_atomically

from .part import Part
from .table import Table

HEAD = """# Reliability

What training runs survive. The tables are made from the CSV files in this folder, each of whose rows is a case that was
run, by `make campaign` ([CONTRIBUTING.md](../../CONTRIBUTING.md)). What the campaign has found, with causes:
[found.md](found.md). The last row of a case counts; cases of which an earlier row says that they failed are named.
"""


def write_page(folder: Path, parts: Iterable[Part]) -> None:
    """Writes `README.md` beside the CSV files."""
    sections = [HEAD, *(section(part, Table(part, folder / f"{part.name}.csv")) for part in parts)]
    write_text_atomically(folder / "README.md", "\n".join(sections))


def section(part: Part, table: Table) -> str:
    """Title, what is done, the table, and the cases that failed."""
    lines = [f"## {part.title}", "", part.goal, ""]
    rows = list(table.newest().values())
    if not rows:
        return "\n".join([*lines, f"Not run: `make campaign PARTS={part.name}`.", ""])
    failed_before = {row["case"] for row in table.read() if row["ok"] == "no"} - {
        row["case"] for row in rows if row["ok"] == "no"
    }
    good = [row for row in rows if row["ok"] == "yes"]
    told = f"**{len(good)} of {len(rows)} run are as they should be; {len(rows)} of {rows[-1]['of']} cases were run**"
    lines += [f"{told} ({_span(rows)}; {table.file.name}).", ""]
    if failed_before:
        lines += [f"Failed in an earlier run, and not in the last one: {', '.join(sorted(failed_before))}.", ""]
    lines += [_summary(part, rows), ""]
    failed = [row for row in rows if row["ok"] == "no"]
    lines += [f"* {row['case']}: {_plain(row['problem'])}" for row in failed]
    return "\n".join([*lines, ""] if failed else lines)


def _summary(part: Part, rows: Sequence[Mapping[str, str]]) -> str:
    by = [name for name, kind in part.columns.items() if kind == "group"]
    shown = {name: kind for name, kind in part.columns.items() if kind in ("holds", "number")}
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    heads = [f"{name}, median (largest)" if kind == "number" else name for name, kind in shown.items()]
    lines = [
        [
            *key,
            str(len(some)),
            str(sum(row["ok"] == "yes" for row in some)),
            *(_numbers(some, name) if kind == "number" else _holds(some, name) for name, kind in shown.items()),
        ]
        for key, some in sorted(groups.items())
    ]
    return tabulate(lines, [*by, "run", "as it should be", *heads], tablefmt="github", disable_numparse=True)


def _holds(rows: Sequence[Mapping[str, str]], column: str) -> str:
    """Of how many cases it holds."""
    asked = [row[column] for row in rows if row[column] in ("yes", "no")]
    return f"{asked.count('yes')} of {len(asked)}" if asked else ""


def _numbers(rows: Sequence[Mapping[str, str]], column: str) -> str:
    found = [float(row[column]) for row in rows if row[column] not in ("-", "")]
    return f"{statistics.median(found):.3g} ({max(found):.3g})" if found else ""


def _span(rows: Sequence[Mapping[str, str]]) -> str:
    days = sorted(row["date"][:10] for row in rows)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    revisions = sorted({row["revision"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    return f"{when}, revision {', '.join(revisions)}, seed {', '.join(seeds)}"


def _plain(text: str) -> str:
    """A problem, short and without what Markdown would take for more."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")[:400]
