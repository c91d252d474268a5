"""Training runs as jobs of a cluster, and what is left of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtddp_dist.jobs.history import Decided, Ended, Event, Started, read

from .cluster import ROOT, Cluster, wait_until

STEPS = 60
KEEPS = 10
"""Steps from one checkpoint to the next."""
WORDS = (
    "digits-ranks",
    f"train.steps={STEPS}",
    "log.every=1",
    "log.progress=false",
    f"checkpoint.every={KEEPS}",
    f"eval.every={STEPS}",
    "parallel.lost_after_s=10",
)
"""Two ranks; every step is logged."""
BEGINS_S = 150.0
"""Until a job trains: importing torch on two busy cores takes most of it."""


@dataclass
class Place:
    """Nodes of a cluster that one test has to itself, and a folder where it submits."""

    cluster: Cluster
    nodes: Sequence[str]
    feature: str
    cwd: Path

    def submit(self, *words: str, pace_s: float = 0.0, of: Sequence[str] = WORDS, **variables: str) -> Run:
        """`gtddp submit` of a run, in the directory `run` here; the job gets the environment variables too."""
        done = self.cluster.run(
            "gtddp",
            "submit",
            *of,
            "run.dir=run",
            f"launch.constraint={self.feature}",
            "launch.cpus_per_rank=1",
            *words,
            cwd=self.cwd,
            PACE_S=str(pace_s),
            **variables,
        )
        return self._submitted(done)

    def resubmit(self, **variables: str) -> Run:
        """`gtddp submit --resume` of that run."""
        return self._submitted(self.cluster.run("gtddp", "submit", "--resume", "run", cwd=self.cwd, **variables))

    def _submitted(self, done: subprocess.CompletedProcess[str]) -> Run:
        assert done.returncode == 0, done.stderr
        return Run(self.cluster, self.cwd / "run", done.stdout.split("job ")[1].split(";")[0])

    def sbatch(self, script: str, options: Sequence[str], words: Sequence[str], pace_s: float = 0.0) -> str:
        """Submits a script of `slurm/`; the number of the job."""
        return self.cluster.sbatch(
            self.cwd,
            f"--constraint={self.feature}",
            "--cpus-per-task=1",
            *options,
            str(ROOT / "slurm" / script),
            *words,
            PACE_S=str(pace_s),
        )


@dataclass
class Run:
    """A run directory, and the job that trains there."""

    cluster: Cluster
    path: Path
    job: str

    def steps(self) -> list[int]:
        """Steps that have been logged, in order."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line)["step"] for line in lines]

    def trains(self, to_step: int, within_s: float = BEGINS_S) -> None:
        """Waits until so many steps were done."""
        wait_until(lambda: self.steps()[-1:] >= [to_step], within_s, lambda: f"step {to_step}: {self.told()}")

    def ends(self, within_s: float) -> dict[str, str]:
        """Waits until the job has ended for good; what Slurm tells of it."""
        try:
            return self.cluster.ends(self.job, within_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.told()}") from error

    def is_put_back(self, within_s: float) -> None:
        """Waits until the job has been put back into the queue."""
        wait_until(lambda: self.cluster.job(self.job)["Restarts"] != "0", within_s, self.told)

    def told(self) -> str:
        """All that there is to say about it, for messages."""
        history = self.path / "history.jsonl"
        logs = [*self.path.glob("job/*_log.*"), *self.path.parent.glob("slurm-*.out")]
        parts = [
            str(self.cluster.job(self.job)),
            history.read_text() if history.exists() else "no history",
            f"steps {self.steps()}",
            *(f"{log}:\n{log.read_text()[-3000:]}" for log in logs),
        ]
        return "\n".join(parts)

    def log(self) -> str:
        """What the job's script and rank 0 have printed."""
        (file,) = [*self.path.glob("job/*_0_log.out"), *self.path.parent.glob("slurm-*.out")]
        return file.read_text()

    def history(self) -> list[Event]:
        """What the run directory tells."""
        return read(self.path)

    def starts(self) -> list[Started]:
        """The starts of the run."""
        return [event for event in self.history() if isinstance(event, Started)]

    def signals(self) -> list[list[str]]:
        """Of each start that has ended by itself, the signals that came."""
        return [event.signals for event in self.history() if isinstance(event, Ended)]

    def decisions(self) -> list[bool]:
        """Whether the job was put back, each time that its script decided."""
        return [event.requeued for event in self.history() if isinstance(event, Decided)]

    def reasons(self) -> list[str]:
        """Why, each time."""
        return [event.reason for event in self.history() if isinstance(event, Decided)]

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        """A curve as TensorBoard shows it."""
        reader = EventAccumulator(str(self.path / "tb"), size_guidance={"scalars": 0}).Reload()
        return [(event.step, event.value) for event in reader.Scalars(tag)]


def losses(run: Run) -> dict[int, float]:
    """Loss of each step."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines}


def assert_same(run: Run, unbroken: Run) -> None:
    """The run has ended as the unbroken one: weights, and each step once in either log."""
    expected = list(range(1, STEPS + 1))
    assert run.steps() == expected, run.told()
    assert [step for step, _ in run.scalars("train/loss")] == expected
    assert run.scalars("train/loss") == unbroken.scalars("train/loss")
    assert losses(run) == losses(unbroken)
    ours, theirs = (load_file(each.path / "model.safetensors") for each in (run, unbroken))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_one_job(run: Run, starts: int) -> None:
    """So many starts, all of the same job."""
    assert [start.job for start in run.starts()] == [run.job] * starts, run.told()
    assert [start.restart for start in run.starts()] == list(range(starts))
