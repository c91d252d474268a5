"""`gtddp submit`: run directories handed to one of submitit's executors.

slurm     a job in Slurm's queue, with one task for each rank
local     processes on this host, which live on when this one ends
debug     in this process; an exception opens the debugger

The first two return at once. A job trains `gtddp train --resume RUN` (`gtddp_dist.jobs.task`).
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import to_yaml
from ..config_schema import Config, LaunchConfig
from ..errors import FAILED, OK, UserError
from ..files import write_text_atomically
from ..run_folder import CONFIG, JOB, fill, new_path, refuse_used
from .history import Submitted, last_end, outcome, read, record
from .scheduler import Scheduler
from .script import (
    minutes,
    one_task,
    ranks_per_node,
    sbatch_options,
    setup_lines,
    slurm_parameters,
    task_of_array,
    teardown_lines,
)
from .status import survey
from .task import run_task

WAIT_POLL_S = 1.0
"""How often `--wait` looks into the run directory."""
WAIT_QUERY_S = 15.0
"""How often it asks the scheduler."""


@dataclass(frozen=True)
class Prepared:
    """A run directory that can be submitted."""

    path: Path
    config: Config


def prepare_run(config: Config, name: str) -> Prepared:
    """Makes the directory of a run (`run.dir`, or a new one named after `name`), with its configuration in it.

    Raises UserError where it is there already and not empty.
    """
    check_launch(config)
    path = new_path(config, name)
    refuse_used(path)
    fill(path, config)
    return Prepared(path.absolute(), config)


def check_launch(config: Config) -> None:
    """Raises UserError where `launch.*` cannot be what the run needs."""
    launch = config.launch
    sbatch_options(launch)
    if launch.executor == "slurm":
        ranks_per_node(config)
    elif launch.nodes > 1:
        raise UserError(f"launch.nodes = {launch.nodes}: launch.executor={launch.executor} has this host only")
    if launch.pack > 1 and launch.nodes > 1:
        raise UserError(f"launch.pack = {launch.pack} with launch.nodes = {launch.nodes}: a pack shares one node")


def submit_runs(runs: Sequence[Prepared], folder: Path, name: str) -> list[str]:
    """Hands runs with one `launch` group to its executor, as one job or as an array; the number of each one's job.

    Args:
        runs: to be begun or continued.
        folder: gets scripts and logs, and must be seen by all nodes.
        name: of the jobs.

    Raises UserError, with Slurm's own message where it refuses; runs of chunks before that stay submitted.
    """
    config = runs[0].config
    launch = config.launch
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    packs = [runs[first : first + launch.pack] for first in range(0, len(runs), launch.pack)]
    if launch.executor == "debug":
        return [job for pack in packs for job in _debug(pack, folder)]
    numbers: list[str] = []
    longest = _longest_array() if launch.executor == "slurm" and len(packs) > 1 else len(packs)
    for first in range(0, len(packs), longest):
        chunk = packs[first : first + longest]
        jobs = _slurm(chunk, config, folder, name) if launch.executor == "slurm" else _local(chunk, launch, folder)
        for pack, job in zip(chunk, jobs, strict=True):
            for run in pack:
                record(run.path, Submitted(job=job, executor=launch.executor))
            numbers += [job] * len(pack)
    return numbers


def script_of(run: Prepared, name: str) -> str:
    """The sbatch file of a run's job."""
    from submitit.slurm.slurm import _make_sbatch_string  # the one place in submitit that knows it

    folder = run.path / JOB
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(
        command=command,
        folder=folder,
        setup=setup_lines(run.config.launch, one_task([run.path])),
        teardown=teardown_lines(),
        **slurm_parameters(run.config, name),
    )


def run_submit(config: Config, name: str, *, wait: bool, dry_run: bool) -> int:
    """Submits a new run; the exit code of the command."""
    if dry_run:
        check_launch(config)
        if config.launch.executor != "slurm":
            raise UserError(f"--dry-run prints an sbatch file; launch.executor={config.launch.executor} has none")
        path = Path(config.run.dir or f"runs/{name}-TIME").absolute()
        print(script_of(Prepared(path, config), name))
        return OK
    check_executor(config.launch)
    run = prepare_run(config, name)
    try:
        return _submit_one(run, name, wait=wait)
    except UserError:
        if not read(run.path):  # it was never handed over: nothing is left behind
            shutil.rmtree(run.path)
        raise


def run_resubmit(path: Path, config: Config, *, wait: bool) -> int:
    """Submits an existing run again, to be continued; the exit code of the command."""
    check_launch(config)
    check_executor(config.launch)
    [status], _ = survey([path], Scheduler())
    if not status.over:
        raise UserError(
            f"{path}: its job {status.job} is {status.state}: wait until it ends, or end it (scancel {status.job})"
        )
    write_text_atomically(path / CONFIG, to_yaml(config))  # the job reads where and on which grid it goes on
    return _submit_one(Prepared(path.absolute(), config), path.absolute().name, wait=wait)


def _submit_one(run: Prepared, name: str, *, wait: bool) -> int:
    [job] = submit_runs([run], run.path / JOB, name)
    if run.config.launch.executor == "debug":
        code = outcome(read(run.path), "debug")
        return FAILED if code is None else code
    shown = run.path.relative_to(Path.cwd()) if run.path.is_relative_to(Path.cwd()) else run.path
    print(f"{shown}: job {job}; its logs are in {shown / JOB}, its state: gtddp status {shown}", flush=True)
    return wait_for(run.path, run.config.launch.executor) if wait else OK


def check_executor(launch: LaunchConfig) -> None:
    """Raises UserError where the executor's programs are missing."""
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("submitting needs submitit: pip install 'gtddp-dist[cluster]'") from error
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if launch.executor == "slurm" and missing:
        raise UserError(
            f"launch.executor=slurm: {', '.join(missing)} not on the PATH: submit on a machine of the cluster (a login "
            "node), or take launch.executor=local"
        )


def _slurm(packs: Sequence[Sequence[Prepared]], config: Config, folder: Path, name: str) -> list[str]:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    runs = one_task([run.path for run in packs[0]])
    if len(packs) > 1:
        listing = folder / f"runs-{time.time_ns()}.tsv"
        write_text_atomically(listing, "".join("\t".join(str(run.path) for run in pack) + "\n" for pack in packs))
        runs = task_of_array(listing)
    executor = submitit.SlurmExecutor(folder)
    try:
        executor.update_parameters(
            **slurm_parameters(config, name),
            setup=setup_lines(config.launch, runs),
            teardown=teardown_lines(),
            array_parallelism=config.launch.max_parallel or len(packs),
        )
        # submitit repeats on stderr what is said below.
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(run_task, *(str(run.path) for run in pack)) for pack in packs]
    except (FailedJobError, FailedSubmissionError) as error:
        words = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
        raise UserError(f"Slurm does not take the job: {'; '.join(words) or 'it does not say why'}") from error
    return [str(job.job_id) for job in jobs]


def _local(packs: Sequence[Sequence[Prepared]], launch: LaunchConfig, folder: Path) -> list[str]:
    import submitit

    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        timeout_min=minutes(launch.time),
        gpus_per_node=launch.gpus_per_node or 0,
        tasks_per_node=1,
        signal_delay_s=launch.signal_before_s,
        stderr_to_stdout=True,
        setup=list(launch.setup),
    )
    return [str(executor.submit(run_task, *(str(run.path) for run in pack)).job_id) for pack in packs]


def _debug(pack: Sequence[Prepared], folder: Path) -> list[str]:
    import submitit

    executor = submitit.DebugExecutor(folder)
    jobs = []
    for run in pack:
        job = executor.submit(run_task, str(run.path))
        record(run.path, Submitted(job=str(job.job_id), executor="debug"))
        jobs.append(str(job.job_id))
        with contextlib.suppress(SystemExit):  # the run's history has its exit code
            job.result()
    return jobs


def _longest_array() -> int:
    """How many tasks an array may have on this cluster."""
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, flags=re.MULTILINE)
    if done.returncode != 0 or match is None:
        raise UserError(f"scontrol show config failed: {(done.stderr or done.stdout).strip() or 'no MaxArraySize'}")
    return max(1, int(match[1]) - 1)


def wait_for(run: Path, executor: str) -> int:
    """Returns once the run has ended and is not put back: with its exit code, FAILED where its job is gone without.

    The run directory is looked into often, the scheduler asked rarely. Raises UserError where it cannot be asked.
    """
    scheduler, asked = Scheduler(), time.monotonic()
    while True:
        code = outcome(read(run), executor)
        if code is not None:
            return code
        time.sleep(WAIT_POLL_S)
        if time.monotonic() - asked > WAIT_QUERY_S:
            asked = time.monotonic()
            [status], _ = survey([run], scheduler)
            if status.over:
                print(f"gtddp: {run} {status.state}: {status.reason}", file=sys.stderr)
                ended = last_end(read(run))
                return FAILED if ended is None else ended.code
