"""How a run is asked to stop.

SIGTERM (a cluster or a container ends the job), SIGUSR2 (`sbatch --signal=USR2@120`, sent before the time
limit) and SIGINT (Ctrl-C) all mean: finish the step, write a checkpoint, end. The handler only sets a flag.
Whoever trains looks at the flag at a step boundary, because a checkpoint written in the middle of a step
would be a torn one, and because ranks have to agree before they stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@contextmanager
def stop_signals_held(signals: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Signals that come while the block runs wait for its end, or for `release_stop_signals`.

    For the time before there is a handler: Python would end, or raise KeyboardInterrupt. Processes started meanwhile
    have them blocked until they release them.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def release_stop_signals() -> None:
    """Lets stop signals come to this thread, those that were held included."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class StopRequest:
    """A flag that the stop signals set while the `with` block runs; the former handlers come back afterwards.

    A second SIGINT raises `KeyboardInterrupt` at once, for somebody who does not want to wait for the step.

    Python delivers signals to the main thread only, and lets only that thread install handlers. Used in
    another thread, no handler is installed and the flag is set by `request` alone.
    """

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []
        """Stop signals that came, in order."""
        self._asked = False
        # The values are what signal.getsignal returns: a callable, one of its constants, or None.
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            # None stands for a handler that was not installed from Python; it cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.signals[-1:] == [signal.SIGINT] and number == signal.SIGINT
        self.signals.append(signal.Signals(number))
        self._asked = True
        if again:
            raise KeyboardInterrupt

    def request(self) -> None:
        """Sets the flag from code."""
        self._asked = True

    @property
    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self._asked

    @property
    def reason(self) -> str:
        """Who asked, for messages: the name of the signal, or "a request"."""
        return self.signals[-1].name if self.signals else "a request"
