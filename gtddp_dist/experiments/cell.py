"""Trainings that differ only in their seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .page import Table, TableCell
from .plan import Plan, Settings
from .statistics import Spread
from .training import Trained, training
from .unit import Results, Unit

TRAINS_SHARE = 0.9
"""Of the seeds that have to train, for a setting to count as one that trains."""


def units_of(plan: Plan, *parts: Settings, seeds: Sequence[int] | None = None) -> list[Unit]:
    """A training for each seed (None: the plan's)."""
    return [training(plan, *parts, {"train.seed": seed}) for seed in (range(plan.seeds) if seeds is None else seeds)]


@dataclass(frozen=True)
class Cell:
    """What such trainings came to, by seed."""

    runs: tuple[Trained, ...]

    @classmethod
    def of(cls, units: Sequence[Unit], results: Results) -> Cell:
        """From the results of their units."""
        return cls(tuple(Trained(unit, results.of(unit)) for unit in units))

    @property
    def losses(self) -> list[float]:
        """Training loss of the last epoch, in nats; infinite for a run that diverged."""
        return [run.train_loss for run in self.runs]

    @property
    def loss(self) -> Spread:
        """Of the training loss."""
        return Spread.of(self.losses)

    @property
    def accuracy(self) -> Spread:
        """Of the validation accuracy at the end, in percent."""
        return Spread.of([run.val_accuracy for run in self.runs])

    @property
    def training(self) -> int:
        """How many of the runs train."""
        return sum(run.trains for run in self.runs)

    @property
    def share_that_trains(self) -> float:
        """Of the runs."""
        return self.training / len(self.runs)

    @property
    def trains(self) -> bool:
        """Whether enough of them train."""
        return self.share_that_trains >= TRAINS_SHARE

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts cells by how well they did: runs that diverged, then the mean loss of the others."""
        loss = self.loss
        return loss.diverged, float("inf") if loss.mean is None else loss.mean

    def mean_curve(self, name: str) -> tuple[list[int], list[float], list[float]]:
        """Steps, and mean and deviation over the runs that stayed finite."""
        curves = [dict(zip(*run.curve(name), strict=True)) for run in self.runs if not run.diverged]
        steps = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
        values = [[curve[step] for curve in curves] for step in steps]
        return steps, [fmean(v) for v in values], [stdev(v) if len(v) > 1 else 0.0 for v in values]

    def lower_than(self, other: Cell) -> bool:
        """Whether fewer runs diverged, or as many with a lower mean loss."""
        return self.rank < other.rank

    def steadier_than(self, other: Cell) -> bool:
        """Whether fewer runs diverged, or as many with a lower deviation of the loss."""
        ours, theirs = self.loss, other.loss
        if ours.diverged != theirs.diverged or ours.deviation is None or theirs.deviation is None:
            return ours.diverged < theirs.diverged
        return ours.deviation < theirs.deviation


def runs_table(columns: Sequence[str], cells: Iterable[tuple[Sequence[TableCell], Cell]]) -> Table:
    """The CSV of every run: the columns that tell cells apart, then seed and results."""
    return Table(
        "runs",
        "Every run",
        {
            **dict.fromkeys(columns, ""),
            **dict.fromkeys(("seed", "train loss", "validation accuracy (%)", "diverged", "seconds a step"), ""),
        },
        [
            [
                *key,
                run.config.train.seed,
                None if run.diverged else run.train_loss,
                run.val_accuracy,
                run.diverged,
                run.seconds_per_step,
            ]
            for key, cell in cells
            for run in cell.runs
        ],
        on_page=False,
    )


def described(run: Trained, plan: Plan) -> str:
    """The network, data, length and batch of a run, and the seeds: the beginning of "what was run"."""
    model, train = run.config.model, run.config.train
    return (
        f"{model.name} on {plan.data}, {run.steps} steps of {train.batch_size} samples, {plan.seeds} seeds from 0 on."
    )
