"""What the scheduler says about jobs: one question for all of them, no more often than every few seconds.

`squeue` is asked for all jobs of the runs' owners at once, so that its answer serves every `gtddp status` of the next
seconds, and so that a job which it has forgotten cannot make the question fail. The answer is kept in a small file that
all processes of the user share. Jobs that squeue has forgotten are looked up by one call of `sacct`, where it answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock

from ..errors import UserError
from ..files import write_text_atomically

INTERVAL_S = 5.0
"""Shortest time between two questions."""
TIMEOUT_S = 30.0
UNKNOWN = "UNKNOWN"
"""State of a job that neither squeue nor sacct knows."""

# States that a job does not leave again (squeue's manual, JOB STATE CODES). One that is put back is PENDING then.
_OVER = frozenset(
    (
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
        UNKNOWN,
    )
)
_SQUEUE_FIELDS = "%i|%A|%T|%r|%N"  # number (of an array's task: 12_3), its own number, state, reason, nodes
_ARGUMENT_LENGTH = 100_000  # Linux takes 128 KiB as one argument


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What the scheduler says about a job. How often it was put back is in the run's history."""

    job: str
    """Its number; an array's task is 12_3."""
    state: str
    """Slurm's word, such as PENDING; UNKNOWN where it knows no such job any more."""
    nodes: str = ""
    """Slurm's list of its nodes, such as node[0-1]; empty before it has any."""
    reason: str = ""
    """Why it waits or why it ended, in Slurm's words; empty where there is nothing to say."""

    @property
    def over(self) -> bool:
        """Whether it will not run any more."""
        return self.state in _OVER


@dataclass(frozen=True)
class _Answer:
    """What Slurm said at `time`."""

    time: float = 0.0
    users: list[int] = field(default_factory=list)
    """Whose jobs squeue was asked for."""
    queue: dict[str, JobState] = field(default_factory=dict)
    """What squeue knows."""
    accounts: dict[str, JobState] = field(default_factory=dict)
    """Jobs that squeue has forgotten, as sacct knows them."""

    def covers(self, jobs: Iterable[str], users: Iterable[int]) -> bool:
        return set(users) <= set(self.users) and all(job in self.queue or job in self.accounts for job in jobs)

    def of(self, job: str) -> JobState:
        return self.queue.get(job) or self.accounts[job]


class Scheduler:
    """Answers about jobs; it asks Slurm as rarely as it can.

    Args:
        folder: where the answer is kept for other processes; None: $XDG_CACHE_HOME/gtddp, or ~/.cache/gtddp.
        interval_s: shortest time between two questions, over all processes that share the folder.
    """

    def __init__(self, folder: Path | None = None, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        # Clusters count their jobs each for itself.
        cluster = "|".join((shutil.which("squeue") or "", *(os.environ.get(name, "") for name in _CLUSTER_VARIABLES)))
        name = f"jobs-{hashlib.sha256(cluster.encode()).hexdigest()[:12]}.json"
        self._file = (_cache_folder() if folder is None else folder) / name

    @staticmethod
    def is_there() -> bool:
        """Whether there is a scheduler to ask: squeue on the PATH."""
        return shutil.which("squeue") is not None

    def states(self, jobs: Collection[str], users: Collection[int]) -> dict[str, JobState]:
        """The state of each job. Waits where a question would come too soon after the last one.

        Args:
            jobs: their numbers.
            users: the numeric ids of their owners.

        Raises UserError with Slurm's own message where squeue fails.
        """
        if not jobs:
            return {}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock")):
                answer = self._kept()
                if not (self._is_fresh(answer) and answer.covers(jobs, users)):
                    while self._is_fresh(answer):
                        time.sleep(min(0.2, self._interval_s))
                    answer = _ask(jobs, sorted({*users, os.getuid()}), answer.accounts)
                    write_text_atomically(self._file, json.dumps(asdict(answer)))
        except OSError as error:
            raise UserError(
                f"{self._file.parent}: what the scheduler said cannot be kept there: {error}; set XDG_CACHE_HOME"
            ) from error
        return {job: answer.of(job) for job in jobs}

    def _is_fresh(self, answer: _Answer) -> bool:
        return 0 <= time.time() - answer.time < self._interval_s

    def _kept(self) -> _Answer:
        """The answer in the file; an empty one where there is none, or where another version wrote it."""
        try:
            values = json.loads(self._file.read_text(encoding="utf-8"))
            queue, accounts = (
                {job: JobState(**state) for job, state in values[part].items()} for part in ("queue", "accounts")
            )
            return _Answer(float(values["time"]), [int(user) for user in values["users"]], queue, accounts)
        except FileNotFoundError:
            return _Answer()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"gtddp: warning: {self._file} is not used: {error!r}", file=sys.stderr)
            return _Answer()


_CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gtddp"


def _ask(wanted: Collection[str], users: Sequence[int], accounts: Mapping[str, JobState]) -> _Answer:
    """What squeue says of all jobs of the users, and sacct of those that are wanted and that squeue has forgotten.

    Args:
        wanted: numbers of jobs.
        users: numeric ids of owners.
        accounts: what sacct said before; jobs that were over then are not asked for again.
    """
    command = ["squeue", "--noheader", "--states=all", "--array", f"--format={_SQUEUE_FIELDS}"]
    done = _run([*command, f"--user={','.join(map(str, users))}"])
    if done.returncode != 0:
        raise UserError(f"squeue failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    queue: dict[str, JobState] = {}
    for line in done.stdout.splitlines():
        number, own, state, reason, nodes = [*line.strip().split("|"), "", "", "", ""][:5]
        known = JobState(job=number, state=state, nodes=nodes, reason="" if reason == "None" else reason)
        queue[number] = known
        # A script that was not submitted by gtddp knows its task of an array by this number alone.
        queue.setdefault(own, known)
    forgotten = [job for job in wanted if job not in queue]
    over = {job: accounts[job] for job in forgotten if job in accounts and accounts[job].state != UNKNOWN}
    return _Answer(time.time(), list(users), queue, over | _accounted([job for job in forgotten if job not in over]))


def _accounted(jobs: Sequence[str]) -> dict[str, JobState]:
    """What sacct says about each of the jobs. Many clusters have no accounting: they are UNKNOWN there."""
    found: dict[str, JobState] = {}
    why = "sacct does not know it" if shutil.which("sacct") else "there is no sacct"
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList,ExitCode"]
    # Ids of arrays without their tasks: a thousand tasks are one word then.
    for numbers in _chunks(dict.fromkeys(job.partition("_")[0] for job in jobs)) if shutil.which("sacct") else ():
        done = _run([*command, f"--jobs={numbers}"])
        if done.returncode != 0:
            why = f"sacct: {done.stderr.strip() or f'exit code {done.returncode}'}"
            break
        for line in done.stdout.splitlines():
            number, state, nodes, code = [*line.strip().split("|"), "", "", ""][:4]
            # "CANCELLED by 1000"; a job without nodes has "None assigned".
            state, nodes = state.partition(" ")[0], "" if nodes == "None assigned" else nodes
            reason = "" if code in ("", "0:0") else f"exit code {code}"
            found[number] = JobState(job=number, state=state, nodes=nodes, reason=reason)
    unknown = f"squeue has forgotten the job, and {why}"
    return {job: found.get(job) or JobState(job=job, state=UNKNOWN, reason=unknown) for job in jobs}


def _chunks(words: Iterable[str]) -> Iterable[str]:
    """The words, joined by commas, in arguments of bounded length."""
    chunk = ""
    for word in words:
        if chunk and len(chunk) + len(word) >= _ARGUMENT_LENGTH:
            yield chunk
            chunk = ""
        chunk = f"{chunk},{word}" if chunk else word
    if chunk:
        yield chunk


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # Without the user's own defaults, such as SQUEUE_PARTITION, which would leave jobs out.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=own)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the PATH: run this on a machine that can talk to Slurm") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {TIMEOUT_S:.0f} s: is the Slurm controller up?") from None
