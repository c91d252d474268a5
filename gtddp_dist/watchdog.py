"""Ends a run whose steps do not end, with the stacks of all ranks in the run directory.

A step that hangs looks like one that takes long: in a collective that somebody does not come to, on a file system
that does not answer, in a user's loop. Whoever hangs, all ranks wait, and all give signs of life.

Limit: like signs of life (`gtddp_dist.liveness`) this is a Python thread. A call that keeps Python's global lock for
ever stops it, too; other ranks then take this one for lost. torch's operations, collectives and files release it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

import torch
import torch.distributed as dist

from .errors import FAILED
from .liveness import STALLED
from .running_clock import RunningClock

FOLDER: Final = "stalled"
"""Folder of the stacks in a run directory."""

FIRST_STEP_S: Final = 600.0
"""What the first step of a start may take at least: kernels are compiled and chosen in it, and workers started."""

WRITE_WITHIN_S: Final = 10.0
"""How long writing stacks may take: a file system that does not answer may be why the step does not end."""

_TORCH = str(Path(torch.__file__).parent)


class Witness(Protocol):
    """This process among the ranks of its run."""

    @property
    def who(self) -> str:
        """For messages: which rank, of which segment, on which host."""
        ...

    def give_up(self, reason: str) -> None:
        """Tells the others and the run's history that this rank has failed; returns when that is done, or cannot be."""
        ...

    def once_stalled(self, write: Callable[[], object] | None) -> None:
        """`write` is called when another rank's watchdog ends the run, before this process ends."""
        ...


class Watchdog:
    """A context manager around training; where `step` does not change for `limit_s` seconds it ends this process.

    Every rank's stacks are then in `<run>/stalled`, one line on stderr names this rank and that file, the others end
    with it, and the exit code is FAILED. Time in which the process was stopped (Ctrl-Z) does not count.

    Args:
        run: the run directory.
        rank: of this process.
        witness: how others hear of it.
        limit_s: seconds; None: nothing is watched.
        step: the number of steps that have ended; called from another thread.
    """

    def __init__(self, run: Path, rank: int, witness: Witness, limit_s: float | None, step: Callable[[], int]) -> None:
        self._file, self._rank = run / FOLDER / f"rank-{rank}.txt", rank
        self._witness, self._limit_s, self._step = witness, limit_s, step
        self._main = threading.main_thread().ident
        self._quit = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit_s is not None:
            self._witness.once_stalled(self.write_stacks)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._limit_s is not None:
            self._quit.set()
            self._thread.join()
            self._witness.once_stalled(None)

    def write_stacks(self) -> str:
        """Writes the stacks of all threads of this process; where, for a message. On stderr where that cannot be."""
        done: list[str] = []
        problem = [f"no answer for {WRITE_WITHIN_S:.0f} s"]

        def write() -> None:
            try:
                self._file.parent.mkdir(exist_ok=True)
                with open(self._file, "w", encoding="utf-8") as file:
                    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    file.write(f"{now}: {self._witness.who}, process {os.getpid()}, step {self._step() + 1}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                done.append(f"its stacks are in {self._file}")
                self._write_flight_record()
            except OSError as error:
                problem.append(str(error))

        writing = threading.Thread(target=write, name="write stacks", daemon=True)
        writing.start()
        writing.join(WRITE_WITHIN_S)
        if not done:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            return f"its stacks are above: {self._file} cannot be written: {problem[-1]}"
        return done[0]

    def _write_flight_record(self) -> None:
        """What NCCL has done and does last, where it is used: torch's flight recorder."""
        recorder = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None) if dist.is_available() else None
        if recorder is not None and dist.is_initialized() and dist.get_backend() == "nccl":
            self._file.with_suffix(".nccl.json").write_bytes(recorder())

    def _watch(self) -> None:
        assert self._limit_s is not None
        pause_s = min(1.0, self._limit_s / 4)
        clock, first = RunningClock(3 * pause_s), self._step()
        seen, since = first, 0.0
        while not self._quit.wait(pause_s):
            clock.tick()
            step = self._step()
            if step != seen:
                seen, since = step, clock.now
            elif clock.now - since > (max(self._limit_s, FIRST_STEP_S) if step == first else self._limit_s):
                self._end(step, clock.now - since)

    def _end(self, step: int, silent_s: float) -> None:
        """Ends this process; nothing here waits for its main thread."""
        where = self._where()
        reason = f"{STALLED} {silent_s:.0f} s (train.stalled_after_s): it was at {where} in step {step + 1}"
        stacks = self.write_stacks()
        # Past Python's own buffers, whose locks the main thread may hold, and in one piece.
        os.write(2, f"gtddp: error: {self._witness.who}: {reason}; {stacks}\n".encode())
        self._witness.give_up(f"{reason}; {stacks}")
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(1.0)
        os._exit(FAILED)

    def _where(self) -> str:
        """The innermost line of the main thread that is not torch's."""
        frame = sys._current_frames().get(self._main or 0)
        lines = [line for line in traceback.extract_stack(frame) if not line.filename.startswith(_TORCH)]
        return f"{lines[-1].filename}:{lines[-1].lineno} ({lines[-1].name})" if lines else "an unknown place"


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
