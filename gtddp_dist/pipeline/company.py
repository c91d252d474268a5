"""The ranks of a run, together: met, agreed on what they do, watched over, and let go in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist

from ..environment import select_device
from ..errors import UserError
from ..launch import Ranks, Rendezvous, StopRequest, mpi
from ..liveness import Heartbeats
from .grid import Backend, Grid, Shape, end_distributed, start_distributed


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        ranks: who started it, and where the others are met.
        shape: the grid.
        cuts: first stage of every segment but the first.
        stages: how many stages there are.
        device: None: the GPU with the local rank's number, where there is one, else the CPU.
        backend: None: nccl on GPUs, else gloo.
    """

    ranks: Ranks
    shape: Shape
    cuts: tuple[int, ...]
    stages: int
    device: torch.device | None
    backend: Backend | None

    def __str__(self) -> str:
        segment, replica = self.shape.place(self.ranks.rank)
        bounds = [0, *self.cuts, self.stages]
        first, last = bounds[segment], bounds[segment + 1] - 1
        which = f"stage {first}" if first == last else f"stages {first} to {last}"
        return (
            f"segment {segment + 1} of {self.shape.pipe}: {which}, replica {replica + 1} of {self.shape.data}, "
            f"host {self.ranks.host}"
        )

    def chosen_device(self) -> torch.device:
        device = self.device or select_device("auto")
        if device.type == "cuda":
            select_device("cuda")  # whether it can be used
        if str(device) == "cuda":  # any of them
            count = torch.cuda.device_count()
            if self.ranks.local_world > count:
                raise UserError(
                    f"{self.ranks.local_world} ranks on {self.ranks.host}, which shows {count} GPU"
                    f"{'' if count == 1 else 's'}: start one rank for each GPU, or train on the CPU (train.device=cpu)"
                )
            device = torch.device("cuda", self.ranks.local_rank)
        return device


class Company:
    """A context manager; inside are the grid, and heartbeats that end every rank when one is lost."""

    def __init__(
        self,
        place: Place,
        facts: Mapping[str, str],
        problem: str,
        advice: str,
        lost_after_s: float,
        stop: StopRequest | None,
    ) -> None:
        self._place, self._facts, self._problem, self._stop = place, facts, problem, stop
        self._advice, self._lost_after_s = advice, lost_after_s
        self._stack = ExitStack()
        self._heartbeats: Heartbeats | None = None

    def __enter__(self) -> Grid:
        place = self._place
        device = torch.device("cpu")
        try:
            device = place.chosen_device()
            if device.type == "cuda":
                torch.cuda.set_device(device)
        except UserError as error:
            self._problem = self._problem or str(error)
        backend: Backend = place.backend or ("nccl" if device.type == "cuda" else "gloo")
        with ExitStack() as stack:
            rendezvous = Rendezvous(place.ranks, stop=self._stop, segment_of=place.shape.segment_of)
            rendezvous.prepared(self._problem)
            rendezvous.agree(self._facts)
            if place.ranks.world > 1:
                self._heartbeats = stack.enter_context(
                    Heartbeats(
                        dist.PrefixStore("alive", rendezvous.store),
                        place.ranks.rank,
                        place.ranks.world,
                        str(place),
                        advice=self._advice,
                        lost_after_s=self._lost_after_s,
                        store_holder=rendezvous.store_holder,
                        address=place.ranks.first_address,
                    )
                )
            store = rendezvous.store if place.ranks.world > 1 else dist.HashStore()
            start_distributed(place.ranks, backend, store)
            stack.push(_end)
            by_mpi = place.ranks.started_by == "mpirun" and place.ranks.world > 1
            grid = Grid(place.shape, device, mpi.gather_numbers if by_mpi else None)
            self._stack = stack.pop_all()
        return grid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def prepare_for_loss(self, advice: str, note: Callable[[str], None]) -> None:
        """Once a rank is lost, from now on: `advice` says what to do, and `note` is called with who it was."""
        if self._heartbeats is not None:
            self._heartbeats.prepare_for_loss(advice, note)

    @property
    def who(self) -> str:
        """This rank, for messages."""
        return f"rank {self._place.ranks.rank} ({self._place})"

    def give_up(self, reason: str) -> None:
        """See `Heartbeats.give_up`."""
        if self._heartbeats is not None:
            self._heartbeats.give_up(reason)

    def once_stalled(self, write: Callable[[], object] | None) -> None:
        """See `Heartbeats.once_stalled`."""
        if self._heartbeats is not None:
            self._heartbeats.once_stalled(write)

    def close(self) -> None:
        """Leave the others, when all is well."""
        self.__exit__(None, None, None)


def company(
    place: Place,
    facts: Mapping[str, str],
    *,
    problem: str = "",
    advice: str = "this run cannot go on",
    lost_after_s: float,
    stop: StopRequest | None = None,
) -> Company:
    """The other ranks, once all are there and agree.

    Args:
        place: where this one is.
        facts: what all must have the same: versions, configuration, cuts.
        problem: what kept this rank from preparing the run; rank 0 raises it, the others ToldElsewhere.
        advice: what to do once a rank is lost.
        lost_after_s: seconds without a sign of life after which one is.
        stop: what asks this rank to stop; it then does not wait for the others for long. None: nothing does.
    """
    return Company(place, facts, problem, advice, lost_after_s, stop)


def _end(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    if kind is None:  # else the others may not come to the barrier; the process ends anyway
        end_distributed()
