"""The phases of a step, named where they are: what `gtddp bench` charges time and operations to.

Without a recorder a phase costs one look at a variable.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, Literal, ParamSpec, TypeVar

from .trajectory import Player

Phase = Literal[
    "forward",
    "backward",
    "input-gradient",
    "weight-gradient",
    "gram",
    "sweep",
    "rollout",
    "recompute",
    "curvature",
    "update",
    "other",
]
"""backward: input- and weight-gradients in one pass of autograd, where they cannot be told apart. rollout: the second
forward pass of the nonlinear rollout. recompute: layers' inputs made anew in the step."""
P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


class Recorder:
    """Charges what goes by to the innermost phase that is open, and to the player that is at work there.

    Args:
        read: a reading of everything that is charged, such as seconds and operations; differences count.
    """

    def __init__(self, read: Callable[[], tuple[float, ...]]) -> None:
        self._read = read
        self._open: list[tuple[Phase, int | None]] = []
        self._last = read()
        self.charged: dict[tuple[Phase, int | None], tuple[float, ...]] = {}
        """Phase, index of the player (None: nobody's) -> the sum of the differences."""

    def enter(self, phase: Phase, player: int | None = None) -> None:
        """Open a phase inside the one that is open."""
        self._charge()
        self._open.append((phase, player))

    def leave(self) -> None:
        """Close it."""
        self._charge()
        self._open.pop()

    def switch(self, player: int | None) -> None:
        """Within the open phase, another player is at work from now on."""
        self._charge()
        self._open[-1] = (self._open[-1][0], player)

    def _charge(self) -> None:
        now = self._read()
        if self._open:
            known = self.charged.get(self._open[-1], (0.0,) * len(now))
            self.charged[self._open[-1]] = tuple(
                total + new - old for total, new, old in zip(known, now, self._last, strict=True)
            )
        self._last = self._read()  # what charging itself took is nobody's


_recorder: Recorder | None = None


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Phases are charged to this recorder, in all threads, until the end of the block."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield recorder
    finally:
        _recorder = before


@contextlib.contextmanager
def phase(name: Phase, player: Player | None = None) -> Iterator[None]:
    """What happens inside belongs to the phase."""
    recorder = _recorder
    if recorder is None:
        yield
        return
    recorder.enter(name, None if player is None else player.index)
    try:
        yield
    finally:
        recorder.leave()


def in_phase(name: Phase) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """A method that belongs to a phase; the player at work may be among its arguments."""

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
            if _recorder is None:
                return method(self, *args, **kwargs)
            with phase(name, next((value for value in args if isinstance(value, Player)), None)):
                return method(self, *args, **kwargs)

        return run

    return decorate
