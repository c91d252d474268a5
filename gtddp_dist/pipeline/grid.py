"""The grid of ranks: who is where, sums along one axis, and what all ranks agree on.

Process groups are named by what they are for and never looked up by size: on a 2 x 2 grid both axes have groups of two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from ..launch import Ranks

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class Shape:
    """A grid: `pipe` segments times `data` replicas. Rank p * data + d owns segment p of replica d."""

    pipe: int
    data: int

    @property
    def world(self) -> int:
        return self.pipe * self.data

    def place(self, rank: int) -> tuple[int, int]:
        """Segment and replica of a rank."""
        return divmod(rank, self.data)

    def segment_of(self, rank: int) -> str:
        """The segment of a rank, for people."""
        return f"segment {self.place(rank)[0] + 1} of {self.pipe}"

    def rank(self, segment: int, replica: int) -> int:
        return segment * self.data + replica

    def __str__(self) -> str:
        return f"pipe={self.pipe},data={self.data}"


Gather: TypeAlias = Callable[[Sequence[float]], list[list[float]]]
"""From as many numbers on every rank to those of all, in the order of ranks."""


class Grid:
    """This rank's place among the others, and the groups it talks in.

    Args:
        shape: the grid.
        device: where tensors of the data plane are.

    torch.distributed has to be initialised (:func:`start_distributed`). All ranks construct it at the same time.
    """

    def __init__(self, shape: Shape, device: torch.device, gather: Gather | None = None) -> None:
        if dist.get_world_size() != shape.world:
            raise UserError(f"the grid {shape} needs {shape.world} ranks, there are {dist.get_world_size()}")
        self.shape = shape
        self.device = device
        self.rank = dist.get_rank()
        self.world = shape.world
        self.segment, self.replica = shape.place(self.rank)
        self._gather = gather or self._gather_by_gloo
        self.bytes_reduced = 0
        """Bytes this rank put into sums and broadcasts over replicas."""
        self.waited = 0.0
        """Seconds in exchanges with other ranks; they wait for the slowest."""
        ranks = range(shape.world)
        self._control = (
            dist.new_group(list(ranks), backend="gloo") if dist.get_backend() != "gloo" else dist.group.WORLD
        )
        self._replicas = _mine([[shape.rank(p, d) for d in range(shape.data)] for p in range(shape.pipe)], self.rank)
        self._segments = _mine([[shape.rank(p, d) for p in range(shape.pipe)] for d in range(shape.data)], self.rank)

    @property
    def writes_state(self) -> bool:
        """Whether checkpoints hold this rank's tensors: of a segment's replicas the first writes."""
        return self.replica == 0

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The other replicas of this segment, for a module that sums over them by itself."""
        return self._replicas

    # As gtddp_dist.collectives.Collectives

    @property
    def replicas(self) -> int:
        return self.shape.data

    def sum_over_replicas(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.shape.data == 1 or not tensors:
            return list(tensors)
        return _by_type(tensors, self._summed)

    def _summed(self, flat: Tensor) -> None:
        self.bytes_reduced += flat.nbytes
        with self._waiting():
            dist.all_reduce(flat, group=self._replicas)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def sum_over_segments(self, tensor: Tensor) -> Tensor:
        if self.shape.pipe == 1:
            return tensor
        total = tensor.clone()
        with self._waiting():
            dist.all_reduce(total, group=self._segments)
        return total

    def from_replica(self, source: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.shape.data == 1:
            return list(tensors)

        def send(flat: Tensor) -> None:
            self.bytes_reduced += flat.nbytes
            with self._waiting():
                dist.broadcast(flat, self.shape.rank(self.segment, source), group=self._replicas)

        return _by_type(tensors, send)

    # All ranks

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank; the same answer everywhere. Waits for all ranks."""
        found = torch.tensor([0, *map(int, flags)], dtype=torch.int32)  # gloo does nothing where there is no number
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._control)
        return [bool(flag) for flag in found[1:]]

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers of every rank, in the order of ranks; on every rank."""
        with self._waiting():
            return self._gather(numbers)

    def _gather_by_gloo(self, numbers: Sequence[float]) -> list[list[float]]:
        own = torch.tensor(list(numbers), dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.shape.world)]
        dist.all_gather(every, own, group=self._control)
        return [one.tolist() for one in every]

    def gather_text(self, text: str) -> list[str]:
        """A text of every rank, in the order of ranks; on every rank."""
        data = text.encode()
        longest = int(max(sizes[0] for sizes in self.gather([len(data)])))
        own = torch.zeros(longest + 1, dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[:0]
        own[len(data)] = 255  # no byte of UTF-8: the end
        every = [torch.empty_like(own) for _ in range(self.shape.world)]
        dist.all_gather(every, own, group=self._control)
        return [bytes(one.tolist()).partition(b"\xff")[0].decode() for one in every]

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.all_reduce(torch.zeros(1), group=self._control)


def start_distributed(ranks: Ranks, backend: Backend, store: dist.Store, timeout_s: float = 1800.0) -> None:
    """Initialise torch.distributed, and DeepSpeed on it; :func:`end_distributed` undoes it.

    Args:
        ranks: this rank among the others.
        backend: of the data plane.
        store: one that all ranks share.
        timeout_s: after which a collective gives up.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if backend == "nccl" else "cpu")
    ranks.export()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Else it compiles an extension for shared memory, which takes up to a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, store=dist.PrefixStore("torch", store), rank=ranks.rank, world_size=ranks.world, timeout=timeout
    )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def end_distributed() -> None:
    """Without this, processes abort at exit now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _mine(groups: Sequence[Sequence[int]], rank: int) -> dist.ProcessGroup:
    """The group this rank is in; every rank has to make all of them."""
    found = None
    for members in groups:
        group = dist.new_group(list(members))
        if rank in members:
            found = group
    assert isinstance(found, dist.ProcessGroup)
    return found


def _by_type(tensors: Sequence[Tensor], exchange: object) -> list[Tensor]:
    """Exchange tensors in place of one flat one for each dtype."""
    assert callable(exchange)
    results: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [(i, t) for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([t.detach().reshape(-1) for _, t in chosen])
        exchange(flat)
        parts = flat.split([t.numel() for _, t in chosen])
        results.update({i: part.view(t.shape) for (i, t), part in zip(chosen, parts, strict=True)})
    return [results[i] for i in range(len(tensors))]
