"""Whether a job whose processes have ended is put back into the queue: `gtddp requeue`, which ends a job's script.

The one place that decides it (docs/design/0003-jobs.md): it also comes here when every rank was killed, and nothing of
it runs in a signal handler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import from_yaml
from ..errors import BAD_INPUT, FAILED, OK, REQUEUE, UserError
from .history import Decided, Ended, Event, Started, last_end, read, record, since_submission
from .tail import last_step

SCONTROL_TIMEOUT_S = 60.0
_REQUEUE_SIGNAL = "SIGUSR2"


@dataclass(frozen=True)
class Decision:
    """What is done with a job, and why."""

    requeue: bool
    reason: str


@dataclass(frozen=True)
class Job:
    """The Slurm job that this process is in."""

    number: str
    """By which Slurm knows it and no other: 12, or 12_3 for a task of an array."""
    restart: int
    """How often it had been put back when this start began."""

    @staticmethod
    def of(environ: Mapping[str, str]) -> Job:
        """Raises UserError outside of a job."""
        number, restart = environ.get("SLURM_JOB_ID"), environ.get("SLURM_RESTART_COUNT", "0")
        if number is None or not restart.isdecimal():
            raise UserError(
                "gtddp requeue is the last line of a Slurm job's script: it needs SLURM_JOB_ID, and a number as "
                "SLURM_RESTART_COUNT where there is one"
            )
        if "SLURM_ARRAY_TASK_ID" in environ:
            # One task of an array has the number of the array as its own: by that Slurm would take all of them.
            number = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
        return Job(number, int(restart))


def decide(events: Sequence[Event], exit_code: int, step: int, max_restarts: int) -> Decision:
    """What is done with the job of a run whose processes have just ended.

    Args:
        events: the run's history.
        exit_code: of srun; how the run itself says that it ended counts over it.
        step: the last step that was logged.
        max_restarts: how often failures may put the job back, since it was submitted.
    """
    life = since_submission(events)
    former = [event for event in life if isinstance(event, Decided)]
    now = life[life.index(former[-1]) + 1 :] if former else life
    ended = last_end(events)
    started = any(isinstance(event, Started) for event in now)
    code = exit_code_of(events, exit_code)
    if code == OK:
        return Decision(False, "done")
    if code == BAD_INPUT:
        return Decision(False, "bad input, which another start would meet again" + _because(ended))
    if code == REQUEUE:
        signals = [] if ended is None else ended.signals
        if _REQUEUE_SIGNAL not in signals:
            return Decision(False, f"ended by {' and '.join(signals) or 'a request'}")
        if former and former[-1].code == REQUEUE and former[-1].step == step:
            return Decision(False, f"two starts in a row were stopped at step {step}: they make no progress")
        return Decision(True, f"stopped by {_REQUEUE_SIGNAL} at step {step}, with a checkpoint")
    failures = [event for event in former if event.code not in (OK, REQUEUE)]
    what = f"failed at step {step} (exit code {code})" if started else f"failed to start (exit code {code})"
    what += _because(ended)
    if failures and failures[-1] is former[-1] and failures[-1].step == step:
        return Decision(False, f"{what}: the second time in a row at this step")
    if len(failures) >= max_restarts:
        return Decision(False, f"{what}; launch.max_restarts = {max_restarts} is used up")
    return Decision(True, f"{what}; restart {len(failures) + 1} of at most {max_restarts} after failures")


def requeue(runs: Sequence[Path], exit_code: int, environ: Mapping[str, str] = os.environ) -> int:
    """Decides on the job that this process is in, which trained `runs`; puts it back where one of them needs it.

    Returns the exit code for the job's script. Raises UserError outside of a Slurm job.
    """
    job = Job.of(environ)
    restarts = _restarts(job)
    if restarts != job.restart:
        _say(f"job {job.number} has been started {restarts - job.restart} more times since: left alone")
        return exit_code
    back = False
    codes: list[int] = []
    for run in runs:
        events = read(run)
        if is_settled(events):
            continue
        config = from_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
        step = last_step(run)
        decision = decide(events, exit_code, step, config.launch.max_restarts)
        code = exit_code_of(events, exit_code)
        record(
            run,
            Decided(
                job=job.number,
                restart=job.restart,
                code=code,
                step=step,
                requeued=decision.requeue,
                reason=decision.reason,
            ),
        )
        _say(f"{run}: {decision.reason}: {'put back into the queue' if decision.requeue else 'not put back'}")
        back |= decision.requeue
        codes.append(code)
    if not back:
        # A signal may come to processes that are done and about to end: then srun has another code than the runs.
        return OK if codes and all(code == OK for code in codes) else exit_code
    done = _scontrol("requeue", job.number)
    if done.returncode != 0:
        _say(f"scontrol requeue {job.number} failed: {done.stderr.strip()}")
        return FAILED
    return OK


def exit_code_of(events: Sequence[Event], exit_code: int) -> int:
    """How the run itself says that its newest start ended, else the exit code of srun, which is one for all tasks."""
    ended = last_end(events)
    return exit_code if ended is None else ended.code


def is_settled(events: Sequence[Event]) -> bool:
    """Whether the run needs no further start: since its submission it was decided not to put it back."""
    decided = [event for event in since_submission(events) if isinstance(event, Decided)]
    return bool(decided) and not decided[-1].requeued


def _because(ended: Ended | None) -> str:
    return f": {ended.reason}" if ended is not None and ended.reason else ""


def _restarts(job: Job) -> int:
    """How often Slurm has put the job back by now."""
    done = _scontrol("--oneliner", "show", "job", job.number)
    match = re.search(r"\bRestarts=(\d+)", done.stdout)
    if done.returncode != 0 or match is None:
        raise UserError(f"scontrol show job {job.number} failed: {(done.stderr or done.stdout).strip()}")
    return int(match[1])


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise UserError("scontrol is not on the PATH: add the folder of Slurm's commands to it") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"scontrol {' '.join(words)} gave no answer in {SCONTROL_TIMEOUT_S:.0f} s") from None


def _say(message: str) -> None:
    print(f"gtddp: {message}", file=sys.stderr, flush=True)
