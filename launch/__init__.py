"""How the processes of a run are started, and how a run is asked to stop.

One file here for each way of starting: `local` (gtddp starts the ranks of one host), `torchrun`, `mpi`, `slurm` (they
have started them). Each has `discover`, which tells from the environment whether a process was started that way; `WAYS`
has them in order. The package imports no torch, so that starting ranks stays cheap.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import OK, REQUEUE, ToldElsewhere, UserError
from . import local, mpi, slurm, torchrun
from .ranks import Ranks, alone
from .rendezvous import RankMissing, Rendezvous, agree_on_start
from .stop import StopRequest, release_stop_signals, stop_signals_held

__all__ = [
    "WAYS",
    "RankMissing",
    "Ranks",
    "Rendezvous",
    "StopRequest",
    "agree_on_start",
    "discover",
    "launch",
    "stop_signals_held",
    "told_once",
]

Work = Callable[[StopRequest, Ranks], int]
"""What one rank of a run does: given the flag that asks it to stop, and the ranks, it returns its exit code."""

WAYS: Sequence[Callable[[Mapping[str, str]], Ranks | None]] = (
    local.discover,
    torchrun.discover,
    mpi.discover,
    slurm.discover,
)
"""From the innermost to the outermost: the first that knows this process as its rank has started it.

A starter's variables are inherited by whatever it starts. gtddp takes its own out of the environment, so they are never
left from further out; torchrun runs inside of mpirun or srun (one on each host), not the reverse; mpirun runs inside of
a Slurm job and may start its helpers with srun (`mpi.by_slurm` tells its ranks from those of `srun --mpi`).
"""


def discover(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """This process among the ranks of whoever started it; None where it was not started as a rank.

    Raises UserError where what it finds is incomplete or contradicts itself. Under mpirun all ranks must call it.
    """
    for way in WAYS:
        try:
            ranks = way(environ)
        except UserError:
            _here.lost = True
            raise
        if ranks is not None:
            return ranks
    return None


def launch(work: Work, wanted: int, argv: Sequence[str] | None = None) -> int:
    """Runs `work` on `wanted` ranks; the exit code of this process.

    A process that was started as a rank does that rank's work. Any other does the work itself where one rank is
    wanted; else it starts the ranks on this host as `python -m gtddp_dist` with `argv` (default: the arguments of this
    process), which come here in turn, and waits for them. torch's variables (RANK, ...) are set while ranks work.

    Raises UserError where not `wanted` ranks were started.
    """
    ranks = discover()
    if ranks is None and wanted > 1:
        command = [sys.executable, "-m", "gtddp_dist", *(sys.argv[1:] if argv is None else argv)]
        return local.start(command, wanted)
    ranks = ranks or alone()
    if ranks.world != wanted:
        raise UserError(_mismatch(ranks, wanted))
    if ranks.world > 1:
        ranks.export()
    _here.ranks = ranks
    with StopRequest() as stop:
        if ranks.started_by == "gtddp":
            local.enter()
        else:
            release_stop_signals()
        if ranks.started_by != "mpirun":
            return work(stop, ranks)
        agreed = False
        try:
            code = work(stop, ranks)
            agreed = code in (OK, REQUEUE)
        finally:
            if not agreed:
                mpi.leave_without_the_others()
        return code


@dataclass
class _Here:
    """What this process knows of itself."""

    ranks: Ranks | None = None
    """Once it works as one of them; what told it so is no longer in the environment then."""
    lost: bool = False
    """Whether it was started as a rank, and cannot tell which."""


_here = _Here()

REFUSED_WITHIN_S = 60.0
"""How long a rank that cannot begin waits for the others to say so."""


def told_once(error: UserError) -> UserError:
    """What a process that cannot go on for `error` is to tell.

    Where ranks meet what is wrong with them before they have met each other, such as a configuration that cannot be
    used, they meet for it: rank 0 tells what any of them has found, the others get a ToldElsewhere. A rank that cannot
    meet rank 0 tells its own error.
    """
    if _here.lost or Rendezvous.begun or isinstance(error, ToldElsewhere):
        return error
    ranks = _here.ranks or discover()
    if ranks is None or ranks.world == 1:
        return error
    if ranks.started_by == "mpirun":
        mpi.leave_without_the_others()
    try:
        meeting = Rendezvous(ranks, REFUSED_WITHIN_S)
    except UserError:
        return error
    try:
        meeting.prepared(str(error))
    except RankMissing:
        return error
    except UserError as together:
        together.exit_code = error.exit_code
        return together
    return error


def _mismatch(ranks: Ranks, wanted: int) -> str:
    start = {
        "torchrun": f"torchrun --nproc-per-node={wanted} on one host",
        "mpirun": f"mpirun -n {wanted}",
        "srun": f"srun --ntasks={wanted}",
    }
    plural = "" if ranks.world == 1 else "s"
    fix = f"start {wanted} ({start[ranks.started_by]})" if ranks.started_by in start else "start it again"
    return (
        f"the grid (parallel.pipe times parallel.data) has {wanted} rank{'' if wanted == 1 else 's'}, but "
        f"{ranks.started_by} started {ranks.world} process{'es' if plural else ''}: {fix}, or choose parallel.pipe and "
        f"parallel.data whose product is {ranks.world}"
    )
