"""Ranks by the dozen: a process that has imported torch and DeepSpeed once forks them.

Importing takes 5 s for one process and 20 s for eight; a fork takes none. The forked processes know themselves as ranks
by the variables that `gtddp` sets for those it starts, and run a function of one of the modules here::

    server = shared(request.config)
    (ended,) = server.run(Job("ranks.command:work", 2, tmp_path, {"argv": ["train", "digits"]}))
    assert [rank.code for rank in ended] == [0, 0]

Run as a program, this module is that process: it reads jobs from its standard input, a line of JSON each time, and
writes how they ended to its standard output.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, cast

import pytest

from gtddp_dist.launch import Ranks
from gtddp_dist.launch.local import LISTEN_FD, PARENT, PR_SET_PDEATHSIG, STARTED_BY

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = Path(sys.modules["gtddp_dist"].__file__ or "").resolve().parents[1]
IMPORTED = (
    "gtddp_dist.pipeline.engine",
    "gtddp_dist.pipeline.parts",
    "gtddp_dist.train",
    # What these, and torch and DeepSpeed, import late.
    "deepspeed.module_inject",
    "deepspeed.moe.layer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._dynamo",
    "torch.utils.cpp_extension",
)
"""What ranks need, besides what `_warm_up` imports."""
START_WITHIN_S = 120.0

Arguments = Mapping[str, object]
Work = Callable[[Ranks, Arguments], int | None]
"""What a rank does: its exit code; None is 0."""


@dataclass(frozen=True)
class Job:
    """Ranks that run together.

    Attributes:
        program: "module:function", a `Work`.
        world: how many ranks.
        folder: where `rank-<n>.out` and `rank-<n>.err` go, and where ranks run.
        arguments: for the program, plain data.
        environ: rank -> variables that it has besides.
        within_s: after which a rank prints where it is and ends; 5 s later it is killed.
    """

    program: str
    world: int
    folder: Path
    arguments: Arguments = field(default_factory=dict)
    environ: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    within_s: float = 60.0


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    rank: int
    process: int
    code: int
    """Exit code; below 0 the signal that it was killed by."""
    at: float
    """By time.monotonic()."""
    out: str
    err: str
    killed_here: bool
    """Whether it had to be killed, since it did not end in time."""


def environment(**more: str) -> dict[str, str]:
    """For processes that tests start: this package and these modules can be imported, nobody is a rank yet."""
    left = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GTDDP_", "PMI", "MPI", "SLURM", "TORCHELASTIC")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    path = os.pathsep.join([str(PACKAGE), str(TESTS)])
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | more


class Server:
    """The process that forks, and the way to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ranks.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TESTS,
            env=environment(),
            start_new_session=True,
        )

    def run(self, *jobs: Job) -> list[list[Ended]]:
        """Run jobs at the same time; for each how its ranks ended, in their order."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = []
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            asked.append(asdict(job) | {"folder": str(job.folder)})
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        within_s = START_WITHIN_S + max(job.within_s for job in jobs) + 15
        # A server that hangs is ended, which ends the wait for its line.
        guard = threading.Timer(within_s, self._kill)
        guard.start()
        try:
            reply = self._process.stdout.readline()
        finally:
            guard.cancel()
        assert reply, f"the server of ranks ended ({self._process.poll()}), or gave no answer within {within_s:.0f} s"
        return [[Ended(**rank) for rank in ranks] for ranks in json.loads(reply)]

    def _kill(self) -> None:
        # Its ranks end with it (PR_SET_PDEATHSIG).
        self._process.kill()

    def close(self) -> None:
        """End the process, and with it whoever is left."""
        self._kill()
        self._process.communicate()


_SHARED = pytest.StashKey[Server]()


def shared(config: pytest.Config) -> Server:
    """The one server of a test session."""
    if _SHARED not in config.stash:
        config.stash[_SHARED] = server = Server()
        config.add_cleanup(server.close)
    return config.stash[_SHARED]


def told(ranks: list[Ended]) -> str:
    """What all ranks have said, for messages of failed tests."""
    return "\n".join(f"--- rank {r.rank}: code {r.code}\n{r.out}{r.err}" for r in ranks)


# ----------------------------------------------------------------------------------------------------------
# The process that forks


class _Forked:
    """The ranks of one job."""

    def __init__(self, job: Mapping[str, object]) -> None:
        self.job = job
        self.folder = Path(cast(str, job["folder"]))
        self.world = cast(int, job["world"])
        self.deadline = time.monotonic() + cast(float, job["within_s"]) + 5
        self.ended: dict[int, tuple[int, float, bool]] = {}
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            self.processes = [self._fork(rank, listener) for rank in range(self.world)]

    def _fork(self, rank: int, listener: socket.socket) -> int:
        parent = os.getpid()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(self.folder / f"rank-{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = self._work(rank, listener, parent)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _work(self, rank: int, listener: socket.socket, parent: int) -> int:
        faulthandler.dump_traceback_later(cast(float, self.job["within_s"]), exit=True)
        port = listener.getsockname()[1]
        host = socket.gethostname()
        ranks = Ranks(rank, self.world, rank, self.world, host, "127.0.0.1", port, "gtddp", listener.fileno())
        if rank > 0:
            listener.close()
        ranks.export()
        os.environ |= {STARTED_BY: "gtddp", PARENT: str(parent)}
        if rank == 0:
            os.environ[LISTEN_FD] = str(listener.fileno())
        os.environ |= cast(dict[str, dict[str, str]], self.job["environ"]).get(str(rank), {})
        os.chdir(self.folder)
        module, _, name = cast(str, self.job["program"]).partition(":")
        work = cast(Work, getattr(importlib.import_module(module), name))
        return work(ranks, cast(Arguments, self.job["arguments"])) or 0

    def poll(self) -> bool:
        """Whether all have ended; those that are late are killed."""
        now = time.monotonic()
        for rank, process in enumerate(self.processes):
            if rank in self.ended:
                continue
            late = now > self.deadline
            if late:
                os.kill(process, signal.SIGKILL)
            found, status = os.waitpid(process, 0 if late else os.WNOHANG)
            if found:
                self.ended[rank] = (os.waitstatus_to_exitcode(status), time.monotonic(), late)
        return len(self.ended) == self.world

    def result(self) -> list[dict[str, object]]:
        found = []
        for rank, process in enumerate(self.processes):
            code, at, late = self.ended[rank]
            out, err = (
                (self.folder / f"rank-{rank}.{name}").read_text(encoding="utf-8", errors="replace")
                for name in ("out", "err")
            )
            found.append(asdict(Ended(rank, process, code, at, out, err, late)))
        return found


def _warm_up() -> None:
    """Do what a rank does before it meets the others, for what is imported on the way."""
    from gtddp_dist.config import load_config
    from gtddp_dist.parts import new_optimizer_of
    from gtddp_dist.pipeline.parts import prepare

    config = load_config("digits", ["parallel.pipe=2", "model.width=4"])
    new_optimizer_of(config)(prepare(config).model, config)


def _serve(requests: IO[str], replies: IO[str]) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    _warm_up()
    # Locks that another thread holds at a fork stay locked in the child for ever.
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, threading.enumerate()
    for line in iter(requests.readline, ""):
        jobs = [_Forked(job) for job in json.loads(line)]
        while not all([job.poll() for job in jobs]):
            time.sleep(0.02)
        replies.write(json.dumps([job.result() for job in jobs]) + "\n")
        replies.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what is imported may print
        _serve(sys.stdin, answers)
