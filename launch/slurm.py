"""Ranks that Slurm's srun started: the tasks of a job step."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from ..errors import UserError
from .ranks import Ranks, checked, host_name, number

# Steps of these and higher numbers are Slurm's own: the batch script, a shell of salloc, what ssh brings in.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below the ports that Linux gives away by itself (32768 on), above those that services commonly have.
PORTS = range(20000, 32000)
SCONTROL_TIMEOUT_S = 60.0


def discover(environ: Mapping[str, str]) -> Ranks | None:
    """This process among the tasks of a Slurm job step; None where it is not one of several.

    A batch script, a shell under salloc and a step of one task are no ranks. The ranks meet at the first host of the
    step, at a port that follows from the numbers of job, step and restart; MASTER_ADDR and MASTER_PORT count more.
    Raises UserError where a variable of Slurm is missing or no number, or the hosts cannot be told.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    step = number(environ, "SLURM_STEP_ID")
    # SLURM_NTASKS is that of the job in some shells: the step's own number counts over it.
    world = number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS", 1)
    if step >= FIRST_SPECIAL_STEP or world == 1:
        return None
    counts = _tasks_per_node(environ, world)
    address, hosts = environ.get("MASTER_ADDR", ""), []
    if not address:
        hosts = _hosts(environ)
        address = hosts[0]
    return checked(
        Ranks(
            rank=number(environ, "SLURM_PROCID"),
            world=world,
            local_rank=number(environ, "SLURM_LOCALID"),
            local_world=_local_world(environ, counts),
            host=host_name(environ),
            address=address,
            port=number(environ, "MASTER_PORT", port_of(number(environ, "SLURM_JOB_ID"), step, _restart(environ))),
            started_by="srun",
            hosts=_host_of_each(environ, counts, hosts),
        )
    )


def port_of(job: int, step: int, restart: int = 0) -> int:
    """The port at which the tasks of a step meet: the same in all of them, and another for the next job or step.

    It is another one too when the job was put back: ranks of the former start may still be there, where Slurm has given
    up their node.
    """
    return PORTS[(job * 31 + step + restart * 101) % len(PORTS)]


def _restart(environ: Mapping[str, str]) -> int:
    return number(environ, "SLURM_RESTART_COUNT", 0)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's count of tasks on every node, such as "2(x3),1" for 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"tasks per node of the Slurm step are given as {text!r}, expected such as '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _tasks_per_node(environ: Mapping[str, str], world: int) -> list[int]:
    return tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world))


def _local_world(environ: Mapping[str, str], counts: Sequence[int]) -> int:
    node = number(environ, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise UserError(f"Slurm numbers this node {node} (SLURM_NODEID), but tells of {len(counts)} nodes: {counts}")
    return counts[node]


def _host_of_each(environ: Mapping[str, str], counts: Sequence[int], hosts: Sequence[str]) -> tuple[str, ...]:
    """The host of each task; empty where tasks are laid out by a list or in planes (`--distribution`)."""
    if len(hosts) != len(counts):
        return ()
    layout = re.split("[:,]", environ.get("SLURM_DISTRIBUTION", "block"))[0]
    if layout == "block":  # they fill one node after another
        return tuple(host for host, count in zip(hosts, counts, strict=True) for _ in range(count))
    if layout == "cyclic":  # they go round; srun's own way where there are no more tasks than nodes
        return tuple(
            host for turn in range(max(counts)) for host, count in zip(hosts, counts, strict=True) if turn < count
        )
    return ()


def _hosts(environ: Mapping[str, str]) -> list[str]:
    """Those of the step, the first one first."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("Slurm names no hosts (SLURM_STEP_NODELIST): set MASTER_ADDR to the host of rank 0")
    if not any(mark in nodes for mark in ",["):
        return [nodes]
    advice = "set MASTER_ADDR to the host of rank 0"
    scontrol = shutil.which("scontrol", path=environ.get("PATH"))
    if scontrol is None:
        raise UserError(f"the hosts {nodes!r} cannot be told apart: scontrol is not on the PATH. Add it, or {advice}")
    command = [scontrol, "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SCONTROL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(command)} gave no answer in {SCONTROL_TIMEOUT_S:.0f} s: {advice}") from None
    hosts = done.stdout.split()
    if done.returncode != 0 or not hosts:
        raise UserError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}. Mend it, or {advice}")
    return hosts
