"""What is around the training command in a job's script, and what `launch.*` is for Slurm."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config_schema import Config, LaunchConfig
from ..errors import UserError
from ..run_folder import CONFIG

PYTHON = shlex.quote(sys.executable)

_KEYS = {
    "job-name": "run.dir",
    "nodes": "launch.nodes",
    "ntasks": "launch.ranks_per_node",
    "ntasks-per-node": "launch.ranks_per_node",
    "gpus-per-node": "launch.gpus_per_node",
    "cpus-per-task": "launch.cpus_per_rank",
    "mem": "launch.memory_gb",
    "time": "launch.time",
    "partition": "launch.partition",
    "account": "launch.account",
    "qos": "launch.qos",
    "constraint": "launch.constraint",
    "exclude": "launch.exclude",
    "signal": "launch.signal_before_s",
    "array": "launch.max_parallel",
    "requeue": "launch.max_restarts",
}
"""Options of sbatch that have a key of their own, or that gtddp needs as they are."""


def ranks_per_node(config: Config) -> int:
    """Ranks on each node of the run's job. Raises UserError where nodes and ranks do not make up the grid."""
    launch, ranks = config.launch, config.parallel.pipe * config.parallel.data
    each = launch.ranks_per_node or math.ceil(ranks / launch.nodes)
    if each * launch.nodes != ranks:
        raise UserError(
            f"launch.nodes = {launch.nodes} with launch.ranks_per_node = {launch.ranks_per_node or 'null'} does not "
            f"make up the {ranks} ranks of the grid pipe={config.parallel.pipe},data={config.parallel.data}: choose "
            "nodes and ranks whose product it is"
        )
    return each


def minutes(limit: str | int) -> int:
    """Slurm's [days-]hours:minutes:seconds, minutes:seconds or minutes, in whole minutes, as Slurm rounds it up."""
    if isinstance(limit, int):
        return limit
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minute, second = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minute, second = parts
    else:
        hours, (minute, second) = 0, [*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + minute + math.ceil(second / 60)


def slurm_parameters(config: Config, name: str) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor, each of its own type, for jobs of runs like this one; `name` is the
    job's."""
    launch = config.launch
    lost_after_s = math.ceil(config.parallel.lost_after_s)
    optional = {
        "gpus_per_node": launch.gpus_per_node,
        "mem": None if launch.memory_gb is None else f"{math.ceil(launch.memory_gb * 1024)}MB",
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
    }
    ranks = ranks_per_node(config)
    return {
        "job_name": name,
        "nodes": launch.nodes,
        # A pack is one task, which starts the ranks of its runs.
        "ntasks_per_node": 1 if launch.pack > 1 else ranks,
        "cpus_per_task": launch.cpus_per_rank * (launch.pack * ranks if launch.pack > 1 else 1),
        "time": minutes(launch.time),
        "signal_delay_s": launch.signal_before_s,
        "stderr_to_stdout": True,
        # A rank that was lost is named by the others: they have the time for it, and are ended after that.
        "srun_args": ["--kill-on-bad-exit=0", f"--wait={lost_after_s + 30}"],
        "additional_parameters": {"requeue": True, **sbatch_options(launch)},
        **{key: value for key, value in optional.items() if value is not None},
    }


def sbatch_options(launch: LaunchConfig) -> dict[str, str | bool]:
    """`launch.sbatch` as options. Raises UserError for one that has a key of its own."""
    options: dict[str, str | bool] = {}
    for text in launch.sbatch:
        name, separator, value = text.removeprefix("--").partition("=")
        if name in _KEYS:
            raise UserError(f"launch.sbatch: {text!r}: --{name} follows from {_KEYS[name]}")
        options[name] = value if separator else True
    return options


def setup_lines(launch: LaunchConfig, runs: str) -> list[str]:
    """Lines of the script before srun; `runs` is the one that sets the array `runs`."""
    return [
        *launch.setup,
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{launch.cpus_per_rank}}}",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over from sbatch by itself",
        runs,
        f'ended() {{ {PYTHON} -m gtddp_dist requeue "${{runs[@]}}" --exit-code "$1"; exit $?; }}',
        "# Whether each node has the run directories and the code.",
        "srun --kill-on-bad-exit=0 --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 "
        f'bash -c {shlex.quote(_check())} check "${{runs[@]}}" || ended $?',
    ]


def teardown_lines() -> list[str]:
    """Lines of the script after srun."""
    return ["ended $?"]


def one_task(runs: Sequence[Path]) -> str:
    """A line that sets the array `runs` of a job's script to these run directories."""
    return f"runs=({' '.join(shlex.quote(str(run)) for run in runs)})"


def task_of_array(listing: Path) -> str:
    """A line that does so for the tasks of an array; line i of the file `listing` has the runs of task i."""
    line = f'sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(listing))}'
    return f"IFS=$'\\t' read -r -a runs <<<\"$({line})\""


def _check() -> str:
    """A script that names the node it runs on where that lacks a run directory (its arguments) or this package."""
    node = "gtddp: error: node $(hostname):"
    shared = "run.dir must be on a file system that all nodes share"
    installed = f"{sys.executable} cannot import it: install it on every node, or on a file system that all share"
    return (
        f'for run; do [ -f "$run/{CONFIG}" ] || {{ echo "{node} there is no $run: {shared}" >&2; exit 2; }}; done; '
        f"{PYTHON} -c 'import gtddp_dist' || {{ echo \"{node} gtddp_dist: {installed}\" >&2; exit 2; }}"
    )
