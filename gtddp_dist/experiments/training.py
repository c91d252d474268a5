"""The unit "train once": the one train loop in a temporary run directory, and what experiments need of the run."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from ..checkpoint import JSON
from ..config_schema import Config
from ..errors import FAILED, OK, UserError
from ..run_directory import Record, RunDirectory, read_metrics
from .plan import Plan, Settings, config_of, loss_of_guessing
from .unit import Result, Unit

FUNCTION = "gtddp_dist.experiments.training:train_once"
_NO_CHECKPOINTS = 10**9
"""Steps between two: a run of an experiment is begun again, not continued."""

_CURVES = ("train/loss", "val/accuracy", "gtddp/feedback_ratio", "gtddp/open_gain")


def training(plan: Plan, *parts: Settings, alone: bool = False) -> Unit:
    """The unit that trains with the plan's settings and `parts` over them. Raises ConfigError where they are wrong."""
    settings = plan.settings(*parts)
    config_of(settings)
    return Unit.of(FUNCTION, cast(Mapping[str, JSON], settings), alone=alone)


def train_once(settings: Settings) -> dict[str, JSON]:
    """Trains, and returns what `Trained` reads."""
    with trained_run(settings) as (run, code):
        return what_came_of(run, code)


@contextlib.contextmanager
def trained_run(settings: Settings) -> Iterator[tuple[RunDirectory, int]]:
    """Trains; the run directory, which is there while the block runs, and the exit code: OK, or FAILED if diverged."""
    from ..train import run_training  # imports torch

    with tempfile.TemporaryDirectory(prefix="gtddp-reproduce-") as folder:
        path = Path(folder, "run")
        config = config_of({**settings, **_quiet(path)})
        with (
            open(Path(folder, "output"), "w", encoding="utf-8") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            code = run_training(config, "experiment")
        if code not in (OK, FAILED):
            raise UserError("a training of the experiment was stopped")
        yield RunDirectory(path), code


def what_came_of(run: RunDirectory, code: int) -> dict[str, JSON]:
    """What `Trained` reads, of a run directory and its exit code."""
    summary, records = run.read_summary(), read_metrics(run)
    assert summary is not None  # it is written with both of these exit codes
    return {
        "diverged": code == FAILED or summary["train/loss"] is None,
        "train_loss": summary["train/loss"],
        "val_loss": summary["val/loss"],
        "val_accuracy": summary["val/accuracy"],
        "seconds_per_step": summary["seconds_per_step"],
        "steps": summary["steps"],
        "parameters": summary["parameters"],
        "curves": {name: _curve(records, name) for name in _CURVES},
    }


def _quiet(path: Path) -> dict[str, str | int | bool]:
    return {
        "run.dir": str(path),
        "log.progress": False,
        "log.tensorboard": False,
        "checkpoint.every": _NO_CHECKPOINTS,
        "checkpoint.keep": 1,
    }


def _curve(records: Sequence[Record], name: str) -> list[JSON]:
    return [[int(record["step"]), float(f"{record[name]:.6g}")] for record in records if name in record]


class Trained:
    """What a training came to.

    Attributes:
        config: of the run.
        diverged: whether it ended with a loss that was not finite.
        train_loss: mean over the last epoch, in nats; infinite where diverged.
        val_accuracy: at the end, in percent; None where diverged.
        seconds_per_step: mean over the run, beside whatever else ran.
    """

    def __init__(self, unit: Unit, result: Result) -> None:
        self.config: Config = config_of(json.loads(unit.arguments))
        self.diverged = bool(result["diverged"])
        loss, accuracy = result["train_loss"], result["val_accuracy"]
        self.train_loss = float("inf") if self.diverged else float(cast(float, loss))
        self.val_accuracy = None if self.diverged or accuracy is None else 100 * float(cast(float, accuracy))
        self.seconds_per_step = float(cast(float, result["seconds_per_step"]))
        self.steps = int(cast(int, result["steps"]))
        self._curves = cast(Mapping[str, list[tuple[int, float]]], result["curves"])

    @property
    def trains(self) -> bool:
        """Whether the loss came below half of that of guessing."""
        return self.train_loss < loss_of_guessing(self.config.data.name) / 2

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of `train/loss`, `val/accuracy`, `gtddp/feedback_ratio` or `gtddp/open_gain`."""
        points = self._curves[name]
        return [step for step, _ in points], [value for _, value in points]

    def steps_to(self, percent: float) -> int | None:
        """The first evaluation with at least this validation accuracy, as a step; None where there was none."""
        points = self._curves["val/accuracy"]
        return next((step for step, value in points if 100 * value >= percent), None)
