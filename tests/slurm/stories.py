"""What befalls training runs on a real Slurm, and what they survive: a function each, with its checks.

The first argument is where it happens, the second waits for the run to which nothing happens.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from .cluster import wait_until
from .runs import BEGINS_S, KEEPS, STEPS, WORDS, Place, Run, assert_one_job, assert_same

LATE_S = 300.0
"""For any job, until it has ended for good."""

Unbroken = Callable[[], Run]
Story = Callable[[Place, Unbroken], Run]


def unbroken(place: Place, _: Unbroken) -> Run:
    """Two nodes, a pipeline rank on each; nothing happens."""
    run = place.submit("launch.nodes=2")
    assert run.ends(BEGINS_S)["JobState"] == "COMPLETED", run.told()
    assert_one_job(run, 1)
    assert len(run.starts()[0].hosts) == 2
    assert run.decisions() == [False]
    # One process, without Slurm.
    done = place.cluster.run("gtddp", "train", *WORDS, "parallel.pipe=1", "run.dir=alone", cwd=place.cwd)
    assert done.returncode == 0, done.stderr
    ours, alone = (load_file(path / "model.safetensors") for path in (run.path, place.cwd / "alone"))
    assert ours.keys() == alone.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-6)
    return run


def time_limit(place: Place, unbroken: Unbroken) -> Run:
    """Slurm asks for a checkpoint before the time limit. Limits are whole minutes, and its signal may be 30 s early."""
    run = place.submit("launch.time=2", "launch.signal_before_s=30", pace_s=2.5)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_one_job(run, 2)
    assert run.signals() == [["SIGUSR2"], []]
    assert run.decisions() == [True, False]
    assert_same(run, unbroken())
    return run


def preemption(place: Place, unbroken: Unbroken) -> Run:
    """A job of the partition urgent takes the node."""
    run = place.submit(pace_s=0.5)
    run.trains(KEEPS + 2)
    (place.cwd / "urgent").write_text("#!/bin/bash\nsleep 1\n")
    urgent = place.cluster.sbatch(
        place.cwd, "--partition=urgent", f"--constraint={place.feature}", "--exclusive", "--time=1", "urgent"
    )
    assert place.cluster.ends(urgent, 60)["JobState"] == "COMPLETED"
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_one_job(run, 2)
    assert run.signals() == [["SIGUSR2"], []]
    assert run.starts()[1].step > KEEPS  # not from the periodic checkpoint, but from that of the signal
    assert_same(run, unbroken())
    return run


def asked(place: Place, unbroken: Unbroken) -> Run:
    """`scancel --signal=USR2`, on slurm/train.sbatch. Then a run that has ended is started again."""
    job = place.sbatch("train.sbatch", ["--ntasks=2", "--time=10"], [*WORDS, "run.dir=run"], pace_s=0.2)
    run = Run(place.cluster, place.cwd / "run", job)
    run.trains(KEEPS + 2)
    place.cluster.ask("scancel", "--signal=USR2", job)
    run.is_put_back(60)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_one_job(run, 2)
    assert run.signals() == [["SIGUSR2"], []]
    assert run.decisions() == [True, False]
    assert_same(run, unbroken())

    written = (run.path / "model.safetensors").stat().st_mtime_ns
    place.cluster.ask("scontrol", "requeue", job)
    wait_until(lambda: "has ended already" in run.log(), BEGINS_S, run.told)
    assert run.ends(60)["JobState"] == "COMPLETED", run.told()
    assert (run.path / "model.safetensors").stat().st_mtime_ns == written
    assert len(run.starts()) == 2
    return run


def cancelled(place: Place, _: Unbroken) -> Run:
    """Plain `scancel`: the run is stopped with a checkpoint, and nobody puts it back."""
    run = place.submit(pace_s=0.2)
    run.trains(2)
    place.cluster.ask("scancel", run.job)
    wait_until(lambda: bool(run.signals()), 60, run.told)
    job = run.ends(60)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), run.told()
    assert run.signals() == [["SIGTERM"]]
    assert True not in run.decisions()
    assert len(list(run.path.glob("checkpoints/step-*/index.json"))) >= 1
    return run


def requeued(place: Place, unbroken: Unbroken) -> Run:
    """`scontrol requeue`: Slurm puts it back without a signal of ours."""
    run = place.submit(pace_s=0.2)
    run.trains(KEEPS + 5)
    place.cluster.ask("scontrol", "requeue", run.job)
    run.is_put_back(60)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_one_job(run, 2)
    assert_same(run, unbroken())
    return run


def killed_rank(place: Place, unbroken: Unbroken) -> Run:
    """kill -9 of a rank on the second of two nodes: the other says who was lost, and the job is put back."""
    run = place.submit("launch.nodes=2", pace_s=0.2)
    run.trains(KEEPS + 2)
    victim = place.cluster.rank(str(run.path), place.cluster.hosts(run.job)[1], 1)
    subprocess.run(["kill", "-KILL", str(victim)], check=True)
    run.is_put_back(60)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_one_job(run, 2)
    assert run.decisions() == [True, False]
    assert "lost rank 1 " in run.reasons()[0], run.told()
    assert_same(run, unbroken())
    return run


def killed_slurmd(place: Place, unbroken: Unbroken) -> Run:
    """kill -9 of a slurmd that comes back: the job does not notice."""
    run = place.submit("launch.nodes=2", pace_s=0.2)
    run.trains(KEEPS)
    node = place.cluster.hosts(run.job)[1]
    place.cluster.kill_slurmd(node)
    run.trains(KEEPS + 5)
    place.cluster.start_slurmd(node)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_one_job(run, 1)
    assert_same(run, unbroken())
    return run


def lost_slurmd(place: Place, unbroken: Unbroken) -> Run:
    """kill -9 of a slurmd that stays away: Slurm puts the job back, on other nodes; what still runs there ends."""
    run = place.submit("launch.nodes=2", pace_s=1.0)
    run.trains(KEEPS + 2)
    node = place.cluster.hosts(run.job)[1]
    old = place.cluster.rank(str(run.path), node, 1)
    place.cluster.kill_slurmd(node)
    run.is_put_back(90)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_moved(run, node)
    assert_same(run, unbroken())
    wait_until(lambda: not Path(f"/proc/{old}").exists(), 60, "end of the rank on the node that was given up")
    return run


def orphaned(place: Place, unbroken: Unbroken) -> Run:
    """The slurmd of a job's only node dies: the job goes on there unseen, and Slurm starts it elsewhere as well.

    The new start waits until the old one is done, and finds nothing to do.
    """
    run = place.submit(pace_s=1.0)
    run.trains(KEEPS + 2)
    (node,) = place.cluster.hosts(run.job)
    place.cluster.kill_slurmd(node)
    run.is_put_back(90)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert place.cluster.job(run.job)["BatchHost"] != node
    assert_one_job(run, 1)
    assert "has ended already" in run.log(), run.told()
    assert_same(run, unbroken())
    return run


def lost_node(place: Place, unbroken: Unbroken) -> Run:
    """A node dies with all that it runs: the job's script, and rank 0."""
    run = place.submit("launch.nodes=2", pace_s=1.0)
    run.trains(KEEPS + 2)
    node = place.cluster.hosts(run.job)[0]
    place.cluster.kill_node(node)
    run.is_put_back(90)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_moved(run, node)
    assert_same(run, unbroken())
    return run


def assert_moved(run: Run, node: str) -> None:
    """The job has left the node, and gone on where its newest checkpoint was."""
    starts = run.starts()
    assert {start.job for start in starts} == {run.job}
    assert node in starts[0].hosts and node not in starts[-1].hosts, run.told()
    # Its script and Slurm may both have put it back.
    assert 2 <= len(starts) <= 3, run.told()


def lost_link(place: Place, _: Unbroken) -> Run:
    """The link of the second node is taken down, and comes back once the job has left it."""
    run = place.submit("launch.nodes=2", pace_s=0.5)
    run.trains(KEEPS + 2)
    node = place.cluster.hosts(run.job)[1]
    old = place.cluster.rank(str(run.path), node, 1)
    place.cluster.link(node, "down")
    run.is_put_back(90)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert_moved(run, node)
    assert run.steps() == list(range(1, STEPS + 1))
    wait_until(lambda: not Path(f"/proc/{old}").exists(), 60, "end of the rank on the node that was cut off")
    place.cluster.link(node, "up")
    return run
