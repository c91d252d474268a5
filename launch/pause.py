"""Waiting by asking again and again."""

from __future__ import annotations

import time


class Pause:
    """Sleeps for `first_s` seconds, then half as long again each time, up to `longest_s`.

    Short waits stay short, long ones cost little.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._seconds = first_s
        self._longest_s = longest_s

    def __call__(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(self._seconds * 1.5, self._longest_s)
