"""How the processes of a run are started, and how a run is asked to stop.

A launcher is one file here with one class that has the method of `Launcher`, and one line in `LAUNCHERS`.
The package imports no torch, so that starting ranks stays cheap.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

from .stop import StopRequest

__all__ = ["LAUNCHERS", "Launcher", "StopRequest", "launcher"]

Work = Callable[[StopRequest], int]
"""What one process of a run does: given the flag that asks it to stop, it returns its exit code."""


class Launcher(Protocol):
    """Starts the process or processes of a run."""

    def launch(self, work: Work) -> int:
        """Runs `work` in every process of the run and returns the exit code of the run."""
        ...


LAUNCHERS = {"single": "gtddp_dist.launch.single:Single"}


def launcher(name: str) -> Launcher:
    """The launcher registered under `name`.

    Raises `ValueError` for a name that is not registered.
    """
    if name not in LAUNCHERS:
        raise ValueError(f"no launcher is called {name!r}; there are: {', '.join(sorted(LAUNCHERS))}")
    module, _, attribute = LAUNCHERS[name].partition(":")
    found: Launcher = getattr(importlib.import_module(module), attribute)()
    return found
