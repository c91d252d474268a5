"""The CSV file of a part: rows are only ever added, the last one of a case counts."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from .part import Part, Row

COMMON = ("case", "of", "seed", "date", "revision", "ok")
"""Columns of every part, before its own; `problem` is the last one. of: how many cases the part has."""


@dataclass(frozen=True)
class Table:
    """The rows of a part so far."""

    part: Part
    file: Path

    @property
    def columns(self) -> Sequence[str]:
        """All, in their order."""
        return [*COMMON, *self.part.columns, "problem"]

    def read(self) -> list[Mapping[str, str]]:
        """All rows, oldest first."""
        if not self.file.exists():
            return []
        with open(self.file, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def newest(self) -> dict[str, Mapping[str, str]]:
        """Case -> its last row."""
        return {row["case"]: row for row in self.read()}

    def add(self, case: str, of: int, seed: int, row: Row) -> None:
        """Adds a row, whole or not at all."""
        unknown = row.values.keys() - self.part.columns.keys()
        if unknown:
            raise ValueError(f"{self.part.name}: no column is called {min(unknown)!r}")
        common = {
            "case": case,
            "of": str(of),
            "seed": str(seed),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "revision": revision(),
            "ok": "no" if row.problem else "yes",
            "problem": " ".join(row.problem.split()),
        }
        line = io.StringIO()
        writer = csv.DictWriter(line, self.columns, restval="-", lineterminator="\n")
        if not self.file.exists():
            writer.writeheader()
        writer.writerow({**row.values, **common})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.getvalue().encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def revision() -> str:
    """Of the code, with + where gtddp_dist differs from it."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "gtddp_dist"], check=False).returncode == 1
    return (found.stdout.strip() or "unknown") + ("+" if changed else "")
