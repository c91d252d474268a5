"""Messages between neighbouring segments: sends do not wait, and one receive of each kind is posted in advance.

A message is a run of tensors whose shapes both ends know: of live values from a header that goes before the first of
them, of everything else from these and from the recursion groups. Each kind has its own channel (a tag with gloo, a
process group with NCCL, which has no tags), so that the order of one kind never depends on another's.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..trajectory import LiveValue
from .grid import Grid

KINDS = ("activation", "gradient", "cotangent", "value", "feedback", "state", "evaluation")
Form = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor to be received."""


@dataclass
class Traffic:
    """What went through a rank's channels: bytes sent, and seconds spent waiting for messages."""

    bytes_sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    waited: float = 0.0


class Channels:
    """All kinds of messages to and from the two neighbours of a segment."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.traffic = Traffic()
        by_tag = dist.get_backend() == "gloo"
        everyone = list(range(grid.shape.world))
        self._groups = {kind: dist.group.WORLD if by_tag else dist.new_group(everyone) for kind in KINDS}
        self._tags = {kind: index if by_tag else 0 for index, kind in enumerate(KINDS)}
        self._sending: dict[tuple[str, int], deque[list[tuple[dist.Work, Tensor]]]] = {}
        self._posted: dict[tuple[str, int], deque[list[tuple[dist.Work, Tensor]]]] = {}

    def send(self, kind: str, segment: int, tensors: Sequence[Tensor]) -> None:
        """Start to send; the tensors must not be changed, and are kept, until :meth:`delivered` or :meth:`flush`."""
        self._sending.setdefault((kind, segment), deque()).append(self._start(kind, segment, tensors))

    def _start(self, kind: str, segment: int, tensors: Sequence[Tensor]) -> list[tuple[dist.Work, Tensor]]:
        peer = self._grid.shape.rank(segment, self._grid.replica)
        started = []
        for tensor in tensors:
            content = tensor.detach().contiguous()
            self.traffic.bytes_sent[kind] += content.nbytes
            work = dist.isend(content, peer, group=self._groups[kind], tag=self._tags[kind])
            started.append((cast(dist.Work, work), content))
        return started

    def delivered(self, kind: str, segment: int) -> None:
        """Let go of the oldest message of this kind that is kept, if any: it is known to have arrived."""
        if waiting := self._sending.get((kind, segment)):
            for work, _ in waiting.popleft():
                work.wait()

    def post(self, kind: str, segment: int, forms: Sequence[Form]) -> None:
        """Make room for one message, so that it can arrive while this rank works."""
        peer = self._grid.shape.rank(segment, self._grid.replica)
        posted = []
        for dtype, shape in forms:
            tensor = torch.empty(shape, dtype=dtype, device=self._grid.device)
            work = dist.irecv(tensor, peer, group=self._groups[kind], tag=self._tags[kind])
            posted.append((cast(dist.Work, work), tensor))
        self._posted.setdefault((kind, segment), deque()).append(posted)

    def is_posted(self, kind: str, segment: int) -> bool:
        """Whether room for the next message of this kind is there."""
        return bool(self._posted.get((kind, segment)))

    def receive(self, kind: str, segment: int) -> list[Tensor]:
        """Wait for the message that was posted first."""
        started = time.perf_counter()
        received = []
        for work, tensor in self._posted[kind, segment].popleft():
            work.wait()
            received.append(tensor)
        self.traffic.waited += time.perf_counter() - started
        return received

    def flush(self) -> None:
        """Wait until everything that was sent has gone."""
        started = time.perf_counter()
        for message in (message for waiting in self._sending.values() for message in waiting):
            for work, _ in message:
                work.wait()
        self._sending.clear()
        self.traffic.waited += time.perf_counter() - started

    # Live values: tensors, and sizes or other plain values

    def send_layout(self, kind: str, segment: int, layout: Layout) -> None:
        """Send what messages of live values will look like."""
        data = torch.frombuffer(bytearray(layout.to_json().encode()), dtype=torch.uint8).to(self._grid.device)
        size = torch.tensor([len(data)], device=self._grid.device)
        self._sending.setdefault(("layout", segment), deque()).append(self._start(kind, segment, [size, data]))

    def receive_layout(self, kind: str, segment: int) -> Layout:
        """Wait for the other end's :meth:`send_layout`."""
        self.post(kind, segment, [(torch.int64, (1,))])
        (size,) = self.receive(kind, segment)
        self.post(kind, segment, [(torch.uint8, (int(size),))])
        (data,) = self.receive(kind, segment)
        return Layout.from_json(bytes(data.tolist()).decode())


@dataclass(frozen=True)
class Layout:
    """What lives at a cut, without the tensors' content.

    Attributes:
        entries: for each live value either type, shape and whether it carries a gradient, or the plain value.
    """

    entries: tuple[tuple[Form, bool] | PlainValue, ...]

    @classmethod
    def of(cls, live: Sequence[LiveValue]) -> Layout:
        return cls(
            tuple(
                ((v.dtype, tuple(v.shape)), v.requires_grad) if isinstance(v, Tensor) else PlainValue.of(v)
                for v in live
            )
        )

    @property
    def forms(self) -> list[Form]:
        """Of the tensors."""
        return [entry[0] for entry in self.entries if isinstance(entry, tuple)]

    @property
    def gradient_forms(self) -> list[Form]:
        """Of those that carry a gradient."""
        return [entry[0] for entry in self.entries if isinstance(entry, tuple) and entry[1]]

    @property
    def gradient_positions(self) -> list[int]:
        """Their places among the live values."""
        return [i for i, entry in enumerate(self.entries) if isinstance(entry, tuple) and entry[1]]

    def filled(self, tensors: Sequence[Tensor], *, leaves: bool) -> tuple[LiveValue, ...]:
        """Live values of received tensors; with ``leaves`` those that carry a gradient ask for it."""
        rest = iter(tensors)
        live: list[LiveValue] = []
        for entry in self.entries:
            if isinstance(entry, PlainValue):
                live.append(entry.value())
            else:
                live.append(next(rest).requires_grad_(leaves and entry[1]))
        return tuple(live)

    def to_json(self) -> str:
        return json.dumps(
            [
                {"plain": entry.kind, "numbers": list(entry.numbers)}
                if isinstance(entry, PlainValue)
                else {"dtype": str(entry[0][0]).removeprefix("torch."), "shape": list(entry[0][1]), "grad": entry[1]}
                for entry in self.entries
            ]
        )

    @classmethod
    def from_json(cls, text: str) -> Layout:
        entries: list[tuple[Form, bool] | PlainValue] = []
        for item in json.loads(text):
            if "plain" in item:
                entries.append(PlainValue(item["plain"], tuple(item["numbers"])))
            else:
                entries.append(((getattr(torch, item["dtype"]), tuple(item["shape"])), item["grad"]))
        return cls(tuple(entries))


@dataclass(frozen=True)
class PlainValue:
    """A live value that is no tensor: a number, a size, or nothing."""

    kind: str
    numbers: tuple[int | float, ...]

    @classmethod
    def of(cls, value: LiveValue) -> PlainValue:
        if value is None:
            return cls("none", ())
        if isinstance(value, bool | int | float):
            return cls(type(value).__name__, (value,))
        if isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value):
            return cls("size" if isinstance(value, torch.Size) else type(value).__name__, tuple(value))
        raise TypeError(f"a live value of type {type(value).__name__} cannot go to another rank")

    def value(self) -> LiveValue:
        match self.kind:
            case "none":
                return None
            case "bool":
                return bool(self.numbers[0])
            case "int" | "float":
                return self.numbers[0]
            case "size":
                return torch.Size(cast(tuple[int, ...], self.numbers))
            case "list":
                return list(self.numbers)
        return self.numbers
