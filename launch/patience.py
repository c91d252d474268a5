"""How long a rank waits for the others at the start: not much longer, once it is told to stop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from ..errors import REQUEUE, UserError
from .ranks import Ranks
from .stop import StopRequest

STOPPED_WITHIN_S = 10.0
"""How much longer a rank waits after a stop signal: those that were told to stop at the same time, and are about to
come, then all stop together. Less than the 30 s after which Slurm and torchrun kill."""


class StoppedWaiting(UserError):
    """Told to stop while it waited for others at the start, and they did not come. The message names them."""

    exit_code = REQUEUE


class Patience:
    """What the waits of a rank at the start have in common.

    Args:
        ranks: this one among the others.
        stop: what asks it to stop; None: nothing does.
        segment_of: a rank -> its segment, for people; None where it is not known.
    """

    def __init__(self, ranks: Ranks, stop: StopRequest | None, segment_of: Callable[[int], str] | None) -> None:
        self._ranks, self._stop, self._segment_of = ranks, stop, segment_of
        self._stopped_at: float | None = None

    def wait(self, within_s: float, missing: Callable[[], Sequence[int]], after_others_s: float = 0.0) -> Wait:
        """A wait of so many seconds at most. `missing` are those that it is for, and have not come.

        `after_others_s`: how much longer than the others it lasts after a stop signal, to hear from them.
        """
        return Wait(self, within_s, missing, after_others_s)

    def is_told_to_stop(self, missing: Callable[[], Sequence[int]]) -> bool:
        """Whether it is; says so the first time, and for whom it waits."""
        if self._stop is None or not self._stop.requested:
            return False
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            whom = self.named(missing())
            print(
                f"gtddp: rank {self._ranks.rank} on {self._ranks.host} is told to stop ({self._stop.reason}) while it "
                f"waits for {whom}: ends in {STOPPED_WITHIN_S:.0f} s, unless all come before",
                file=sys.stderr,
                flush=True,
            )
        return True

    def stopped_since_s(self) -> float:
        """Seconds since the stop signal was heard; 0 where none was."""
        return 0.0 if self._stopped_at is None else time.monotonic() - self._stopped_at

    def named(self, ranks: Sequence[int]) -> str:
        """Such as "rank 1 (segment 2 of 2, on node1)", as far as it is known."""
        return ", ".join(self._named(rank) for rank in ranks) or "an answer of rank 0"

    def _named(self, rank: int) -> str:
        host = self._ranks.host_of(rank)
        told = [self._segment_of(rank)] if self._segment_of is not None else []
        told += [f"on {host}"] if host is not None else []
        return f"rank {rank} ({', '.join(told)})" if told else f"rank {rank}"

    @property
    def reason(self) -> str:
        """Why it does not wait any longer; empty where it was not told to stop."""
        return self._stop.reason if self._stop is not None and self._stopped_at is not None else ""

    def stopped(self, missing: Sequence[int], reason: str) -> StoppedWaiting:
        """The error of a rank that waits no longer for these, since it or rank 0 was told to stop."""
        return StoppedWaiting(
            f"told to stop ({reason}) before the ranks had met: {self.named(missing)} did not come, for whom rank "
            f"{self._ranks.rank} on {self._ranks.host} has waited. Nothing was trained in this start"
        )


class Wait:
    """One wait; see `Patience.wait`."""

    def __init__(
        self, patience: Patience, within_s: float, missing: Callable[[], Sequence[int]], after_others_s: float
    ) -> None:
        self._patience, self._missing = patience, missing
        self._deadline = time.monotonic() + within_s
        self._stopped_within_s = STOPPED_WITHIN_S + after_others_s

    def is_over(self) -> bool:
        """Whether its time is up."""
        if self._patience.is_told_to_stop(self._missing):
            return self._patience.stopped_since_s() > self._stopped_within_s or time.monotonic() > self._deadline
        return time.monotonic() > self._deadline

    def raise_if_stopped(self) -> None:
        """Raises StoppedWaiting where it is over for a stop signal."""
        if self._patience.is_told_to_stop(self._missing):
            raise self._patience.stopped(self._missing(), self._patience.reason)

    @property
    def left_s(self) -> float:
        """Seconds until its time is up, where no stop signal comes."""
        return self._deadline - time.monotonic()
