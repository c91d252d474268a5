"""What a step asks of the other ranks; one process alone answers itself.

Two axes, never confused: *replicas* hold the same segment of the network and other samples; *segments* hold other
parts of the network for the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """Exchange with the other replicas of a segment, and with the other segments of a replica.

    Every method is called by all ranks concerned, in the same order, with tensors of the same shapes.
    """

    @property
    def replica(self) -> int:
        """Which replica this is, 0 first."""
        ...

    @property
    def replicas(self) -> int:
        """How many there are."""
        ...

    def sum_over_replicas(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their sums; the same bits in every replica."""
        ...

    def sum_over_segments(self, tensor: Tensor) -> Tensor:
        """Its sum; the same bits in every segment."""
        ...

    def from_replica(self, source: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of one replica; those of the others only give the shapes."""
        ...


class Alone:
    """One process that holds the whole network and all samples."""

    replica = 0
    replicas = 1

    def sum_over_replicas(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def sum_over_segments(self, tensor: Tensor) -> Tensor:
        return tensor

    def from_replica(self, source: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)


ALONE = Alone()
