"""One start of a run, as its history tells it: when it began, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from .errors import FAILED, OK, REQUEUE, UserError
from .jobs.history import Ended, Started, record
from .jobs.tail import last_step
from .launch import StopRequest
from .launch.ranks import host_name
from .team import Team

REASON_LENGTH = 500


@contextmanager
def refusals_recorded(run: Path, rank: int, stop: StopRequest) -> Iterator[None]:
    """Records, on rank 0, the end of a start that bad input, or `stop`, keeps from beginning in the block."""
    try:
        yield
    except UserError as error:
        if rank == 0:
            step = last_step(run)
            signals = list(dict.fromkeys(number.name for number in stop.signals))
            record(run, Ended(step=step, code=error.exit_code, reason=str(error)[:REASON_LENGTH], signals=signals))
        raise


class Chronicle:
    """A context manager around the work of a start, on all ranks: rank 0 records its beginning and its end.

    The end is recorded also where an exception leaves the block; a process that is killed records none. Where a rank
    was lost there can be two records, of what the connection to it said and of who it was: the last counts.
    """

    def __init__(self, run: Path, team: Team, stop: StopRequest) -> None:
        self._run, self._team, self._stop = run, team, stop
        self._code: int | None = None
        self._lost = False
        self._reason = ""

    def __enter__(self) -> Chronicle:
        hosts = list(dict.fromkeys(self._team.gather_text(host_name())))
        if self._team.rank == 0:
            record(
                self._run,
                Started(
                    step=last_step(self._run),
                    job=os.environ.get("SLURM_JOB_ID"),
                    restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
                    hosts=hosts,
                ),
            )
        return self

    def ends(self, code: int, reason: str = "") -> int:
        """Notes with which exit code the block will end, and why; returns it."""
        self._code, self._reason = code, reason
        return code

    def lost(self, who: str) -> None:
        """Records the end of a start that has lost a rank: its processes may not come to the end of the block."""
        self._lost = True
        record(self._run, Ended(step=last_step(self._run), code=FAILED, reason=who[:REASON_LENGTH]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code, reason, signals = FAILED if self._code is None else self._code, self._reason, [""]
        if error is not None:
            code = error.exit_code if isinstance(error, UserError) else FAILED
            reason = str(error) or ("another rank failed" if isinstance(error, UserError) else type(error).__name__)
        elif code == REQUEUE:
            # Ranks have agreed to stop, so all of them come here.
            signals = self._team.gather_text(" ".join(number.name for number in self._stop.signals))
        if self._team.rank == 0 and not self._lost:
            came = list(dict.fromkeys(" ".join(signals).split()))
            if code == REQUEUE:
                reason = f"stopped by {' and '.join(came) or 'a request'}"
            if code == OK:
                reason = ""
            record(
                self._run,
                Ended(step=last_step(self._run), code=code, reason=reason[:REASON_LENGTH], signals=came),
            )
