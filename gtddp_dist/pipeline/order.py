"""The generator of schedules: what every pipeline rank does in one step, in which order.

Forward and input-gradient of a micro-batch are chained over ranks; Gram matrices and weight-gradients are local, and
fill the gaps. A list scheduler plays the step through under given costs: whenever a rank is free it takes the most
urgent work that can start. The outcome is a fixed order for each rank, which stays correct whatever the work really
takes: it was found by playing it through, and sends do not wait, so that it cannot deadlock.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from .instructions import MESSAGES, Instruction, Op
from .simulate import Link, RankCosts

Order = tuple[Instruction, ...]
Unit = Literal["micro_batch", "step"]

_DEFAULT_COSTS = RankCosts(
    forward=1, backward=1, cotangent=1, gram=1, weight=1, sweep=0.05, feedback=0.05, statistics=0.5
)
_DEFAULT_LINK = Link(bandwidth=1, latency=0.01)


@dataclass(frozen=True)
class StepShape:
    """All that decides the instructions of a step besides their order.

    Attributes:
        pipe: pipeline ranks.
        n_micro: micro-batches of a replica.
        feedback: whether there is a recursion; without it, the step of a base optimizer.
        by: what has a recursion of its own: each "micro_batch", interleaved with the others' backward passes; or the
            whole "step", after all of them.
        cotangents: whether a second stream is back-propagated besides the loss gradient.
        rollout: the forward sweep; "nonlinear" only by step.
        mean_first: whether the sweep needs the mean gradient of the step over all replicas; only by step.

    Raises:
        UserError: names the field and what is expected.
    """

    pipe: int
    n_micro: int
    feedback: bool = True
    by: Unit = "micro_batch"
    cotangents: bool = False
    rollout: Literal["linear", "nonlinear"] = "linear"
    mean_first: bool = False

    def __post_init__(self) -> None:
        for name in ("pipe", "n_micro"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"StepShape: {name}={value!r}, expected a whole number >= 1")
        for name, choices in (("by", ("micro_batch", "step")), ("rollout", ("linear", "nonlinear"))):
            if getattr(self, name) not in choices:
                raise UserError(f"StepShape: {name}={getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if self.by == "micro_batch" and self.rollout == "nonlinear":
            raise UserError("StepShape: the nonlinear rollout has one recursion a step: take by='step'")
        if self.by == "micro_batch" and self.mean_first:
            raise UserError("StepShape: mean_first waits for all backward passes: take by='step'")

    @property
    def units(self) -> int:
        """Recursions of a replica's step."""
        return self.n_micro if self.by == "micro_batch" else 1


def step_shape(
    pipe: int,
    n_micro: int,
    *,
    feedback: bool,
    scope: Literal["batch", "micro_batch"] | int,
    rollout: Literal["linear", "nonlinear"],
    metric_known: bool,
    clipped: bool,
    value_statistics: bool,
    cotangents: bool,
) -> StepShape:
    """The shape of a step that an optimizer's options ask for.

    A recursion runs by micro-batch where nothing that it needs is of the whole step.

    Args:
        pipe: pipeline ranks.
        n_micro: micro-batches of a replica.
        feedback: whether there is a recursion.
        scope: samples of one recursion; a number is at most a micro-batch.
        rollout: the forward sweep.
        metric_known: whether the sweep's metric is known before the step: metric="previous", or constant (SGD).
        clipped: whether the mean gradient's norm is limited.
        value_statistics: whether curvature statistics are made of the value function.
        cotangents: whether a stream besides the loss gradient is back-propagated.
    """
    if not feedback:
        return StepShape(pipe, n_micro, feedback=False, cotangents=cotangents)
    within_micro_batch = scope != "batch" or n_micro == 1
    mean_first = clipped or not metric_known
    by_step = not within_micro_batch or rollout == "nonlinear" or mean_first or value_statistics
    return StepShape(
        pipe,
        n_micro,
        by="step" if by_step else "micro_batch",
        cotangents=cotangents,
        rollout=rollout,
        mean_first=mean_first,
    )


def forward_limit(pipe: int, index: int) -> int:
    """Most micro-batches of a rank between FORWARD and BACKWARD: 1F1B's number."""
    return pipe - index


def capture_limit(pipe: int) -> int:
    """Most micro-batches of a rank between FORWARD and WEIGHT, by micro-batch; it does not grow with their number.

    A micro-batch's captured data waits for the value state to reach the first segment and for feedback to come back.
    Twice the pipe covers that round trip: schedules are as good as without a limit, or within 1 % of it. FORWARD is
    held back where it would be exceeded. (By step, all micro-batches are kept: the recursion follows the last.)
    """
    return 2 * pipe


def rank_orders(
    shape: StepShape,
    costs: Sequence[RankCosts] | None = None,
    link: Link | None = None,
    *,
    in_flight: int = 1,
) -> tuple[Order, ...]:
    """The instructions of every pipeline rank for one step; a function of its arguments alone.

    Sends follow what makes their message; a receive precedes what needs it.

    Args:
        shape: of the step.
        costs: of every pipeline rank, to schedule by; None: forward, backward, Gram matrices and weight-gradients
            take equally long.
        link: between neighbours; None: messages take next to no time.
        in_flight: times 1F1B's number of micro-batches that a rank may have in flight. More hide slow messages, and
            keep as many times the activations.

    Raises:
        UserError: another number of costs than ranks.
    """
    filler: tuple[Op, ...] = ()
    if shape.feedback and shape.by == "micro_batch":
        filler = (Op.GRAM, Op.SWEEP, Op.FEEDBACK, Op.WEIGHT, Op.STATISTICS)
    schedules = _best_schedule(shape.pipe, shape.n_micro, _chained(shape.cotangents) + filler, costs, link, in_flight)
    return tuple(
        tuple(_with_messages(schedule, shape.pipe, index) + _ending(shape, index))
        for index, schedule in enumerate(schedules)
    )


def one_forward_one_backward(
    pipe: int,
    n_micro: int,
    costs: Sequence[RankCosts] | None = None,
    link: Link | None = None,
    *,
    cotangents: bool = False,
) -> tuple[Order, ...]:
    """A base optimizer's step as 1F1B, for comparison; BACKWARD makes input- and weight-gradients together."""
    return rank_orders(StepShape(pipe, n_micro, feedback=False, cotangents=cotangents), costs, link)


def zero_bubble(
    pipe: int,
    n_micro: int,
    costs: Sequence[RankCosts] | None = None,
    link: Link | None = None,
    *,
    cotangents: bool = False,
) -> tuple[Order, ...]:
    """The same with weight-gradients put off into gaps (as ZB-H1, arXiv 2401.10241), for comparison."""
    ops = (*_chained(cotangents), Op.WEIGHT, Op.STATISTICS)
    ending = [Instruction(Op.REDUCE), Instruction(Op.AGREE), Instruction(Op.UPDATE)]
    return tuple(
        tuple(_with_messages(schedule, pipe, index) + ending)
        for index, schedule in enumerate(_best_schedule(pipe, n_micro, ops, costs, link))
    )


# ----------------------------------------------------------------------------------------------------------
# What is of the whole step, and messages


def _chained(cotangents: bool) -> tuple[Op, ...]:
    return (Op.FORWARD, Op.COTANGENT, Op.BACKWARD) if cotangents else (Op.FORWARD, Op.BACKWARD)


def _ending(shape: StepShape, index: int) -> list[Instruction]:
    """What follows the work on micro-batches. Every rank has the same collectives in the same order."""
    if not shape.feedback:
        ops = [Op.REDUCE, Op.STATISTICS, Op.AGREE, Op.UPDATE]
    elif shape.by == "micro_batch":
        ops = [Op.REDUCE, Op.AGREE, Op.UPDATE]
    else:
        ops = [Op.AGREE, *([Op.REDUCE] if shape.mean_first else [])]
        ops += [Op.GRAM, Op.SWEEP, Op.STATISTICS, Op.AGREE]
        if shape.rollout == "linear":
            ops += [Op.FEEDBACK, Op.WEIGHT, Op.REDUCE, Op.UPDATE]
        else:
            ops += [Op.ROLLOUT]
    seen: dict[Op, int] = {}
    steps = []
    for op in ops:
        steps.append(Instruction(op, seen.get(op, 0)))
        seen[op] = seen.get(op, 0) + 1
    return _with_messages(steps, shape.pipe, index)


_MESSAGE_OF = {
    Op.FORWARD: "activation",
    Op.BACKWARD: "gradient",
    Op.COTANGENT: "cotangent",
    Op.SWEEP: "value",
    Op.FEEDBACK: "feedback",
    Op.ROLLOUT: "state",
}


def _with_messages(work: Iterable[Instruction], pipe: int, index: int) -> list[Instruction]:
    """Receives before what needs them, sends after what makes them, and loading before FORWARD."""
    order = []
    for step in work:
        kind = _MESSAGE_OF.get(step.op)
        if step.op is Op.FORWARD and index in (0, pipe - 1):
            order.append(Instruction(Op.LOAD, step.unit))
        if kind is None:
            order.append(step)
            continue
        message = MESSAGES[kind]
        source, target = (index - 1, index + 1) if message.downstream else (index + 1, index - 1)
        if 0 <= source < pipe:
            order.append(Instruction(message.receive, step.unit))
        order.append(step)
        if 0 <= target < pipe:
            order.append(Instruction(message.send, step.unit))
    return order


# ----------------------------------------------------------------------------------------------------------
# The list scheduler

_NEEDED_BY: dict[Op, tuple[tuple[Op, int], ...]] = {
    Op.FORWARD: ((Op.FORWARD, +1), (Op.COTANGENT, 0), (Op.BACKWARD, 0)),
    Op.COTANGENT: ((Op.COTANGENT, -1), (Op.BACKWARD, 0)),
    Op.BACKWARD: ((Op.BACKWARD, -1), (Op.GRAM, 0), (Op.STATISTICS, 0)),
    Op.GRAM: ((Op.SWEEP, 0),),
    Op.SWEEP: ((Op.SWEEP, -1), (Op.FEEDBACK, 0)),
    Op.FEEDBACK: ((Op.FEEDBACK, +1), (Op.WEIGHT, 0)),
}
"""Work -> the work that needs it, and on which rank: 0 the same, +1 downstream, -1 upstream."""

_WITHOUT_RECURSION = {**_NEEDED_BY, Op.BACKWARD: ((Op.BACKWARD, -1), (Op.WEIGHT, 0), (Op.STATISTICS, 0))}

# Most urgent first. What is chained over ranks comes before what is local, or a neighbour waits. FEEDBACK and SWEEP
# take next to no time, and a chain of ranks waits for them; on the first segment FEEDBACK so follows its SWEEP at once.
_URGENCY = (
    Op.FEEDBACK,
    Op.SWEEP,
    Op.BACKWARD,
    Op.COTANGENT,
    Op.FORWARD,
    Op.GRAM,
    Op.WEIGHT,
    Op.STATISTICS,
)
_CHAINED = (Op.FEEDBACK, Op.SWEEP, Op.BACKWARD, Op.COTANGENT, Op.FORWARD)


@dataclass(frozen=True)
class _Policy:
    """How the scheduler decides where urgency alone leaves a choice.

    Attributes:
        patience: do not start local work where chained work arrives within this share of its duration.
        statistics_last: STATISTICS after all else, rather than in the first gap.
    """

    patience: float
    statistics_last: bool


_POLICIES = tuple(_Policy(patience, last) for patience in (0.0, 0.25, 0.5) for last in (False, True))


def _best_schedule(
    pipe: int,
    n_micro: int,
    ops: tuple[Op, ...],
    costs: Sequence[RankCosts] | None,
    link: Link | None,
    in_flight: int = 1,
) -> list[list[Instruction]]:
    """The shortest of the schedules that the policies find; the first of equals."""
    if costs is None:
        costs = [_DEFAULT_COSTS] * pipe
    if len(costs) != pipe:
        raise UserError(f"costs of {len(costs)} ranks for pipe={pipe}: expected as many")
    local = any(op not in _CHAINED for op in ops)
    policies = _POLICIES if local else _POLICIES[:1]
    played = [_Play(pipe, n_micro, ops, costs, link or _DEFAULT_LINK, policy, in_flight).run() for policy in policies]
    return min(played, key=lambda outcome: outcome[0])[1]


class _Play:
    """One play of a step: whenever a rank is free, it takes the most urgent work that can start.

    Each kind of work goes through the units in order, so that a link has them in one order at both ends.
    """

    def __init__(
        self,
        pipe: int,
        n_micro: int,
        ops: tuple[Op, ...],
        costs: Sequence[RankCosts],
        link: Link,
        policy: _Policy,
        in_flight: int,
    ) -> None:
        self.pipe, self.policy, self.in_flight = pipe, policy, in_flight
        self.ops = [op for op in _URGENCY if op in ops]
        edges = _NEEDED_BY if Op.FEEDBACK in ops else _WITHOUT_RECURSION
        self.needed_by = {op: [(to, shift) for to, shift in edges.get(op, ()) if to in ops] for op in ops}
        self.units = {op: 1 if op is Op.STATISTICS else n_micro for op in ops}
        self.seconds = [{op: cost.seconds(op) for op in ops} for cost in costs]
        self.travel = [
            {op: link.seconds(cost.message_bytes(MESSAGES[_MESSAGE_OF[op]].send)) for op in ops if op in _MESSAGE_OF}
            for cost in costs
        ]
        self.deferred = Op.WEIGHT in ops
        self.started = [dict.fromkeys(ops, 0) for _ in range(pipe)]
        self.waits_for = [{op: [0] * self.units[op] for op in ops} for _ in range(pipe)]
        self.ready = [{op: [0.0] * self.units[op] for op in ops} for _ in range(pipe)]
        for index in range(pipe):
            for op in ops:
                for to, target in self._needing(op, index):
                    for unit in range(n_micro):
                        self.waits_for[target][to][min(unit, self.units[to] - 1)] += 1

    def run(self) -> tuple[float, list[list[Instruction]]]:
        """The time of the whole step, and the work of every rank in order."""
        orders: list[list[Instruction]] = [[] for _ in range(self.pipe)]
        free = [0.0] * self.pipe
        wakes = [(0.0, index) for index in range(self.pipe)]
        while wakes:
            now, index = heapq.heappop(wakes)
            if now < free[index]:
                continue  # busy; it wakes again at its end
            op = self._choose(index, now)
            if op is None:
                continue  # it wakes again when something arrives
            unit = self.started[index][op]
            self.started[index][op] += 1
            orders[index].append(Instruction(op, unit))
            end = free[index] = now + self.seconds[index][op]
            heapq.heappush(wakes, (end, index))
            for to, target in self._needing(op, index):
                arrival = end + (self.travel[index][op] if target != index else 0.0)
                at = min(unit, self.units[to] - 1)
                self.waits_for[target][to][at] -= 1
                self.ready[target][to][at] = max(self.ready[target][to][at], arrival)
                if target != index:
                    heapq.heappush(wakes, (arrival, target))
        return max(free), orders

    def _needing(self, op: Op, index: int) -> list[tuple[Op, int]]:
        return [(to, index + shift) for to, shift in self.needed_by[op] if 0 <= index + shift < self.pipe]

    def _choose(self, index: int, now: float) -> Op | None:
        """The most urgent work that can start now; None where there is none, or more urgent work is about to."""
        soonest = float("inf")
        for op in self.ops:
            arrival = self._arrival(op, index)
            if arrival is None:
                continue
            if arrival > now:
                soonest = min(soonest, arrival) if op in _CHAINED else soonest
                continue
            if op not in _CHAINED and soonest - now <= self.policy.patience * self.seconds[index][op]:
                return None
            return op
        return None

    def _arrival(self, op: Op, index: int) -> float | None:
        """When the next unit of some work can start, as far as its inputs go; None where that is not known yet."""
        started = self.started[index]
        unit = started[op]
        if unit == self.units[op] or self.waits_for[index][op][unit]:
            return None
        if op is Op.FORWARD:
            if unit - started[Op.BACKWARD] >= self.in_flight * forward_limit(self.pipe, index):
                return None
            if self.deferred and unit - started[Op.WEIGHT] >= capture_limit(self.pipe):
                return None
        if op is Op.STATISTICS and self.policy.statistics_last and started[Op.WEIGHT] < self.units[Op.WEIGHT]:
            return None
        return self.ready[index][op][unit]
