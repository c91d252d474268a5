"""`gtddp sweep` and `gtddp status` on a real Slurm: an array of two-rank jobs, one of which fails by design."""

from __future__ import annotations

import csv
import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from gtddp_dist.errors import FAILED, OK
from gtddp_dist.jobs.history import Decided, Started, read
from gtddp_dist.trials.folder import SweepFolder

from .cluster import Cluster

TRIALS, AT_ONCE = 8, 2
WITHIN_S = 420.0
"""For all trials: four rounds of jobs, each of which imports torch twice on two cores, which others may use too."""
SWEEP = f"""\
config: digits-ranks
set:
  train.steps: 10
  train.max_nonfinite: 1
  log.progress: false
  launch.max_parallel: {AT_ONCE}
  launch.max_restarts: 0
  launch.cpus_per_rank: 1
  launch.time: 5
parameters:
  optimizer.lr: [0.05, 0.1, 0.15, 0.2, 1.0e+38, 0.25, 0.3, 0.35]   # one is too high for anybody
"""
FAILING = "004-lr1e+38"


def status(cluster: Cluster, folder: SweepFolder) -> list[dict[str, str]]:
    done = cluster.run("gtddp", "status", str(folder.path), "--json")
    assert done.returncode == OK, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def long_command(cluster: Cluster, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command that waits for trials: one process, not one a look, which would keep a core busy."""
    environment = cluster.environment()
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )


def starts(folder: SweepFolder) -> dict[str, int]:
    return {
        trial.name: sum(isinstance(event, Started) for event in read(folder.run(trial))) for trial in folder.read()[1]
    }


def at_once(cluster: Cluster, jobs: list[str]) -> int:
    """The largest number of these jobs that ran at the same time."""
    changes = []
    for job in jobs:
        told = cluster.job(job)
        assert int(told["NumTasks"]) == 2, told
        changes += [(datetime.fromisoformat(told["StartTime"]), 1), (datetime.fromisoformat(told["EndTime"]), -1)]
    running, most = 0, 0
    for _, change in sorted(changes):  # of one second ends come first
        running += change
        most = max(most, running)
    return most


@pytest.mark.timeout(2 * WITHIN_S)
def test_a_sweep_with_a_trial_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "rates.yaml").write_text(SWEEP)
    folder = SweepFolder(tmp_path / "sweep")
    begun = cluster.run("gtddp", "sweep", "rates.yaml", "--dir", "sweep", cwd=tmp_path)
    assert begun.returncode == OK, begun.stderr
    watched = long_command(cluster, tmp_path, "gtddp", "status", "sweep", "--watch", "5")
    assert watched.returncode == OK, watched.stderr
    ended = status(cluster, folder)
    states = {Path(run["run"]).name: run["state"] for run in ended}
    assert [name for name, state in states.items() if state != "done"] == [FAILING], ended
    assert states[FAILING] == "failed"
    reason = next(run["reason"] for run in ended if run["state"] == "failed")
    assert "finite" in reason and "launch.max_restarts = 0" in reason

    jobs = [run["job"] for run in ended]
    assert len({job.partition("_")[0] for job in jobs}) == 1, "one array"
    assert [job.partition("_")[2] for job in jobs] == [str(number) for number in range(TRIALS)]
    assert at_once(cluster, jobs) == AT_ONCE

    # All have ended: the report, and its exit code, without any further job.
    first = starts(folder)
    assert first == dict.fromkeys(states, 1)
    reported = cluster.run("gtddp", "sweep", "--report", str(folder.path))
    assert reported.returncode == OK and f"{TRIALS} runs: {TRIALS - 1} done, 1 failed" in reported.stdout
    rows = list(csv.DictReader(folder.table_csv.open()))
    assert sum(row["state"] == "done" and float(row["val/accuracy"]) > 0 for row in rows) == TRIALS - 1
    assert rows[-1]["trial"] == FAILING and "finite" in rows[-1]["reason"]
    assert folder.picture.stat().st_size > 10_000

    # The second time only the one that failed.
    again = long_command(cluster, tmp_path, "gtddp", "sweep", "rates.yaml", "--dir", "sweep", "--wait")
    assert again.returncode == FAILED and f"submitted again, 1 of {TRIALS}" in again.stdout, again.stderr
    assert f"{FAILING}: failed: " in again.stdout
    ended = status(cluster, folder)
    assert starts(folder) == {**first, FAILING: 2}
    assert [run["job"] for run in ended if not run["run"].endswith(FAILING)] == [
        job for number, job in enumerate(jobs) if number != 4
    ]
    [failing] = [trial for trial in folder.read()[1] if trial.name == FAILING]
    decisions = [event for event in read(folder.run(failing)) if isinstance(event, Decided)]
    assert [(event.code, event.requeued) for event in decisions] == [(FAILED, False)] * 2
