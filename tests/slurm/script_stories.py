"""The scripts in `slurm/`, submitted as they are."""

from __future__ import annotations

import json
from pathlib import Path

from .runs import BEGINS_S, WORDS, Place, Run, assert_one_job, assert_same
from .stories import LATE_S, Unbroken

SMALL = ("digits", "train.steps=30", "model.width=4", "log.every=1", "log.progress=false", "checkpoint.every=10")


def train_nodes_sbatch(place: Place, unbroken: Unbroken) -> None:
    """With its lines for GPUs: the nodes seem to have some. CPUS=1: ranks make no use of them."""
    job = place.sbatch("train-nodes.sbatch", ["--ntasks-per-node=1", "--export=ALL,CPUS=1"], [*WORDS, "run.dir=run"])
    run = Run(place.cluster, place.cwd / "run", job)
    assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
    assert place.cluster.job(job)["TresPerNode"] == "gres:gpu:4"
    assert_one_job(run, 1)
    assert_same(run, unbroken())


def array_sbatch(place: Place, _: Unbroken) -> None:
    """Two tasks; one is asked for a checkpoint, and put back alone. Its number is that of the whole array."""
    (place.cwd / "rates.txt").write_text("optimizer.lr=0.01\noptimizer.lr=0.02 train.seed=1\n")
    array = place.sbatch("array.sbatch", ["--array=1-2"], ["rates.txt", *SMALL], pace_s=0.3)
    runs = [Run(place.cluster, place.cwd / f"runs/digits-{array}/{task}", f"{array}_{task}") for task in (1, 2)]
    for run in runs:
        run.trains(2)
    (whole,) = [run for run in runs if place.cluster.job(run.job)["JobId"] == array]
    place.cluster.ask("scancel", "--signal=USR2", whole.job)
    for run in runs:
        assert run.ends(LATE_S)["JobState"] == "COMPLETED", run.told()
        assert run.steps() == list(range(1, 31))
        assert [start.restart for start in run.starts()] == ([0, 1] if run is whole else [0]), run.told()
    configs = [(run.path / "config.yaml").read_text() for run in runs]
    assert "lr: 0.01" in configs[0] and "lr: 0.02" in configs[1] and "seed: 1" in configs[1]


def scaling_sbatch(place: Place, _: Unbroken) -> None:
    """All grids of two ranks, on a small network."""
    words = ["model.name=small-resnet", "model.width=4", "bench.image=[3,8,8]", "bench.steps=2", "bench.warmup=1"]
    job = place.sbatch("scaling.sbatch", ["--ntasks-per-node=2"], ["train.micro_batches=2", *words])
    ended = place.cluster.ends(job, LATE_S)
    log = (place.cwd / f"slurm-gtddp-scaling-{job}.out").read_text()
    assert ended["JobState"] == "COMPLETED", log
    folder = place.cwd / f"benchmarks/scaling-{job}"
    assert len((folder / "scaling.csv").read_text().splitlines()) == 7, log  # strong and weak, of three grids
    assert json.loads(next(folder.glob("*.json")).read_text())


def node_without_the_code(place: Place, _: Unbroken) -> None:
    """The second of two nodes does not have the virtual environment: it is named, and nothing is tried again."""
    here = Path(place.cluster.environment()["VIRTUAL_ENV"]).resolve()
    place.cluster.in_node(place.nodes[1], "mount", "-t", "tmpfs", "none", str(here))
    named = f"node {place.nodes[1]}: gtddp"
    job = place.sbatch("train-nodes.sbatch", ["--ntasks-per-node=1"], [*WORDS, "run.dir=by-script"])
    run = place.submit("launch.nodes=2")
    for number, log in ((job, place.cwd / f"slurm-gtddp-{job}.out"), (run.job, run.path / f"job/{run.job}_0_log.out")):
        ended = place.cluster.ends(number, BEGINS_S)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
        assert named in log.read_text()


def directory_not_shared(place: Place, _: Unbroken) -> None:
    """The second of two nodes does not see the run directory: it is named."""
    folder = place.cwd / "run"
    folder.mkdir()
    place.cluster.in_node(place.nodes[1], "mount", "-t", "tmpfs", "none", str(folder))
    run = place.submit("launch.nodes=2")
    ended = run.ends(BEGINS_S)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert f"node {place.nodes[1]}: there is no {folder}" in run.log()
    assert run.decisions() == [False]
