"""Schedules, played through without processes: messages match, nothing deadlocks, dependencies and limits hold."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import product

import pytest

from gtddp_dist.errors import UserError
from gtddp_dist.pipeline.instructions import MESSAGES, RECEIVES, SENDS, Instruction, Op
from gtddp_dist.pipeline.order import (
    StepShape,
    capture_limit,
    forward_limit,
    one_forward_one_backward,
    rank_orders,
    step_shape,
    zero_bubble,
)
from gtddp_dist.pipeline.simulate import Link, RankCosts

Orders = Sequence[Sequence[Instruction]]


def shapes(pipes: Sequence[int], micros: Sequence[int]) -> Iterator[StepShape]:
    for pipe, n_micro, cotangents in product(pipes, micros, (False, True)):
        yield StepShape(pipe, n_micro, feedback=False, cotangents=cotangents)
        yield StepShape(pipe, n_micro, cotangents=cotangents)
        for rollout, mean_first in product(("linear", "nonlinear"), (False, True)):
            yield StepShape(
                pipe,
                n_micro,
                by="step",
                cotangents=cotangents,
                rollout=rollout,  # type: ignore[arg-type]
                mean_first=mean_first,
            )


ALL_SHAPES = [pytest.param(pipe, id=f"pipe={pipe}") for pipe in range(1, 9)]
UNEVEN = [
    RankCosts(forward=1 + 0.3 * i, backward=2 - 0.1 * i, gram=0.5 * i, weight=1, sweep=0.2, statistics=i, cotangent=1)
    for i in range(8)
]
SLOW_LINK = Link(bandwidth=1, latency=0.7)


def check_messages(orders: Orders) -> None:
    """Every send has exactly its receive, in the same order on its link."""
    last = len(orders) - 1
    for index, order in enumerate(orders):
        for message in MESSAGES.values():
            target = index + 1 if message.downstream else index - 1
            sent = [step.unit for step in order if step.op is message.send]
            received = []
            if 0 <= target <= last:
                received = [step.unit for step in orders[target] if step.op is message.receive]
            assert sent == received, (index, message)
            source = index - 1 if message.downstream else index + 1
            if not 0 <= source <= last:
                assert not any(step.op is message.receive for step in order), (index, message)


def check_completes(orders: Orders) -> None:
    """With sends that do not wait, receives that do, and AGREE as a barrier, every rank reaches its end."""
    last = len(orders) - 1
    links: dict[tuple[int, int, str], deque[int]] = {}
    at, agreed = [0] * len(orders), [0] * len(orders)
    moving = True
    while moving:
        moving = False
        for index, order in enumerate(orders):
            while at[index] < len(order):
                step = order[at[index]]
                if step.op in SENDS:
                    kind = SENDS[step.op]
                    target = index + 1 if MESSAGES[kind].downstream else index - 1
                    assert 0 <= target <= last
                    links.setdefault((index, target, kind), deque()).append(step.unit)
                elif step.op in RECEIVES:
                    kind = RECEIVES[step.op]
                    source = index - 1 if MESSAGES[kind].downstream else index + 1
                    queue = links.get((source, index, kind))
                    if not queue:
                        break
                    assert queue.popleft() == step.unit
                elif step.op is Op.AGREE:
                    break
                at[index] += 1
                moving = True
        if all(at[i] < len(order) and order[at[i]].op is Op.AGREE for i, order in enumerate(orders)):
            assert len({order[at[i]].unit for i, order in enumerate(orders)}) == 1
            at = [i + 1 for i in at]
            agreed = [n + 1 for n in agreed]
            moving = True
    assert at == [len(order) for order in orders], "deadlock"
    assert not any(links.values()), "a message that nobody takes"


def expected_work(shape: StepShape, index: int) -> Counter[Instruction]:
    micro = range(shape.n_micro)
    work = Counter(Instruction(op, m) for op in (Op.FORWARD, Op.BACKWARD) for m in micro)
    if index in (0, shape.pipe - 1):
        work.update(Instruction(Op.LOAD, m) for m in micro)
    if shape.cotangents:
        work.update(Instruction(Op.COTANGENT, m) for m in micro)
    work.update([Instruction(Op.STATISTICS), Instruction(Op.AGREE)])
    if not shape.feedback:
        work.update([Instruction(Op.REDUCE), Instruction(Op.UPDATE)])
        return work
    recursion = [Op.GRAM, Op.SWEEP]
    recursion += [Op.FEEDBACK, Op.WEIGHT] if shape.rollout == "linear" else [Op.ROLLOUT]
    work.update(Instruction(op, u) for op in recursion for u in range(shape.units))
    if shape.by == "step":
        work.update([Instruction(Op.AGREE, 1)])
    reductions = shape.mean_first + (shape.rollout == "linear")
    work.update(Instruction(Op.REDUCE, i) for i in range(reductions))
    if shape.rollout == "linear":
        work.update([Instruction(Op.UPDATE)])
    return work


def check_rank(shape: StepShape, index: int, order: Sequence[Instruction]) -> None:
    """Nothing missing, nothing twice, and everything after what it needs."""
    assert Counter(s for s in order if s.op not in SENDS and s.op not in RECEIVES) == expected_work(shape, index)
    place = {step: i for i, step in enumerate(order)}
    assert len(place) == len(order)

    def follows(op: Op, unit: int, needs: Op, needed: int, *, directly: bool = False) -> None:
        later, earlier = place.get(Instruction(op, unit)), place.get(Instruction(needs, needed))
        if later is not None and earlier is not None:
            assert later > earlier, (op, unit, needs, needed)
            assert not directly or later == earlier + 1, (op, unit, needs, needed)

    last_of_all = shape.n_micro - 1
    for m in range(shape.n_micro):
        follows(Op.FORWARD, m, Op.LOAD, m)
        follows(Op.BACKWARD, m, Op.FORWARD, m)
        follows(Op.COTANGENT, m, Op.FORWARD, m)
        follows(Op.BACKWARD, m, Op.COTANGENT, m)
        u = m if shape.by == "micro_batch" else 0
        follows(Op.GRAM, u, Op.BACKWARD, m)
        follows(Op.SWEEP, u, Op.GRAM, u)
        follows(Op.FEEDBACK, u, Op.SWEEP, u)
        follows(Op.WEIGHT, u, Op.FEEDBACK, u)
        follows(Op.STATISTICS, 0, Op.BACKWARD, m)
        follows(Op.REDUCE, 1 if shape.mean_first else 0, Op.WEIGHT, u)
        follows(Op.UPDATE, 0, Op.WEIGHT, u)
        if index == 0 and shape.by == "micro_batch":
            follows(Op.FEEDBACK, u, Op.SWEEP, u, directly=True)
    if shape.mean_first:
        follows(Op.REDUCE, 0, Op.BACKWARD, last_of_all)
        follows(Op.GRAM, 0, Op.REDUCE, 0)
    follows(Op.ROLLOUT, 0, Op.SWEEP, 0)
    follows(Op.ROLLOUT, 0, Op.STATISTICS, 0)
    final = Op.ROLLOUT if shape.feedback and shape.rollout == "nonlinear" else Op.UPDATE
    for other in (Op.STATISTICS, Op.REDUCE, Op.AGREE):
        for count in (0, 1):
            follows(final, 0, other, count)
    last_agreement = 1 if shape.feedback and shape.by == "step" else 0
    follows(Op.AGREE, last_agreement, Op.STATISTICS, 0)
    follows(Op.AGREE, last_agreement, Op.SWEEP, 0)
    follows(Op.AGREE, 0, Op.BACKWARD, last_of_all)
    if shape.by == "micro_batch" or not shape.feedback:
        follows(Op.AGREE, 0, Op.REDUCE, 0)
    made_by = {
        Op.SEND_ACTIVATION: Op.FORWARD,
        Op.SEND_GRADIENT: Op.BACKWARD,
        Op.SEND_COTANGENT: Op.COTANGENT,
        Op.SEND_VALUE: Op.SWEEP,
        Op.SEND_FEEDBACK: Op.FEEDBACK,
        Op.SEND_STATE: Op.ROLLOUT,
    }
    needed_by = {
        Op.RECV_ACTIVATION: Op.FORWARD,
        Op.RECV_GRADIENT: Op.BACKWARD,
        Op.RECV_COTANGENT: Op.COTANGENT,
        Op.RECV_VALUE: Op.SWEEP,
        Op.RECV_FEEDBACK: Op.FEEDBACK,
        Op.RECV_STATE: Op.ROLLOUT,
    }
    for step, i in place.items():
        if step.op in made_by:
            assert order[i - 1] == Instruction(made_by[step.op], step.unit)
        if step.op in needed_by:
            assert order[i + 1] == Instruction(needed_by[step.op], step.unit)


def most_between(order: Sequence[Instruction], first: Op, last: Op) -> int:
    held = most = 0
    for step in order:
        held += (step.op is first) - (step.op is last)
        most = max(most, held)
    return most


def check(shape: StepShape, orders: Orders) -> None:
    assert len(orders) == shape.pipe
    check_messages(orders)
    check_completes(orders)
    collectives = (Op.REDUCE, Op.AGREE, Op.STATISTICS, Op.UPDATE, Op.ROLLOUT)
    for index, order in enumerate(orders):
        check_rank(shape, index, order)
        assert most_between(order, Op.FORWARD, Op.BACKWARD) <= forward_limit(shape.pipe, index)
        if shape.feedback and shape.by == "micro_batch":
            assert most_between(order, Op.FORWARD, Op.WEIGHT) <= capture_limit(shape.pipe)
        assert [s for s in order if s.op in collectives] == [s for s in orders[0] if s.op in collectives]


@pytest.mark.parametrize("pipe", ALL_SHAPES)
def test_every_shape(pipe: int) -> None:
    for shape in shapes([pipe], range(1, 17)):
        check(shape, rank_orders(shape))


def test_uneven_costs_and_slow_links() -> None:
    for shape in shapes([1, 3, 8], [1, 2, 7, 16]):
        check(shape, rank_orders(shape, UNEVEN[: shape.pipe], SLOW_LINK))


def test_captured_data_does_not_grow_with_micro_batches() -> None:
    orders = rank_orders(StepShape(4, 200))
    assert max(most_between(order, Op.FORWARD, Op.WEIGHT) for order in orders) == capture_limit(4) == 8


def test_same_arguments_same_order() -> None:
    for shape in shapes([5], [9]):
        assert rank_orders(shape) == rank_orders(shape)


@pytest.mark.parametrize("pipe", [1, 2, 4, 8])
def test_plain_back_propagation(pipe: int) -> None:
    for n_micro in (1, 4, 16):
        shape = StepShape(pipe, n_micro, feedback=False)
        check(shape, one_forward_one_backward(pipe, n_micro))
        orders = zero_bubble(pipe, n_micro)
        check_messages(orders)
        check_completes(orders)
        for index, order in enumerate(orders):
            without_weights = [step for step in order if step.op is not Op.WEIGHT]
            assert len(order) - len(without_weights) == n_micro
            check_rank(shape, index, without_weights)
            place = {step: i for i, step in enumerate(order)}
            for m in range(n_micro):
                assert (
                    place[Instruction(Op.BACKWARD, m)]
                    < place[Instruction(Op.WEIGHT, m)]
                    < place[Instruction(Op.REDUCE)]
                )


def test_known_one_forward_one_backward() -> None:
    """Warm-up, steady state and cool-down of 1F1B, written out."""
    work = [
        "".join(f"{s.op.name[0]}{s.unit}" for s in order if s.op in (Op.FORWARD, Op.BACKWARD))
        for order in one_forward_one_backward(3, 4)
    ]
    assert work == ["F0F1F2B0F3B1B2B3", "F0F1B0F2B1F3B2B3", "F0B0F1B1F2B2F3B3"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, StepShape(4, 8)),
        ({"scope": 4}, StepShape(4, 8)),
        ({"scope": "batch"}, StepShape(4, 8, by="step")),
        ({"scope": "batch", "n_micro": 1}, StepShape(4, 1)),
        ({"rollout": "nonlinear"}, StepShape(4, 8, by="step", rollout="nonlinear")),
        ({"metric_known": False}, StepShape(4, 8, by="step", mean_first=True)),
        ({"clipped": True}, StepShape(4, 8, by="step", mean_first=True)),
        ({"value_statistics": True}, StepShape(4, 8, by="step")),
        ({"cotangents": True}, StepShape(4, 8, cotangents=True)),
        ({"feedback": False, "clipped": True, "metric_known": False}, StepShape(4, 8, feedback=False)),
        ({"feedback": False, "cotangents": True}, StepShape(4, 8, feedback=False, cotangents=True)),
    ],
)
def test_shape_of_options(options: dict[str, object], expected: StepShape) -> None:
    plain: dict[str, object] = {
        "pipe": 4,
        "n_micro": 8,
        "feedback": True,
        "scope": "micro_batch",
        "rollout": "linear",
        "metric_known": True,
        "clipped": False,
        "value_statistics": False,
        "cotangents": False,
    }
    assert step_shape(**{**plain, **options}) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipe": 0}, "pipe=0, expected a whole number >= 1"),
        ({"n_micro": True}, "n_micro=True, expected"),
        ({"by": "batch"}, "by='batch', expected one of micro_batch, step"),
        ({"rollout": "nonlinear"}, "take by='step'"),
        ({"mean_first": True}, "take by='step'"),
    ],
)
def test_shapes_that_do_not_exist(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(StepShape(2, 2), **options)  # type: ignore[arg-type]


def test_costs_of_another_number_of_ranks() -> None:
    with pytest.raises(UserError, match="costs of 2 ranks for pipe=3"):
        rank_orders(StepShape(3, 4), [RankCosts(), RankCosts()])
