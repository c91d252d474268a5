"""`gtddp sweep`: begins a sweep, goes on with one, follows it to its end. No torch before the report."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ..config import draft, to_yaml
from ..config_schema import LaunchConfig
from ..errors import FAILED, OK, REQUEUE, UserError
from ..files import write_text_atomically
from ..jobs.scheduler import INTERVAL_S, Scheduler
from ..jobs.status import RunStatus, counts, is_alive, survey, watch
from ..jobs.submit import Prepared, check_executor, check_launch, submit_runs
from ..launch import stop_signals_held
from ..run_folder import CONFIG
from .folder import SPEC, SweepFolder, make_folder
from .report import report
from .space import Configured, Trial, trials_of
from .spec import SweepFile, dump_sweep, read_sweep

POLL_S = 0.5
END_WITHIN_S = 120.0
"""How long local trials may take for their checkpoints after Ctrl-C."""


def run_sweep(name: str, overrides: Sequence[str], directory: Path | None, *, wait: bool, check_only: bool) -> int:
    """Begins a sweep, or goes on with it where `directory` has it already; the exit code of the command.

    Args:
        name: of a shipped sweep, or path of a file.
        overrides: `key=value` of the command line.
        directory: for the sweep; None: a new one in runs/.
        wait: follow all trials to their ends, and report.
        check_only: list the trials, and write nothing.

    Raises UserError before anything is written where the sweep or any of its trials is not valid.
    """
    sweep = read_sweep(name, overrides)
    trials = trials_of(sweep)
    for problem in dict.fromkeys(_launch_problems(trials)):
        raise UserError(problem)
    if check_only:
        print("\n".join(item.trial.name for item in trials))
        print(f"ok: {len(trials)} trials of {sweep.name}")
        return OK
    launch = trials[0].config.launch
    if directory is not None and (directory / SPEC).is_file():
        _refuse_other(sweep, directory)
        return _go_on(SweepFolder(directory), (), wait=wait)
    check_executor(launch)
    folder = make_folder(sweep, trials, directory)
    print(f"{folder.path}: {len(trials)} trials of {sweep.name}", flush=True)
    return _go_on(folder, (), wait=wait)


def resume_sweep(directory: Path, overrides: Sequence[str], *, wait: bool) -> int:
    """Submits the trials that have not ended well and that no job is at work on; the exit code of the command.

    Args:
        directory: of the sweep.
        overrides: `launch.key=value`: how they are launched from now on.
        wait: follow all trials to their ends, and report.
    """
    other = [word for word in overrides if not word.startswith("launch.")]
    if other:
        raise UserError(
            f"--resume goes on with the trials as they are configured, but for launch.*: leave out {other[0]!r}"
        )
    return _go_on(SweepFolder(directory), overrides, wait=wait)


def report_sweep(directory: Path) -> int:
    """Writes the tables and pictures of a sweep as it stands now; the exit code of the command."""
    folder = SweepFolder(directory)
    _, trials = folder.read()
    statuses = _survey(folder, trials)
    print(report(folder, statuses))
    return OK


def _go_on(folder: SweepFolder, overrides: Sequence[str], *, wait: bool) -> int:
    """Submits what is to be submitted, follows it where asked to, and reports where all has ended."""
    _, trials = folder.read()
    with folder.locked():
        statuses = _survey(folder, trials)
        todo = [trial for trial, status in zip(trials, statuses, strict=True) if status.over and status.state != "done"]
        again = [status for status in statuses if status.over and status.state not in ("done", "new")]
        if again:
            print(f"submitted again, {len(again)} of {len(trials)}:")
            print("\n".join(f"  {Path(item.run).name}: {item.state}: {item.reason}" for item in again), flush=True)
        here = _submit(folder, todo, overrides) if todo else False
        statuses = _survey(folder, trials)
    if wait and not here and not all(status.over for status in statuses):
        statuses = watch([folder.run(trial) for trial in trials], Scheduler(), INTERVAL_S)
    if all(status.over for status in statuses):
        print(report(folder, statuses))
        return OK if all(status.state == "done" for status in statuses) else FAILED
    print(f"{counts(statuses)}\nfollow them: gtddp status --watch {folder.path}")
    print(f"once they have ended: gtddp sweep --report {folder.path}")
    return OK


def _submit(folder: SweepFolder, trials: Sequence[Trial], overrides: Sequence[str]) -> bool:
    """Hands trials to their executor; whether they have been run here, and have ended."""
    runs = []
    for trial in trials:
        path = folder.run(trial)
        config = draft(str(path / CONFIG)).overridden(overrides).build()
        check_launch(config)
        runs.append(Prepared(path.absolute(), config))
    launch = runs[0].config.launch
    check_executor(launch)
    if overrides:
        for run in runs:
            write_text_atomically(run.path / CONFIG, to_yaml(run.config))
    if launch.executor == "local":
        _run_here(folder, runs, launch)
        return True
    for group in _alike(runs):
        jobs = list(dict.fromkeys(submit_runs(group, folder.jobs, folder.path.absolute().name)))
        shown = jobs[0] if len(jobs) == 1 else f"{jobs[0]} to {jobs[-1]}"
        print(f"submitted: {len(group)} trials, {'job' if len(jobs) == 1 else 'jobs'} {shown}", flush=True)
    return launch.executor == "debug"


def _alike(runs: Sequence[Prepared]) -> Iterator[list[Prepared]]:
    """The runs, in groups that an array can hold: with the same number of ranks."""

    def ranks(run: Prepared) -> int:
        return run.config.parallel.pipe * run.config.parallel.data

    for _, group in itertools.groupby(sorted(runs, key=ranks), ranks):
        yield list(group)


def _run_here(folder: SweepFolder, runs: Sequence[Prepared], launch: LaunchConfig) -> None:
    """Runs all on this host, `launch.max_parallel` jobs at once (one, where it is null), until the last has ended.

    Raises UserError on Ctrl-C or SIGTERM, once the trials that run have written their checkpoints.
    """
    packs = [runs[first : first + launch.pack] for first in range(0, len(runs), launch.pack)]
    scheduler = Scheduler()
    active: dict[Prepared, str] = {}
    ended = 0
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while packs or active:
            while packs and len(set(active.values())) < (launch.max_parallel or 1):
                pack = packs.pop(0)
                with _deaf():
                    active |= zip(pack, submit_runs(pack, folder.jobs, folder.path.absolute().name), strict=True)
            statuses, _ = survey([run.path for run in active], scheduler)
            for run, status in zip(list(active), statuses, strict=True):
                if status.over:
                    del active[run]
                    ended += 1
                    print(f"{ended}/{len(runs)} {run.path.name}: {_told(status)}", flush=True)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        _end(set(active.values()))
        stopped = UserError(f"interrupted; to go on: gtddp sweep --resume {folder.path}")
        stopped.exit_code = REQUEUE
        raise stopped from None
    finally:
        signal.signal(signal.SIGTERM, former)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started meanwhile take no notice of Ctrl-C until they ask for it, as training does. Here it
    waits for the end of the block.

    submitit's own process between here and a trial would kill the trial before its checkpoint is written.
    """
    heard: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))  # other threads may get it
    try:
        with stop_signals_held([signal.SIGINT]):
            yield
    finally:
        signal.signal(signal.SIGINT, former)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _end(jobs: Collection[str]) -> None:
    """Asks local jobs to stop, and waits until they have; a second Ctrl-C leaves them alone."""
    print("gtddp: interrupted: trials that run write a checkpoint and end", file=sys.stderr, flush=True)
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job), signal.SIGTERM)
    deadline = time.monotonic() + END_WITHIN_S
    while any(is_alive(job) for job in jobs):
        if time.monotonic() > deadline:
            raise UserError(f"after {END_WITHIN_S:.0f} s there are still processes of trials: {', '.join(jobs)}")
        time.sleep(POLL_S)


def _told(status: RunStatus) -> str:
    if status.state != "done":
        return f"{status.state}: {status.reason}"
    return "done" if status.accuracy is None else f"done, validation accuracy {status.accuracy:.2%}"


def _survey(folder: SweepFolder, trials: Sequence[Trial]) -> list[RunStatus]:
    statuses, note = survey([folder.run(trial) for trial in trials], Scheduler())
    if note:
        print(f"gtddp: {note}", file=sys.stderr)
    return statuses


def _launch_problems(trials: Sequence[Configured]) -> Iterator[str]:
    for item in trials:
        try:
            check_launch(item.config)
        except UserError as error:
            yield f"trial {item.trial.name}: {error}"


def _refuse_other(sweep: SweepFile, directory: Path) -> None:
    """Raises UserError where the directory holds another sweep than that one."""
    spec, _ = SweepFolder(directory).read()
    if spec == sweep.spec:
        return
    old, new = dump_sweep(spec).splitlines(), dump_sweep(sweep.spec).splitlines()
    differing = next(
        (f"{before!r} there, {now!r} now" for before, now in zip(old, new, strict=False) if before != now), ""
    )
    raise UserError(
        f"--dir {directory} holds another sweep ({differing or 'of another length'}): choose another directory, or go "
        f"on with that one: gtddp sweep --resume {directory}"
    )
