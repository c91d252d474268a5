"""Ranks that mpirun started (MPICH, Open MPI, Intel MPI), and messages between them through mpi4py."""

from __future__ import annotations

import atexit
import socket
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ToldElsewhere, UserError
from .patience import Patience
from .pause import Pause
from .ranks import Ranks, checked, number

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

# Rank and size as the MPIs name them. PMI_*: MPICH and Intel.
VARIABLES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
# How long a rank that has failed waits for the others to fail too, before it ends without them.
LEAVE_WITHIN_S = 3.0
# Of the files with the shared memory of ranks on one host, as MPICH names them.
SEGMENTS = "/dev/shm/mpich_shm_"
TO_FIRST, FROM_FIRST = 1, 2  # tags


@dataclass
class _Meeting:
    """What `discover` has found and made, once."""

    ranks: Ranks
    comm: Comm
    """Of all ranks, for our own messages, which so do not meet those of others. Making it is a meeting itself."""


_met: list[_Meeting] = []
_failed: list[bool] = []


def discover(environ: Mapping[str, str]) -> Ranks | None:
    """This process among the ranks of mpirun; None where mpirun did not start it.

    Of several ranks, every one must call it: they agree on where to meet. A second call has the answer of the first.
    They meet at rank 0's host, at a port that is free there; MASTER_ADDR and MASTER_PORT of rank 0 count over
    these. Raises UserError where mpi4py is missing, or is of another MPI than mpirun.
    """
    if by_slurm(environ):
        return None
    names = next((names for names in VARIABLES if names[0] in environ), None)
    if names is None:
        return None
    rank, world = (number(environ, name) for name in names)
    if world == 1:  # nobody to meet, so mpi4py is not needed
        host = socket.gethostname()
        return checked(Ranks(rank, 1, 0, 1, host=host, address="127.0.0.1", port=0, started_by="mpirun"))
    if not _met:
        _met.append(_meet(environ, rank, world))
    return _met[0].ranks


def by_slurm(environ: Mapping[str, str]) -> bool:
    """Whether the variables of an MPI are there because srun started this process (`srun --mpi=pmi2`).

    mpirun inside a Slurm job may start its helpers with srun, whose variables its ranks then inherit; MPICH's and
    Intel's mpirun are known by MPI_LOCALNRANKS, Open MPI's by variables of its own.
    """
    if "OMPI_COMM_WORLD_RANK" in environ or "MPI_LOCALNRANKS" in environ or "SLURM_STEP_ID" not in environ:
        return False
    return environ.get("PMI_RANK") == environ.get("SLURM_PROCID")


def leave_without_the_others() -> None:
    """This rank has failed: at its end it shall not wait for the others for long.

    MPI_Finalize waits for all ranks, and a rank that failed alone would wait for ever.
    """
    _failed.append(True)


def _meet(environ: Mapping[str, str], rank: int, world: int) -> _Meeting:
    try:
        import mpi4py
    except ImportError:
        raise UserError(
            f"mpirun started this process as rank {rank} of {world}, but mpi4py is not installed: "
            f"pip install 'gtddp-dist[cluster]'"
        ) from None
    mpi4py.rc.finalize = False  # `_leave` does it
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpi4py finds no MPI library ({error}): install that of mpirun, or pip install mpich"
        ) from error
    atexit.register(_leave)
    world_comm = MPI.COMM_WORLD
    if world_comm.size != world:
        raise UserError(
            f"mpirun started {world} processes, but mpi4py sees {world_comm.size}: mpi4py is of another MPI than "
            f"mpirun. Use the mpirun of mpi4py's MPI ({MPI.Get_library_version().splitlines()[0]})"
        )
    rank = world_comm.rank
    with_host = world_comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_world = with_host.rank, with_host.size
    with_host.Free()
    host = socket.gethostname()
    address, port, listen_fd, problem = "", 0, None, ""
    if rank == 0:
        on_one_host = local_world == world
        address = environ.get("MASTER_ADDR") or ("127.0.0.1" if on_one_host else host)
        wanted = number(environ, "MASTER_PORT", 0)
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1" if address == "127.0.0.1" else "", wanted))
            listener.listen(world + 128)
            port, listen_fd = listener.getsockname()[1], listener.detach()
        except OSError as error:  # the others must hear of it: they wait for the port
            problem = f"rank 0 cannot listen on port {wanted} (MASTER_PORT) of {host}: {error}. Choose a free one"
            listener.close()
    address, port, problem = world_comm.bcast((address, port, problem), root=0)
    if problem:
        if rank != 0:
            time.sleep(1.0)  # or mpirun might end rank 0 before it has told
            raise ToldElsewhere
        raise UserError(problem)
    ranks = checked(Ranks(rank, world, local_rank, local_world, host, address, port, "mpirun", listen_fd))
    own_comm = world_comm.Dup()
    if local_rank == 0:
        _remove_segments()
    return _Meeting(ranks, own_comm)


def _remove_segments() -> None:
    """Takes away the names of the shared memory that MPICH's ranks on this host have, and have all opened by now.

    MPICH does it at its end, which a rank that is killed does not come to: the memory would stay until the host is
    started again.
    """
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        name = line.split()[-1]
        if name.startswith(SEGMENTS):
            Path(name).unlink(missing_ok=True)


def _leave() -> None:
    """Ends MPI together with the other ranks. Without them MPI is not ended, and mpirun then ends them."""
    from mpi4py import MPI

    together = MPI.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + LEAVE_WITHIN_S if _failed else None
    pause = Pause(1e-4, 0.02)
    while not together.Test():
        if deadline is not None and time.monotonic() > deadline:
            return
        pause()
    MPI.Finalize()


class MpiExchange:
    """Texts from all ranks to rank 0 and back (`rendezvous.Exchange`), with time-outs, which MPI's collectives lack.

    For the ranks that `discover` has found in this process.
    """

    def __init__(self, ranks: Ranks, patience: Patience) -> None:
        self._ranks = ranks
        self._patience = patience
        self._comm = _met[0].comm

    def gather(self, name: str, text: str, within_s: float) -> list[str | None]:
        texts: list[str | None] = [text, *[None] * (self._ranks.world - 1)]
        wait = self._patience.wait(within_s, lambda: [rank for rank, found in enumerate(texts) if found is None])
        pause = Pause(1e-4, 0.02)
        while missing := [rank for rank, found in enumerate(texts) if found is None]:
            came = [rank for rank in missing if self._comm.iprobe(source=rank, tag=TO_FIRST)]
            for rank in came:
                theirs, texts[rank] = self._comm.recv(source=rank, tag=TO_FIRST)
                if theirs != name:
                    raise RuntimeError(f"rank {rank} is at {theirs!r} where rank 0 is at {name!r}")
            if not came:
                if wait.is_over():
                    break
                pause()
        return texts

    def answer(self, name: str, text: str, there: Sequence[int]) -> None:
        requests = [self._comm.isend((name, text), dest=rank, tag=FROM_FIRST) for rank in there]
        deadline, pause = time.monotonic() + LEAVE_WITHIN_S, Pause(1e-4, 0.02)
        # A rank that has gone meanwhile takes no message.
        while not all(request.Test() for request in requests) and time.monotonic() < deadline:
            pause()

    def ask(self, name: str, text: str, within_s: float) -> str | None:
        sent = self._comm.isend((name, text), dest=0, tag=TO_FIRST)
        # Who has come, only rank 0 knows.
        wait, pause = self._patience.wait(within_s, list[int], after_others_s=LEAVE_WITHIN_S), Pause(1e-4, 0.02)
        while not self._comm.iprobe(source=0, tag=FROM_FIRST):
            if wait.is_over():
                sent.Cancel()
                wait.raise_if_stopped()
                return None
            pause()
        theirs, answer = self._comm.recv(source=0, tag=FROM_FIRST)
        sent.wait()
        if theirs != name:
            raise RuntimeError(f"rank 0 is at {theirs!r} where rank {self._ranks.rank} is at {name!r}")
        return str(answer)


def gather_numbers(numbers: Sequence[float]) -> list[list[float]]:
    """As many numbers of every rank, in the order of ranks; on every rank. For ranks that `discover` has found.

    Whoever waits sleeps: MPI's own waiting takes a whole core, which ranks on CPUs need.
    """
    from mpi4py import MPI

    comm = _met[0].comm
    own = array("d", numbers)
    every = array("d", bytes(8 * len(own) * comm.size))
    request = comm.Iallgather([own, MPI.DOUBLE], [every, MPI.DOUBLE])
    pause = Pause(1e-4, 0.005)
    while not request.Test():
        pause()
    return [every[rank * len(own) : (rank + 1) * len(own)].tolist() for rank in range(comm.size)]
