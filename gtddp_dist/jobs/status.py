"""`gtddp status`: what runs are doing, as a table, from their directories and one question to the scheduler."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from ..errors import OK, UserError
from ..run_folder import CONFIG, DEFAULT_PARENT, JOB
from .facts import Facts, read_facts
from .scheduler import UNKNOWN, JobState, Scheduler

TRIALS = "trials"
"""Folder of a sweep that holds its runs."""
JOBS = "jobs"
"""Folder of a sweep that holds scripts and logs of its jobs."""
NO_SCHEDULER = "squeue is not on the PATH: states are what the run directories say"
_LAST_BYTES = 4096
_NEVER = "its job ended before it started"
_KILLED = "its processes ended without a word"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What is known about a run."""

    run: str
    """Its directory."""
    job: str | None
    state: str
    """new, done, stopped, failed, killed; or what its job does: pending, running, or another word of Slurm's."""
    nodes: str
    step: int | None
    total: int | None
    loss: float | None
    accuracy: float | None
    throughput: float | None
    """Samples a second."""
    restarts: int
    reason: str
    """Why it waits, or why it did not end well."""

    @property
    def over(self) -> bool:
        """Whether it will not go on by itself."""
        return self.state in ("new", "done", "stopped", "failed", "killed")


def run_status(paths: Sequence[Path], *, watch_s: float | None, as_json: bool) -> int:
    """Prints where runs stand, once, or every `watch_s` seconds until all have ended; the exit code.

    Args:
        paths: run directories and sweeps; none: all that are in runs/.
        watch_s: None for once.
        as_json: a list of objects in place of a table.
    """
    if watch_s is not None and as_json:
        raise UserError("--watch draws a table: leave out --json")
    runs = find_runs(paths)
    scheduler = Scheduler()
    if watch_s is not None:
        watch(runs, scheduler, watch_s)
        return OK
    statuses, note = survey(runs, scheduler)
    if note:
        print(f"gtddp: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps([dataclasses.asdict(status) for status in statuses], indent=2))
    else:
        print(table(statuses))
    return OK


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories: those named, those of the sweeps named, in the order given; none named: all in runs/.

    Raises UserError for a path that is neither.
    """
    if not paths:
        if not DEFAULT_PARENT.is_dir():
            raise UserError(f"there is no folder {DEFAULT_PARENT} here: name run directories or sweeps")
        inside = (item for item in sorted(DEFAULT_PARENT.iterdir()) if _is_run(item) or (item / TRIALS).is_dir())
        return find_runs(list(inside)) if any(DEFAULT_PARENT.iterdir()) else []
    runs: list[Path] = []
    for path in paths:
        if _is_run(path):
            runs.append(path)
        elif (path / TRIALS).is_dir():
            runs.extend(item for item in sorted((path / TRIALS).iterdir()) if _is_run(item))
        else:
            raise UserError(f"{path} is neither a run directory (it has no {CONFIG}) nor a sweep (no {TRIALS}/)")
    return runs


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file()


def survey(runs: Sequence[Path], scheduler: Scheduler) -> tuple[list[RunStatus], str]:
    """Where each run stands; and a note where the scheduler could not be asked, which it is once for all.

    Raises UserError, with Slurm's own message, where squeue fails.
    """
    facts = [read_facts(run) for run in runs]
    asked = [item for item in facts if item.executor == "slurm" and item.job is not None and not item.settled]
    jobs: Mapping[str, JobState] = {}
    note = ""
    if asked and not scheduler.is_there():
        note = NO_SCHEDULER
    elif asked:
        jobs = scheduler.states({str(item.job) for item in asked}, {item.owner for item in asked})
    statuses = []
    for item in facts:
        job = _job(item, jobs)
        # A job that has ended meanwhile may have written how: what was read before is too old then.
        statuses.append(_status(read_facts(item.run) if job is not None and job.over else item, job))
    return statuses, note


def _job(facts: Facts, jobs: Mapping[str, JobState]) -> JobState | None:
    """What is known about a run's job besides what is in its directory; None where nothing is, or nothing matters."""
    if facts.settled or facts.job is None:
        return None
    if facts.executor == "slurm":
        return jobs.get(facts.job)
    if is_alive(facts.job):
        return None
    return JobState(job=facts.job, state=UNKNOWN, reason="its process is gone")


def is_alive(process: str) -> bool:
    """Whether the process of a local job, submitit's controller on this host, is still at work."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # one that has ended, and that its parent has not asked about


def _status(facts: Facts, job: JobState | None) -> RunStatus:
    """A run, with what is known about its job."""
    state, reason, nodes = str(facts.phase), facts.reason, ",".join(facts.hosts)
    if not facts.settled:
        if job is not None and not job.over:
            state, nodes = job.state.lower(), job.nodes
            reason = job.reason if job.state == "PENDING" else ""
        elif job is not None:
            told = ": ".join(filter(None, (job.state if job.state != UNKNOWN else "", job.reason)))
            match facts.phase:
                case "submitted":
                    state, reason = "failed", f"{_NEVER}: {told}{_last_words(facts)}"
                case "running":
                    state, reason = "killed", f"{_KILLED}: {told}{_last_words(facts)}"
                case "requeued":
                    state, reason = "failed", f"{facts.reason}; then: {told}"
        elif state in ("submitted", "requeued"):
            state = "pending"
    return RunStatus(
        run=str(facts.run),
        job=facts.job,
        state=state,
        nodes=nodes,
        step=facts.step,
        total=facts.total,
        loss=facts.loss,
        accuracy=facts.accuracy,
        throughput=facts.throughput,
        restarts=facts.restarts,
        reason=reason,
    )


def _last_words(facts: Facts) -> str:
    """The last line that rank 0 of the run's job, or its script, has printed, for a reason; "" where there is none."""
    name = f"{facts.job}_0_log.out"  # as submitit calls it
    for log in (facts.run / JOB / name, facts.run.parent.parent / JOBS / name):
        with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            if lines:
                return f"; the last line of {log}: {lines[-1]}"
    return ""


def table(statuses: Iterable[RunStatus], rows: int | None = None) -> str:
    """The runs as a table, with a line that counts them; of more than `rows` those that need attention stay."""
    statuses = list(statuses)
    if not statuses:
        return "no runs"
    shown = statuses
    if rows is not None and len(statuses) > rows:
        weight = {"failed": 0, "killed": 0, "stopped": 1, "running": 2}
        kept = sorted(
            range(len(statuses)), key=lambda at: weight.get(statuses[at].state, 4 if statuses[at].over else 3)
        )
        shown = [statuses[at] for at in sorted(kept[:rows])]
    lines = [
        (
            status.run,
            status.job or "-",
            status.state,
            status.nodes or "-",
            f"{'-' if status.step is None else status.step}/{'-' if status.total is None else status.total}",
            "-" if status.loss is None else f"{status.loss:.4g}",
            "-" if status.accuracy is None else f"{status.accuracy:.2%}",
            "-" if status.throughput is None else f"{status.throughput:.1f}",
            status.restarts,
            _one_line(status.reason),
        )
        for status in shown
    ]
    headers = (
        "run",
        "job",
        "state",
        "nodes",
        "step",
        "loss",
        "val\naccuracy",
        "samples\na second",
        "restarts",
        "reason",
    )
    text = tabulate(lines, headers, disable_numparse=True, colalign=("left",) * 4 + ("right",) * 5 + ("left",))
    left_out = f" (not shown: {len(statuses) - len(shown)})" if len(shown) < len(statuses) else ""
    return f"{text}\n\n{counts(statuses)}{left_out}"


def counts(statuses: Iterable[RunStatus]) -> str:
    """How many runs are in each state."""
    number = Counter(status.state for status in statuses)
    return f"{number.total()} runs: " + ", ".join(f"{count} {state}" for state, count in number.most_common())


def watch(runs: Sequence[Path], scheduler: Scheduler, every_s: float) -> list[RunStatus]:
    """Draws the table until all runs have ended; where they stand then.

    Where there is no terminal to draw on, it prints how many runs are in each state, when that changes, and the table
    at the end. Slurm's controller may be away for a while: what it says then stands below.
    """
    terminal = sys.stdout.isatty()
    before = ""
    while True:
        try:
            statuses, note = survey(runs, scheduler)
        except UserError as error:
            statuses, note = [_status(read_facts(run), None) for run in runs], str(error)
        over = all(status.over for status in statuses)
        rows = max(5, shutil.get_terminal_size().lines - 8) if terminal else None
        text = table(statuses, rows) if terminal or over else counts(statuses)
        text += f"\n{note}" if note else ""
        if terminal:
            print(f"\033[2J\033[H{text}", flush=True)
        elif text != before:
            print(text, flush=True)
        before = text
        if over:
            return statuses
        time.sleep(every_s)


def _one_line(text: str, length: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
