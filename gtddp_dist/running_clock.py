"""Time that a process was running for, which is what may be held against it."""

from __future__ import annotations

import time


class RunningClock:
    """Seconds that this process has been running for: while it is stopped, or all Python is held up, none pass."""

    def __init__(self, longest_tick_s: float) -> None:
        self._longest_tick_s = longest_tick_s
        self._seconds = 0.0
        self._former = time.monotonic()

    def tick(self) -> None:
        """Goes on by the time since the last call."""
        now = time.monotonic()
        self._seconds += min(now - self._former, self._longest_tick_s)
        self._former = now

    @property
    def now(self) -> float:
        return self._seconds
