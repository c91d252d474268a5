"""The directory that holds everything of one run.

config.yaml          every option with its value
history.jsonl        submissions, starts and how they ended (gtddp_dist.jobs.history)
source.patch         what the code differed in from its git revision, where it did
layout.json          grid -> where the network was cut (runs on several ranks)
environment.json     versions, hardware, revision of the code; one more entry for each resume
metrics.jsonl        an object a line, by increasing step
tb/                  the same numbers for TensorBoard, one curve across restarts
checkpoints/         see gtddp_dist.checkpoint
model.safetensors    parameters and buffers of the trained model, by their names in it
curves.png, summary.json
stalled/             stacks of every rank, where a step did not end (gtddp_dist.watchdog)
baseline/            the run of the base optimizer, where run.baseline asked for it
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import JSON, CheckpointError
from .config import from_yaml
from .config_schema import Config
from .environment import describe_environment
from .errors import UserError
from .files import write_atomically, write_text_atomically
from .run_folder import fill, locked, new_path, refuse_used
from .team import Team

Record = dict[str, float]
"""One line of metrics: the step and what was measured then."""


class RunDirectory:
    """Paths inside a run directory, and what is written there once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.tensorboard = path / "tb"
        self.checkpoints = path / "checkpoints"
        self.model_file = path / "model.safetensors"
        self.curves = path / "curves.png"
        self.summary_file = path / "summary.json"
        self.baseline = path / "baseline"
        self.layout_file = path / "layout.json"

    def read_config(self) -> Config:
        """The configuration of the run. Raises UserError where there is none or it is not valid."""
        if not self.path.is_dir():
            raise UserError(f"there is no run directory {self.path}")
        try:
            text = self.config_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} is not a run directory: cannot read its config.yaml: {error}") from error
        return from_yaml(text, str(self.config_file))

    def record_start(self, step: int) -> None:
        """Adds where and when the run starts, or continues, to `environment.json`."""
        entry: dict[str, JSON] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": step,
            **describe_environment(),
        }
        if self.environment_file.is_file():
            first = _read_json(self.environment_file)
            first["resumes"] = [*cast(list[JSON], first.get("resumes", [])), entry]
            entry = first
        write_text_atomically(self.environment_file, json.dumps(entry, indent=2) + "\n")

    def read_summary(self) -> dict[str, JSON] | None:
        """What was written at the end of training; None before."""
        if not self.summary_file.is_file():
            return None
        return _read_json(self.summary_file)

    def write_summary(self, summary: Mapping[str, JSON]) -> None:
        """Writes `summary.json`."""
        write_text_atomically(self.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def keep_layout(self, config: Config, team: Team, cuts: Sequence[int] | None) -> None:
        """Rank 0: keeps where the network is cut on this grid, for a start that continues the run there."""
        if cuts is not None and team.rank == 0:
            kept = self._layouts() | {_grid_of(config): list(cuts)}
            write_text_atomically(self.layout_file, json.dumps(kept, indent=2) + "\n")

    def read_layout(self, config: Config) -> tuple[int, ...] | None:
        """Where an earlier start of the run on that grid cut the network; None where there was none."""
        cuts = self._layouts().get(_grid_of(config))
        return None if cuts is None else tuple(cuts)

    def _layouts(self) -> dict[str, list[int]]:
        if not self.layout_file.is_file():
            return {}
        try:
            return cast(dict[str, list[int]], json.loads(self.layout_file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(
                f"{self.layout_file}: is not JSON: {error}; without the file cuts are found anew"
            ) from error

    def write_model(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Writes `model.safetensors`, which says at which step it was taken."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"format": "pt", "step": str(step)}
        write_atomically(self.model_file, lambda temporary: save_file(tensors, temporary, metadata))

    def read_model(self) -> tuple[dict[str, Tensor], int]:
        """Tensors of `model.safetensors` and the step at which it was taken. Raises CheckpointError."""
        try:
            with safe_open(self.model_file, framework="pt") as file:
                names: list[str] = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, int(file.metadata()["step"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.model_file}: is not a model that this program wrote: {error}") from error


@contextlib.contextmanager
def new_run(config: Config, config_name: str) -> Iterator[RunDirectory]:
    """A new run directory, locked while the block runs, with the configuration in it.

    It is `run.dir`, or `runs/<config>-<time>` with the time in UTC. Raises UserError where `run.dir` is
    already there and not empty.
    """
    run = RunDirectory(new_path(config, config_name))
    refuse_used(run.path)  # before the lock: a directory that is refused should not get a lock file
    with locked(run.path):
        refuse_used(run.path)
        fill(run.path, config)
        yield run


@contextlib.contextmanager
def existing_run(path: Path, wait_s: float = 0.0) -> Iterator[RunDirectory]:
    """A run directory that is already there, locked while the block runs.

    Raises UserError where there is none, or where another process still trains in it after `wait_s` seconds.
    """
    run = RunDirectory(path)
    run.read_config()  # before the lock: a mistyped path should not get a lock file
    with locked(run.path, wait_s):
        yield run


def _grid_of(config: Config) -> str:
    return f"pipe={config.parallel.pipe},data={config.parallel.data}"


class MetricsLog:
    """Writes `metrics.jsonl` and, where asked for, TensorBoard's files.

    Args:
        run: the run directory.
        tensorboard: also write `tb/`.
        from_step: the step that the run continues from, 0 where it begins. What was logged after it by a start that
            did not get to its next checkpoint is dropped, so that a curve has each step once.
    """

    def __init__(self, run: RunDirectory, *, tensorboard: bool, from_step: int = 0) -> None:
        continued = run.metrics_file.exists()
        if continued:
            kept = [line for line in _lines(run.metrics_file) if cast(int, line["step"]) <= from_step]
            text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
            write_text_atomically(run.metrics_file, text)
        self._file = open(run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._writer: SummaryWriter | None = None
        if tensorboard:
            # TensorBoard drops what it has from purge_step on when it comes to this file.
            purge = from_step + 1 if continued else None
            self._writer = SummaryWriter(str(run.tensorboard), purge_step=purge)

    def write(self, step: int, measured: Mapping[str, float], said: Mapping[str, str] | None = None) -> None:
        """Adds a line, with numbers and with what there is to say in words.

        JSON has no NaN and no infinity: such a value is left out and its name listed in `nonfinite`.
        """
        finite = {name: value for name, value in measured.items() if math.isfinite(value)}
        line: dict[str, JSON] = {"step": step, **finite}
        if len(finite) < len(measured):
            line["nonfinite"] = [name for name in measured if name not in finite]
        line |= said or {}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in finite.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Puts all lines on the disk. To be called before a checkpoint: on resume the lines up to its step stay."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class NoLog:
    """What ranks other than the first have for a log."""

    def write(self, step: int, measured: Mapping[str, float], said: Mapping[str, str] | None = None) -> None:
        """Nothing: the first rank writes for all."""

    def flush(self) -> None:
        """Nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing."""


def read_metrics(run: RunDirectory) -> list[Record]:
    """The lines of `metrics.jsonl`, numbers only. Raises UserError that names a line that is no JSON object."""
    if not run.metrics_file.exists():
        return []
    return [
        {name: value for name, value in line.items() if isinstance(value, int | float)}
        for line in _lines(run.metrics_file)
    ]


def _read_json(path: Path) -> dict[str, JSON]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}; move it away, and the run goes on without it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object; move it away, and the run goes on without it")
    return value


def _lines(path: Path) -> list[dict[str, JSON]]:
    """Lines as objects. A last line without its end is dropped: the process died while it wrote it."""
    lines = []
    data = path.read_bytes()
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: is not JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            raise UserError(f"{path}, line {number}: is not an object with a whole number as its step")
        lines.append(value)
    return lines
