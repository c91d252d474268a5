"""What a part of the campaign is: cases, each of which gives a row of a table."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

Kind = Literal["group", "text", "holds", "number"]
"""Of a column. group: rows of the page's table are made by it; holds: yes, no, or - where it does not apply; number:
median and largest are shown; text: in the CSV alone."""


@dataclass(frozen=True)
class Row:
    """What came of a case."""

    problem: str
    """What should not be so; empty where all is as it should be."""
    values: Mapping[str, str]
    """Column -> what it says."""


@dataclass(frozen=True)
class Case:
    """One thing that befalls a run.

    Attributes:
        key: its name, the same for the same seed.
        run: makes the row, in an empty folder that is removed afterwards. An exception is a failed case.
        within_s: the time that it may take, in seconds.
        known: what columns say also where the case fails with an exception.
        needs_root: whether it mounts file systems or makes namespaces; it is left out for other users, and says so.
    """

    key: str
    run: Callable[[Path], Row]
    within_s: float = 60.0
    needs_root: bool = False
    known: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A part: at most 20 minutes.

    Attributes:
        name: also that of its CSV file.
        title: of its table.
        goal: what is done and has to hold, for the page.
        columns: of the CSV besides those that all parts have.
        cases: of a seed; `quick`: a few that show that everything runs.
        close: ends what the cases have shared.
    """

    name: str
    title: str
    goal: str
    columns: Mapping[str, Kind]
    cases: Callable[[int, bool], Sequence[Case]]
    close: Callable[[], None] = field(default=lambda: None)


def yes(holds: bool) -> str:
    """As columns that hold or not say it."""
    return "yes" if holds else "no"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block, which runs in the main thread, once it has taken so long."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"did not end within {seconds:.0f} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
