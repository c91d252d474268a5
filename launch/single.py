"""The work of one process: the one that is already here, alone or as a rank."""

from __future__ import annotations

from collections.abc import Callable

from .stop import StopRequest


class Single:
    """Runs the work in this process, with the handlers of the stop signals installed meanwhile."""

    def launch(self, work: Callable[[StopRequest], int]) -> int:
        """Runs `work` and returns its exit code."""
        with StopRequest() as stop:
            return work(stop)
