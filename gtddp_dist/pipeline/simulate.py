"""Time, idle time, bytes and memory of a schedule under given costs; no processes and no torch.

Replicas are alike, so one of them is simulated: a grid of thousands of ranks costs no more than its pipe.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ..errors import UserError
from .instructions import MESSAGES, RECEIVES, SENDS, Instruction, Op

Orders = Sequence[Sequence[Instruction]]
"""The instructions of every pipeline rank."""


@dataclass(frozen=True, kw_only=True)
class RankCosts:
    """What one pipeline rank's work takes: seconds, and bytes.

    Attributes:
        forward, backward, cotangent: seconds of a micro-batch.
        gram, sweep, feedback, weight: seconds of a recursion unit: a micro-batch, or the whole step.
        statistics, update, rollout: seconds of a step.
        activation_bytes: message to the rank downstream, FORWARD to FORWARD; `feedback_bytes` and `state_bytes` flow
            the same way.
        gradient_bytes: message to the rank upstream; `cotangent_bytes` and `value_bytes` flow the same way.
        parameter_bytes: of the segment's parameters; their gradients take as many, and are reduced over the data axis.
        optimizer_bytes: state of the optimizer.
        statistics_bytes: curvature statistics of a step that are averaged over the data axis.
        kept_bytes: what is kept of a micro-batch from FORWARD to BACKWARD.
        captured_bytes: what is kept of it from BACKWARD to WEIGHT: the layers' inputs and output gradients, or S.

    Raises:
        UserError: a number that is negative or not finite.
    """

    forward: float = 0.0
    backward: float = 0.0
    cotangent: float = 0.0
    gram: float = 0.0
    sweep: float = 0.0
    feedback: float = 0.0
    weight: float = 0.0
    statistics: float = 0.0
    update: float = 0.0
    rollout: float = 0.0
    activation_bytes: float = 0.0
    gradient_bytes: float = 0.0
    cotangent_bytes: float = 0.0
    value_bytes: float = 0.0
    feedback_bytes: float = 0.0
    state_bytes: float = 0.0
    parameter_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    statistics_bytes: float = 0.0
    kept_bytes: float = 0.0
    captured_bytes: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 <= value < float("inf"):
                raise UserError(f"RankCosts: {item.name}={value!r}, expected a number >= 0")

    def seconds(self, op: Op) -> float:
        """How long an instruction keeps the rank busy, without messages and waiting."""
        name = _SECONDS.get(op)
        return float(getattr(self, name)) if name else 0.0

    def message_bytes(self, send: Op) -> float:
        """Size of the message that a sending instruction hands over."""
        return float(getattr(self, f"{SENDS[send]}_bytes"))


_SECONDS: Mapping[Op, str] = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.COTANGENT: "cotangent",
    Op.GRAM: "gram",
    Op.SWEEP: "sweep",
    Op.FEEDBACK: "feedback",
    Op.WEIGHT: "weight",
    Op.STATISTICS: "statistics",
    Op.UPDATE: "update",
    Op.ROLLOUT: "rollout",
}


@dataclass(frozen=True)
class Link:
    """A connection between two ranks, one for each direction.

    Attributes:
        bandwidth: bytes a second.
        latency: seconds that a message takes besides.
    """

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise UserError(f"Link: bandwidth={self.bandwidth!r}, expected bytes a second > 0")
        if not self.latency >= 0:
            raise UserError(f"Link: latency={self.latency!r}, expected seconds >= 0")

    def seconds(self, size: float) -> float:
        """From handing over a message of so many bytes to its arrival."""
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, ranks: int) -> float:
        """A sum of so many bytes over ranks in a ring: each sends 2 (n - 1) parts of size / n."""
        return 2 * (ranks - 1) * self.seconds(size / ranks) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Event:
    """Something that keeps a rank busy, from `start` to `end`, in seconds from the start of the step."""

    rank: int
    op: Op
    unit: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One simulated step.

    Attributes:
        events: work, reductions and agreements that take time, rank by rank in order.
        seconds: the step's time.
        work: seconds that each rank computes.
        reducing: seconds that each rank is in collectives over the data axis.
        link_bytes: (source, target, kind of message) -> bytes a step.
        peak_bytes: largest memory of each rank: parameters, their gradients, optimizer state, activations, captured
            data.
    """

    events: tuple[Event, ...]
    seconds: float
    work: tuple[float, ...]
    reducing: tuple[float, ...]
    link_bytes: Mapping[tuple[int, int, str], float]
    peak_bytes: tuple[float, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Seconds that each rank waits: for messages, for the others to agree, or for the end of the step."""
        return tuple(self.seconds - work - reducing for work, reducing in zip(self.work, self.reducing, strict=True))

    @property
    def busy(self) -> tuple[float, ...]:
        """Share of the step that each rank computes."""
        return tuple(work / self.seconds if self.seconds else 0.0 for work in self.work)

    @property
    def over_largest_work(self) -> float:
        """The step's time over the largest work of any rank; 1 is perfect."""
        largest = max(self.work)
        return self.seconds / largest if largest else math.nan


def simulate(orders: Orders, costs: Sequence[RankCosts], link: Link, data: int = 1) -> Timeline:
    """Plays a schedule through: sends do not wait, receives do, and AGREE waits for every pipeline rank.

    Messages of one direction between two ranks share its bandwidth, one after another. Sums over the data axis are
    those of a ring of `data` ranks.

    Args:
        orders: of every pipeline rank.
        costs: of every pipeline rank.
        link: between neighbours, and between replicas.
        data: replicas.

    Raises:
        UserError: another number of costs than ranks, or no replica.
        ValueError: ranks wait for each other for ever, or a message has no neighbour to go to.
    """
    if len(costs) != len(orders):
        raise UserError(f"costs of {len(costs)} ranks for a schedule of {len(orders)}: expected as many")
    if data < 1:
        raise UserError(f"simulate: data={data}, expected a number of replicas >= 1")
    return _Simulation(orders, costs, link, data).run()


class _Simulation:
    def __init__(self, orders: Orders, costs: Sequence[RankCosts], link: Link, data: int) -> None:
        self.orders, self.costs, self.link, self.data = orders, costs, link, data
        ranks = len(orders)
        self.now = [0.0] * ranks
        self.work = [0.0] * ranks
        self.reducing = [0.0] * ranks
        self.events: list[list[Event]] = [[] for _ in orders]
        self.arrivals: dict[tuple[int, int, str], deque[float]] = {}
        self.link_free: dict[tuple[int, int], float] = {}
        self.link_bytes: Counter[tuple[int, int, str]] = Counter()
        # An agreement goes up and down a tree of all ranks.
        self.agreement = 2 * math.ceil(math.log2(ranks * data)) * link.latency

    def run(self) -> Timeline:
        ranks = range(len(self.orders))
        at = [0] * len(ranks)
        moving = True
        while moving:
            moving = False
            for rank in ranks:
                order = self.orders[rank]
                while at[rank] < len(order) and self._do(rank, order[at[rank]]):
                    at[rank] += 1
                    moving = True
            if all(at[r] < len(self.orders[r]) and self.orders[r][at[r]].op is Op.AGREE for r in ranks):
                end = max(self.now) + self.agreement
                for rank in ranks:
                    step = self.orders[rank][at[rank]]
                    if self.agreement:
                        self.events[rank].append(Event(rank, step.op, step.unit, end - self.agreement, end))
                    self.now[rank] = end
                    at[rank] += 1
                moving = True
        stuck = [f"rank {r} at '{self.orders[r][at[r]]}'" for r in ranks if at[r] < len(self.orders[r])]
        if stuck:
            raise ValueError("the schedule does not complete: " + ", ".join(stuck))
        return Timeline(
            events=tuple(event for events in self.events for event in events),
            seconds=max(self.now),
            work=tuple(self.work),
            reducing=tuple(self.reducing),
            link_bytes=dict(self.link_bytes),
            peak_bytes=tuple(_peak_bytes(order, cost) for order, cost in zip(self.orders, self.costs, strict=True)),
        )

    def _do(self, rank: int, step: Instruction) -> bool:
        """One instruction of a rank; False where it has to wait for another rank first."""
        if step.op in SENDS:
            self._send(rank, step.op)
        elif step.op in RECEIVES:
            kind = RECEIVES[step.op]
            source = rank - 1 if MESSAGES[kind].downstream else rank + 1
            waiting = self.arrivals.get((source, rank, kind))
            if not waiting:
                return False
            self.now[rank] = max(self.now[rank], waiting.popleft())
        elif step.op is Op.AGREE:
            return False
        else:
            cost = self.costs[rank]
            work, reducing = cost.seconds(step.op), 0.0
            if step.op in (Op.REDUCE, Op.ROLLOUT):
                reducing = self.link.all_reduce(cost.parameter_bytes, self.data)
            elif step.op is Op.STATISTICS and cost.statistics_bytes:
                reducing = self.link.all_reduce(cost.statistics_bytes, self.data)
            start = self.now[rank]
            self.now[rank] = start + work + reducing
            self.work[rank] += work
            self.reducing[rank] += reducing
            if self.now[rank] > start:
                self.events[rank].append(Event(rank, step.op, step.unit, start, self.now[rank]))
        return True

    def _send(self, rank: int, op: Op) -> None:
        kind = SENDS[op]
        target = rank + 1 if MESSAGES[kind].downstream else rank - 1
        if not 0 <= target < len(self.orders):
            raise ValueError(f"rank {rank} has no neighbour to {op.value} to")
        size = self.costs[rank].message_bytes(op)
        start = max(self.now[rank], self.link_free.get((rank, target), 0.0))
        sent = start + size / self.link.bandwidth
        self.link_free[rank, target] = sent
        self.link_bytes[rank, target, kind] += size  # type: ignore[assignment]
        self.arrivals.setdefault((rank, target, kind), deque()).append(sent + self.link.latency)


def _peak_bytes(order: Sequence[Instruction], cost: RankCosts) -> float:
    """The most memory that a rank holds at any time of its step."""
    counts = Counter(step.op for step in order)
    # What uses captured data last, for one micro-batch or for all of them.
    release = next((op for op in (Op.WEIGHT, Op.ROLLOUT, Op.STATISTICS) if counts[op]), None)
    by_micro_batch = release is Op.WEIGHT and counts[Op.WEIGHT] == counts[Op.FORWARD]
    # Statistics are made of all micro-batches: none is let go before them.
    waits = bool(by_micro_batch and counts[Op.STATISTICS] and cost.statistics_bytes)
    kept = captured = most = 0.0
    formed = 0
    for step in order:
        if step.op is Op.FORWARD:
            kept += cost.kept_bytes
        elif step.op is Op.BACKWARD:
            most = max(most, kept + captured)
            kept -= cost.kept_bytes
            captured += cost.captured_bytes
        elif step.op is release:
            formed += 1
            captured = captured - cost.captured_bytes * (not waits) if by_micro_batch else 0.0
        elif step.op is Op.STATISTICS and waits:
            captured -= formed * cost.captured_bytes
            waits = False
        most = max(most, kept + captured)
    return 2 * cost.parameter_bytes + cost.optimizer_bytes + most
