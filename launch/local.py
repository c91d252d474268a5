"""Ranks that gtddp starts itself, all on this host: a parent that works nothing but starts, watches and ends them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from ..errors import BAD_INPUT, FAILED, OK, REQUEUE
from .lines import LineMerger
from .ranks import Ranks, checked, number
from .stop import STOP_SIGNALS, release_stop_signals, stop_signals_held

STARTED_BY: Final = "GTDDP_STARTED_BY"
PARENT: Final = "GTDDP_PARENT"
LISTEN_FD: Final = "GTDDP_LISTEN_FD"

END_WITHIN_S: Final = 40.0
"""After a rank has failed, how long the others have to end by themselves, with their own error: longer than
`parallel.lost_after_s` is by default, so that they say what they lost."""

IDLE_WITHIN_S: Final = 8.0
"""The same where no thread of those left runs any more (a rank that was stopped, or waits without time-out)."""

HURRY_WITHIN_S: Final = 5.0
"""The same after a second Ctrl-C."""

TERM_WITHIN_S: Final = 5.0
"""How long a rank has between SIGTERM and SIGKILL."""

POLL_S: Final = 0.1
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def discover(environ: Mapping[str, str]) -> Ranks | None:
    """This process among the ranks that `start` has started; None where it is not one of them."""
    if environ.get(STARTED_BY) != "gtddp":
        return None
    return checked(
        Ranks(
            rank=number(environ, "RANK"),
            world=number(environ, "WORLD_SIZE"),
            local_rank=number(environ, "LOCAL_RANK"),
            local_world=number(environ, "LOCAL_WORLD_SIZE"),
            host=socket.gethostname(),
            address=environ["MASTER_ADDR"],
            port=number(environ, "MASTER_PORT"),
            started_by="gtddp",
            listen_fd=number(environ, LISTEN_FD) if LISTEN_FD in environ else None,
        )
    )


def enter(environ: MutableMapping[str, str] = os.environ) -> None:
    """What a rank that `start` has started does first, once its handlers of the stop signals are there.

    It ends with its parent from now on, hears of stop signals that came since it was started, and takes the variables
    by which it knows itself out of the environment, so that nothing it starts takes itself for a rank.
    """
    end_with_parent(number(environ, PARENT))
    for name in (STARTED_BY, PARENT, LISTEN_FD):
        environ.pop(name, None)
    release_stop_signals()


def end_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent, the process of that number, ends."""
    # The kernel's word on the parent's death does not depend on what this process is doing at the time, as a thread
    # that watches a pipe would: it may be in native code for long.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before it was watched
        os._exit(FAILED)


def start(command: Sequence[str], wanted: int) -> int:
    """Starts `command` as `wanted` ranks on this host and waits until all have ended; the exit code of the run.

    Each learns from its environment which rank it is (`discover`), and must call `enter`. Rank 0 has this process's
    output; that of the others comes line by line with "[rank 1] " before it. Stop signals are handed on. Where a rank
    fails, the others are ended in time (`END_WITHIN_S`); no process is left, also of those that ranks have started.
    """
    with _Signals() as signals:
        children = _Children(signals)
        try:
            children.start(command, wanted)
            return children.wait()
        finally:
            children.kill()


def combined(codes: Sequence[int | None]) -> int:
    """The exit code of a run whose ranks ended with `codes`; None stands for one that was ended by the launcher.

    OK where all are; REQUEUE where the others are; BAD_INPUT where at least one is, and none failed by itself.
    """
    if all(code == OK for code in codes):
        return OK
    if all(code in (OK, REQUEUE) for code in codes):
        return REQUEUE
    if BAD_INPUT in codes and all(code in (OK, REQUEUE, BAD_INPUT, None) for code in codes):
        return BAD_INPUT
    return FAILED


def how_it_ended(code: int) -> str:
    """What a returncode of subprocess means, such as "was killed by SIGKILL"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal, which has no name of its own
        return f"was killed by signal {-code}"


class _Signals:
    """Stop signals of the parent, and Ctrl-Z; they wait here until somebody asks for them.

    Ranks are in sessions of their own, so what a terminal sends to this process's group does not reach them: it
    comes to them once, from here.
    """

    def __init__(self) -> None:
        self.came: list[signal.Signals] = []
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Signals:
        for name in (*STOP_SIGNALS, signal.SIGTSTP):
            self._former[name] = signal.signal(name, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._former.items():
            # None: a handler that was not installed from Python, and cannot be put back from here.
            signal.signal(name, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came.append(signal.Signals(number))


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    code: int | None = None
    ended_here: bool = False
    """Whether the launcher has sent it a signal that ends it."""

    @property
    def runs(self) -> bool:
        return self.code is None

    def send(self, number: signal.Signals) -> None:
        # Not reaped yet, so the number is still its own.
        if self.runs:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Ends it and what it has started."""
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(self.process.pid, signal.SIGKILL)

    def reap(self) -> bool:
        """Whether it has ended just now; what it had started is ended then."""
        if not self.runs or os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.kill()  # before its number is given back, and may name another process group
        self.code = self.process.wait()
        return True


class _Children:
    """The ranks of a run, from their start to their end."""

    def __init__(self, signals: _Signals) -> None:
        self._signals = signals
        self._children: list[_Child] = []
        self._lines = LineMerger()
        self._host = socket.gethostname()
        self._interrupts = 0
        self._first_failed: _Child | None = None
        self._deadline: float | None = None
        self._within_s = 0.0
        self._kill_at: float | None = None
        self._activity: tuple[int, float] = (-1, 0.0)

    def start(self, command: Sequence[str], wanted: int) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=wanted + 128) as listener, stop_signals_held():
            for rank in range(wanted):
                self._children.append(self._start_one(command, wanted, rank, listener))

    def _start_one(self, command: Sequence[str], wanted: int, rank: int, listener: socket.socket) -> _Child:
        port = listener.getsockname()[1]
        ranks = Ranks(rank, wanted, rank, wanted, self._host, "127.0.0.1", port, "gtddp")
        cores = len(os.sched_getaffinity(0))
        environ = {"OMP_NUM_THREADS": str(max(1, cores // wanted)), **os.environ, **ranks.variables()}
        environ |= {STARTED_BY: "gtddp", PARENT: str(os.getpid())}
        if rank == 0:
            environ[LISTEN_FD] = str(listener.fileno())
        process = subprocess.Popen(
            list(command),
            env=environ,
            stdin=subprocess.DEVNULL,
            # Rank 0 keeps the terminal, if there is one, and with it the progress bar.
            stdout=None if rank == 0 else subprocess.PIPE,
            stderr=None if rank == 0 else subprocess.PIPE,
            pass_fds=[listener.fileno()] if rank == 0 else [],
            start_new_session=True,
        )
        if rank > 0 and process.stdout is not None and process.stderr is not None:
            self._lines.add(process.stdout, 1, f"[rank {rank}] ".encode())
            self._lines.add(process.stderr, 2, f"[rank {rank}] ".encode())
        return _Child(rank, process)

    def wait(self) -> int:
        """Waits until all have ended; the exit code of the run."""
        while any(child.runs for child in self._children):
            self._lines.pass_on(POLL_S)
            self._hand_on_signals()
            for child in self._children:
                if child.reap():
                    self._judge(child)
            self._end_those_left()
        self._lines.finish()
        return combined([None if child.ended_here else child.code for child in self._children])

    def kill(self) -> None:
        """Ends at once whoever is left."""
        for child in self._children:
            if child.runs:
                child.kill()
                child.code = child.process.wait()
        self._lines.close()

    def _hand_on_signals(self) -> None:
        while self._signals.came:
            number = self._signals.came.pop(0)
            if number == signal.SIGTSTP:
                self._rest()
                continue
            for child in self._children:
                child.send(number)
            self._interrupts += number == signal.SIGINT
            if number == signal.SIGINT and self._interrupts > 1:
                self._set_deadline(HURRY_WITHIN_S)

    def _rest(self) -> None:
        """Ctrl-Z: all stop, and go on together when this process does."""
        for child in self._children:
            child.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for child in self._children:
            child.send(signal.SIGCONT)

    def _judge(self, child: _Child) -> None:
        code = child.code
        if code is None or code in (OK, REQUEUE) or child.ended_here:
            return
        first = self._first_failed is None
        # Of those that end with an exit code afterwards it is known why: they say it themselves.
        if code < 0 or (first and code != BAD_INPUT):
            self._say(f"rank {child.rank} on {self._host} {how_it_ended(code)}")
        if first:
            self._first_failed = child
            self._set_deadline(END_WITHIN_S)

    def _set_deadline(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        if self._deadline is None or deadline < self._deadline:
            self._deadline, self._within_s = deadline, within_s

    def _end_those_left(self) -> None:
        left = [child for child in self._children if child.runs]
        if self._deadline is None or not left:
            return
        now = time.monotonic()
        if self._kill_at is None and (now > self._deadline or self._are_idle(left, now)):
            names = ", ".join(str(child.rank) for child in left)
            since = "a second Ctrl-C" if self._first_failed is None else f"the end of rank {self._first_failed.rank}"
            self._say(
                f"rank{'s' if len(left) > 1 else ''} {names} on {self._host} did not end after {since}: ended by gtddp"
            )
            for child in left:
                child.ended_here = True
                child.send(signal.SIGTERM)
            self._kill_at = now + TERM_WITHIN_S
        elif self._kill_at is not None and now > self._kill_at:
            for child in left:
                child.kill()

    def _are_idle(self, left: Sequence[_Child], now: float) -> bool:
        """Whether no thread of those left has run for IDLE_WITHIN_S; heartbeats alone are more than that."""
        switches = sum(_context_switches(child.process.pid) for child in left)
        if switches != self._activity[0]:
            self._activity = (switches, now)
        return now - self._activity[1] > IDLE_WITHIN_S

    def _say(self, message: str) -> None:
        self._lines.write(2, f"gtddp: {message}\n".encode())


def _context_switches(process: int) -> int:
    """How often the threads of a process were put on a core or taken off it; 0 for one that is gone."""
    total = 0
    for status in Path(f"/proc/{process}/task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # the thread has just ended
            continue
        total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total
