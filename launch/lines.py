"""Output of several processes passed on line by line."""

from __future__ import annotations

import os
import selectors
import time
from dataclasses import dataclass, field
from typing import IO

LONGEST_LINE = 1 << 16
"""A line of more bytes is passed on in pieces: whatever never ends its line would else fill the memory."""

DRAIN_WITHIN_S = 1.0


@dataclass
class _Source:
    pipe: IO[bytes]
    target: int
    prefix: bytes
    rest: bytearray = field(default_factory=bytearray)
    """What has come since the last end of a line."""


class LineMerger:
    """Passes on what comes from pipes to descriptors of this process: whole lines, each with a prefix, one at a time.

    What comes after a process's last end of a line gets one. A descriptor nobody reads any more is written no further.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._closed: set[int] = set()

    def add(self, pipe: IO[bytes], target: int, prefix: bytes) -> None:
        """Passes on what comes from `pipe` to the descriptor `target` (1 or 2)."""
        os.set_blocking(pipe.fileno(), False)
        self._selector.register(pipe, selectors.EVENT_READ, _Source(pipe, target, prefix))

    def pass_on(self, within_s: float) -> None:
        """Passes on what has come; waits up to `within_s` seconds for something to come."""
        if not self._selector.get_map():
            time.sleep(within_s)
            return
        for key, _ in self._selector.select(within_s):
            self._read(key.data)

    def finish(self) -> None:
        """Passes on what is left in the pipes of processes that have ended."""
        deadline = time.monotonic() + DRAIN_WITHIN_S  # a process of a process may hold its pipe open
        while self._selector.get_map() and time.monotonic() < deadline:
            self.pass_on(0.05)
        self.close()

    def close(self) -> None:
        """Closes all pipes, after the beginnings of lines that have come from them."""
        for key in list(self._selector.get_map().values()):
            self._end(key.data)

    def write(self, target: int, line: bytes) -> None:
        """Writes a whole line to a descriptor."""
        if target in self._closed:
            return
        try:
            while line:
                line = line[os.write(target, line) :]
        except BrokenPipeError:
            self._closed.add(target)

    def _read(self, source: _Source) -> None:
        try:
            came = os.read(source.pipe.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return
        if not came:
            self._end(source)
            return
        source.rest += came
        *lines, rest = source.rest.split(b"\n")
        if len(rest) > LONGEST_LINE:
            lines.append(rest)
            rest = bytearray()
        source.rest = rest
        if lines:
            self.write(source.target, b"".join(source.prefix + line + b"\n" for line in lines))

    def _end(self, source: _Source) -> None:
        self._selector.unregister(source.pipe)
        if source.rest:
            self.write(source.target, source.prefix + bytes(source.rest) + b"\n")
        source.pipe.close()
