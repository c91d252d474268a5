"""The ranks of a run, as the training loop sees them: who writes files, and what all agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Team(Protocol):
    """All ranks of a run. Every method is called by all of them, in the same order."""

    @property
    def rank(self) -> int:
        """Which one this is; rank 0 writes what is not a shard, and speaks to the user."""
        ...

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    @property
    def writes_state(self) -> bool:
        """Whether checkpoints hold this rank's tensors: those of a segment are written by one of its replicas."""
        ...

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank. Waits for all of them, also without a flag."""
        ...

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers of every rank, in the order of ranks."""
        ...

    def gather_text(self, text: str) -> list[str]:
        """A text of every rank, in the order of ranks."""
        ...


class Solo:
    """A run of one process."""

    rank = 0
    world = 1
    writes_state = True

    def any(self, *flags: bool) -> list[bool]:
        return list(flags)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers)]

    def gather_text(self, text: str) -> list[str]:
        return [text]


SOLO = Solo()
