"""What the trials of a sweep came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..jobs.facts import read_summary
from ..jobs.status import RunStatus
from .space import Trial

METRICS = ("val/accuracy", "val/accuracy_best", "val/loss", "train/loss", "seconds_per_step")
"""Numbers of `summary.json` that tables have."""


@dataclass(frozen=True)
class Result:
    """A trial and what it came to."""

    trial: Trial
    status: RunStatus
    numbers: Mapping[str, float]
    """Those of `METRICS` that there are, and that are finite."""

    def metric(self, name: str) -> float | None:
        """A number of a trial that is done; None of another."""
        return self.numbers.get(name) if self.status.state == "done" else None

    def value(self, key: str) -> float:
        """The trial's value of a numeric key."""
        value = self.trial.values[key]
        assert isinstance(value, int | float), key
        return float(value)


def read_numbers(run: Path) -> dict[str, float]:
    """`METRICS` of a run; those that are missing or not finite are left out. Raises UserError."""
    summary = read_summary(run)
    found = {name: summary.get(name) for name in METRICS}
    return {
        name: float(value) for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def varied(trials: Sequence[Trial]) -> list[str]:
    """Keys that differ between trials, in the order of the sweep."""
    keys = dict.fromkeys(key for trial in trials for key in trial.values)
    return [key for key in keys if len({repr(trial.values.get(key)) for trial in trials}) > 1]
