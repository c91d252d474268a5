"""Jobs of a real Slurm on this machine that lose a rank, a slurmd, a node or a link, or are told to stop."""

from __future__ import annotations

import functools
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slurm.cluster import Cluster, wait_until
from slurm.runs import Place, Run

from . import kills
from .kills import COLUMNS, EACH, GRIDS, STARTING, STEPS, WORLD, is_temporary, named, same, unbroken, weights_of
from .part import Case, Part, Row, yes
from .processes import Watched, program_of

What = Literal["SIGKILL", "SIGSTOP", "slurmd killed", "node lost", "link down", "USR2 by scancel", "SIGTERM", "scancel"]
FAULTS: tuple[What, ...] = (
    "SIGKILL",
    "node lost",
    "scancel",
    "SIGSTOP",
    "slurmd killed",
    "USR2 by scancel",
    "link down",
    "SIGTERM",
)
LOSES: tuple[What, ...] = ("SIGKILL", "SIGSTOP", "node lost", "link down")
"""After which somebody has to be named."""
STOPS: tuple[What, ...] = ("USR2 by scancel", "SIGTERM", "scancel")
"""That ask for an end with a checkpoint."""
WANTED: tuple[What, ...] = ("SIGTERM", "scancel")
"""After which nobody puts the job back."""
NODES = 4
JOB_NODES = 2
WORDS = [word for word in kills.WORDS if not word.startswith("run.dir=")]
PACE_S = 0.1
"""By which a step of the first start lasts longer, so that something can happen between steps."""
JOB_WITHIN_S = 600.0
"""Until a job has begun, or has ended for good: it waits for timeouts of Slurm, and starts again."""
ORPHANS_WITHIN_S = 120.0
"""Until all has ended that a job has left behind on a node that it has lost, and that is there again."""


@dataclass(frozen=True)
class Fault:
    """What happens, to which rank or its node, when.

    Attributes:
        what: it is.
        grid: of the run.
        rank: it, or its node, or the slurmd or link of that, is struck. Signals of scancel go to all.
        starting: when it comes, as a share of the time that ranks take from their start to the first step; None: after
            `step`.
        step: the step after which it comes.
        delay_s: how long after that.
        back_after_s: when a slurmd that was killed is started again; None: once the job has ended.
    """

    what: What
    grid: str
    rank: int
    starting: float | None
    step: int
    delay_s: float
    back_after_s: float | None

    @property
    def node(self) -> int:
        """Which node of the job has the rank."""
        return self.rank // (WORLD[self.grid] // JOB_NODES)

    @property
    def ranks(self) -> Sequence[int]:
        """Whom it takes away."""
        each = WORLD[self.grid] // JOB_NODES
        return (self.rank,) if self.what.startswith("SIG") else range(each * self.node, each * (self.node + 1))

    @property
    def known(self) -> dict[str, str]:
        """What the row says of it."""
        to = f"rank {self.rank}" if self.what.startswith("SIG") else f"node {self.node} of the job"
        if self.back_after_s is not None:
            to += f", for {self.back_after_s:.0f} s"
        moment = f"step {self.step}" if self.starting is None else f"{self.starting:.0%} of the start"
        return {
            "fault": self.what,
            "grid": self.grid,
            "to": "the job" if self.what in ("scancel", "USR2 by scancel") else to,
            "moment": moment,
        }


def draw(seed: int) -> list[Fault]:
    """The faults of a seed. Grids and kinds take turns; the rest is random."""
    faults = []
    for i in range(EACH):
        chance = random.Random(f"{seed} slurm {i}")
        grid, what = list(GRIDS)[i % 3], FAULTS[i % len(FAULTS)]
        faults.append(
            Fault(
                what,
                grid,
                rank=chance.randrange(WORLD[grid]),
                starting=chance.random() if chance.random() < STARTING else None,
                step=max(1, chance.randrange(STEPS - 5)),  # a run that has ended cannot be struck, and scancel is slow
                delay_s=chance.uniform(0, PACE_S),
                back_after_s=chance.uniform(1, 8) if what == "slurmd killed" and chance.random() < 0.5 else None,
            )
        )
    return faults


@functools.cache
def folder_of_cluster() -> tempfile.TemporaryDirectory[str]:
    """With a short path, that every user may enter; made when it is first asked for."""
    folder = tempfile.TemporaryDirectory(prefix="gtddp-", ignore_cleanup_errors=True)
    Path(folder.name).chmod(0o755)
    return folder


def whole_cluster() -> Cluster:
    """The cluster of all cases, with all of its nodes up; started when it is first asked for."""
    knobs = {"SLURM_LOCAL_NODES": str(NODES), "SLURM_LOCAL_GPUS": "0", "SLURM_LOCAL_NETWORK": "veth"}
    cluster = Cluster(Path(folder_of_cluster().name) / "slurm", knobs)
    done = cluster.script("start")
    assert done.returncode == 0, f"Slurm does not start: {done.stderr.strip()}"
    return cluster


def close() -> None:
    """Ends it."""
    if not folder_of_cluster.cache_info().currsize:
        return
    folder = folder_of_cluster()
    folder_of_cluster.cache_clear()
    done = Cluster(Path(folder.name) / "slurm").script("stop")
    assert done.returncode == 0, done.stderr
    folder.cleanup()


def is_struck(run: Run, fault: Fault) -> tuple[str, float]:
    """Waits for the moment, and does it; to which node, and when that was."""
    cluster, path = run.cluster, str(run.path)

    def all_there() -> bool:
        if cluster.state(run.job) != "RUNNING":
            return False
        found = [len(pids) for node in cluster.hosts(run.job) for pids in cluster.ranks(path, node).values()]
        return found == [1] * WORLD[fault.grid]

    wait_until(all_there, JOB_WITHIN_S, lambda: f"ranks: {run.told()}")
    node = cluster.hosts(run.job)[fault.node]
    victim = cluster.rank(path, node, fault.rank)
    if fault.starting is None:
        run.trains(fault.step, JOB_WITHIN_S)
        time.sleep(fault.delay_s)
    else:
        at = time.monotonic() + fault.starting * unbroken(fault.grid).begins_s
        wait_until(lambda: time.monotonic() >= at or bool(run.steps()), JOB_WITHIN_S, run.told)
    match fault.what:
        case "SIGKILL" | "SIGSTOP" | "SIGTERM":
            os.kill(victim, signal.Signals[fault.what])
        case "slurmd killed":
            cluster.kill_slurmd(node)
        case "node lost":
            cluster.kill_node(node)
        case "link down":
            cluster.link(node, "down")
        case "USR2 by scancel":
            cluster.ask("scancel", "--signal=USR2", run.job)
        case "scancel":
            cluster.ask("scancel", run.job)
    return node, time.monotonic()


def is_mended(cluster: Cluster, fault: Fault, node: str) -> None:
    """What the fault has broken is whole again. A node that comes back tells Slurm so when its slurmd starts."""
    if fault.what == "link down":
        cluster.link(node, "up")
        cluster.kill_slurmd(node)
    if fault.what in ("link down", "slurmd killed"):
        cluster.start_slurmd(node)


def logs(run: Run) -> str:
    """What the script and all ranks have printed."""
    return "\n".join(log.read_text(errors="replace") for log in sorted(run.path.glob("job/*_log.out")))


def first_start(watched: Watched) -> list[int]:
    """gtddp's processes in the first start of a job. Slurm's own may wait until a link is there again."""
    first = [pid for pid, variables in watched.processes().items() if b"SLURM_RESTART_COUNT=" not in variables]
    return [pid for pid in first if b"python" in program_of(pid)]


def run_case(fault: Fault, folder: Path) -> Row:
    """One job, its fault, and its end."""
    unbroken(fault.grid)  # before anything is timed
    cluster = whole_cluster()
    place = Place(cluster, [f"node{i}" for i in range(NODES)], "local", folder)
    watched = Watched(folder, "job")
    run, broken = None, ExitStack()
    try:
        run = place.submit(
            f"launch.nodes={JOB_NODES}", *GRIDS[fault.grid], pace_s=PACE_S, of=WORDS, **watched.variables
        )
        node, struck = is_struck(run, fault)
        broken.callback(is_mended, cluster, fault, node)
        if fault.back_after_s is not None:
            time.sleep(fault.back_after_s)
            broken.close()
        return judged(place, run, fault, watched, node, struck, broken)
    finally:
        if run is not None:
            cluster.run("scancel", run.job)
        watched.kill()
        broken.close()


def judged(place: Place, run: Run, fault: Fault, watched: Watched, node: str, struck: float, broken: ExitStack) -> Row:
    """What came of it. Closing `broken` mends what the fault has broken."""
    values, problems = dict(fault.known), []
    steps = len(run.steps())

    def first_has_ended() -> bool:
        watched.sample()
        return not first_start(watched)

    wait_until(first_has_ended, JOB_WITHIN_S, lambda: f"end of {first_start(watched)}: {run.told()}")
    values["seconds to the end"] = f"{time.monotonic() - struck:.1f}"
    text = logs(run)
    job = run.ends(JOB_WITHIN_S)
    restarts = int(job["Restarts"])
    late = steps == STEPS or (restarts == 0 and job["JobState"] == "COMPLETED" and fault.what != "slurmd killed")
    if late:
        values["moment"] = f"{values['moment']}, too late"
    elif fault.what in STOPS:
        says = "stopped by" in text
        values["says it stops"] = yes(says) if steps else "-"
        if steps and not says:
            problems.append(f"does not say that it stops: {text[-600:]}")
    elif fault.what in LOSES:
        found = max((named(text, rank, fault.grid, node) for rank in fault.ranks), key=lambda one: sum(one.values()))
        if not steps:
            found.pop("names segment")  # ranks may not have met
        values |= {column: yes(holds) for column, holds in found.items()}
        problems += [f"{column}: no" for column, holds in found.items() if not holds]
    if job["JobState"] == "COMPLETED":
        values["continued"] = f"put back {restarts} times" if restarts else "not interrupted"
    else:
        if fault.what not in WANTED or restarts:
            problems.append(f"the job ended as {job['JobState']} after {restarts} restarts: {run.told()[-1500:]}")
        again = place.resubmit(**watched.variables)
        job = again.ends(JOB_WITHIN_S)
        assert job["JobState"] == "COMPLETED", f"submitted again, it ended so: {again.told()[-1500:]}"
        values["continued"] = "submitted again"
    broken.close()
    wait_until(lambda: not watched.processes(), ORPHANS_WITHIN_S, lambda: f"end of {watched.processes().keys()}")
    values["ended"] = "yes"
    left = [*watched.leftovers(), *(path.name for path in run.path.rglob("*") if is_temporary(path.name))]
    values |= {"nothing left": yes(not left), "left": " ".join(left)}
    values["same weights"] = yes(same(weights_of(run.path), unbroken(fault.grid).weights))
    if left:
        problems.append(f"left: {' '.join(left)}")
    if values["same weights"] == "no":
        problems.append("the run ends in other weights")
    if run.steps() != list(range(1, STEPS + 1)):
        problems.append(f"steps that were logged: {run.steps()}")
    if any(problem.startswith("names") for problem in problems):
        problems.append(f"said: {text[-600:]}")
    return Row("; ".join(problems), values)


def cases(seed: int, quick: bool) -> list[Case]:
    """All; none in the quick form: `tests/slurm` does each of them once, and runs wherever that does."""
    return [
        Case(f"slurm-{i}", functools.partial(run_case, fault), 3 * JOB_WITHIN_S, needs_root=True, known=fault.known)
        for i, fault in enumerate([] if quick else draw(seed))
    ]


PART = Part(
    "kills-slurm",
    "Jobs of Slurm that lose ranks, nodes and links, and are told to stop",
    f"{EACH} runs of {STEPS} steps on DIGITS, submitted by `gtddp submit` to a real Slurm on this machine "
    f"(`slurm/local_cluster.sh`): {JOB_NODES} of {NODES} nodes, each with a network of its own; a checkpoint every 10 "
    "steps, one fault at a random moment, a quarter of them while ranks start. Slurm notices a lost node after 15 s. "
    "The job has to be put back and to end by itself; after SIGTERM and scancel, which somebody wanted, it is "
    "submitted again. Seconds are those until gtddp's processes of the start that was struck have ended.",
    COLUMNS,
    cases,
    close,
)
