"""Work of each stage, measured: one process runs the step's own code and times it stage by stage."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..curvature.kronecker import KroneckerCurvature
from ..errors import UserError
from ..groups import recursion_groups
from ..optimizer import GTDDP
from ..step import Step
from ..sweep import Value
from ..trajectory import LiveValue, Stage, StageFunction, Trajectory
from .counting import Counting, StageCosts, count_stages
from .order import Unit
from .segment import Segment

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(output, target) of a micro-batch -> its mean loss."""

_WORK = ("forward", "backward", "gram", "sweep", "feedback", "weight", "statistics")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured, and how often.

    Attributes:
        by: what has a recursion of its own: each micro-batch, or the whole step.
        n_micro: micro-batches of a replica's step.
        warmup: steps that are not timed, at least one.
        steps: steps whose median is taken.
    """

    by: Unit = "micro_batch"
    n_micro: int = 1
    warmup: int = 2
    steps: int = 5

    @property
    def micro_batches(self) -> int:
        """Micro-batches that are captured before anything else is done with them."""
        return self.n_micro if self.by == "step" else 1


def measure_stages(
    model: nn.Module,
    trajectory: Trajectory,
    new_optimizer: Callable[[nn.Module], GTDDP],
    counting: Counting,
    batches: Callable[[int], tuple[Sequence[Tensor], Sequence[Tensor]]],
    loss: LossFunction,
    protocol: Protocol,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[StageCosts, ...]:
    """Seconds of every stage for one micro-batch; bytes are counted.

    Every step is one that trains: captured, swept and applied as on a rank, but player by player with a clock between.
    The loss, the curvature cotangents and the update belong to no stage, and are left out.

    Args:
        model: the whole model, on the device to measure. It is trained, and cannot be used by itself afterwards.
        trajectory: its stages.
        new_optimizer: makes a GTDDP with capture="weighted" on it, so that weight-gradients are apart from BACKWARD.
        counting: the optimizer's part, for the bytes; feedback=False leaves out the recursion.
        batches: number of a step -> ``protocol.micro_batches`` inputs and targets, all of one size.
        loss: mean loss of a micro-batch.
        protocol: how often.
        autocast: the context of every forward pass.

    Raises:
        UserError: the optimizer forms its weight-gradients in the backward pass.
    """
    inputs, _ = batches(0)
    with autocast():
        counted = count_stages(trajectory, inputs[0], counting)
    timer = _Timer(inputs[0].device, len(trajectory.stages))
    stages = tuple(
        dataclasses.replace(stage, run=timer.timed(index, stage.run)) for index, stage in enumerate(trajectory.stages)
    )
    segment = Segment(model, dataclasses.replace(trajectory, stages=stages), (), 0)
    optimizer = new_optimizer(segment)
    if optimizer.options.capture != "weighted":
        raise UserError("measure_stages: expected an optimizer with capture='weighted'")
    segment.train()
    warmup = max(protocol.warmup, 1)  # the first step makes the optimizer's state
    measured = [
        _Run(segment, optimizer, timer, protocol, feedback=counting.feedback).step(*batches(number), loss, autocast)
        for number in range(warmup + protocol.steps)
    ][warmup:]
    optimizer.detach()

    def median(name: str, index: int) -> float:
        return statistics.median(seconds[name][index] for seconds in measured)

    return tuple(
        dataclasses.replace(
            stage,
            forward=median("forward", index),
            backward=median("backward", index),
            gram=median("gram", index),
            sweep=median("sweep", index),
            feedback=median("feedback", index),
            weight=median("weight", index),
            statistics=median("statistics", index),
        )
        for index, stage in enumerate(counted)
    )


T = TypeVar("T")
Seconds = dict[str, list[float]]
"""Kind of work -> seconds of every stage."""


class _Timer:
    """A clock that waits for the device, and what it said in forward and backward passes."""

    def __init__(self, device: torch.device, stages: int) -> None:
        self._device = device
        self.forward = [0.0] * stages
        self.reached: dict[int, float] = {}
        """Stage -> when the backward pass came to it."""

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def timed(self, index: int, run: StageFunction) -> StageFunction:
        def timed_run(live: tuple[LiveValue, ...]) -> tuple[LiveValue, ...]:
            started = self.now()
            after = run(live)
            self.forward[index] += self.now() - started
            known = {id(value) for value in live}
            for value in after:
                if isinstance(value, Tensor) and value.requires_grad and id(value) not in known:
                    value.register_hook(lambda grad: self._reach(index))
            return after

        return timed_run

    def _reach(self, index: int) -> None:
        self.reached.setdefault(index, self.now())

    def seconds(self, work: Callable[[], object]) -> float:
        started = self.now()
        work()
        return self.now() - started


@dataclass
class _Run:
    """One step, taken apart."""

    segment: Segment
    optimizer: GTDDP
    timer: _Timer
    protocol: Protocol
    feedback: bool
    seconds: Seconds = field(default_factory=dict)

    def step(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        loss: LossFunction,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> Seconds:
        """Takes a step on these micro-batches; seconds a micro-batch."""
        stages, n = self.segment.trajectory.stages, self.protocol.micro_batches
        self.optimizer.zero_grad(set_to_none=True)
        self.timer.forward = [0.0] * len(stages)
        self.seconds = {name: [0.0] * len(stages) for name in _WORK}
        for x, y in zip(inputs, targets, strict=True):
            with autocast():
                value = loss(self.segment(x), y) / n
            self._pull_back(value)
        self.seconds["forward"] = self.timer.forward
        with torch.no_grad():
            self._sweep([len(x) for x in inputs])
        return {name: [second / n for second in seconds] for name, seconds in self.seconds.items()}

    def _pull_back(self, value: Tensor) -> None:
        self.timer.reached.clear()  # curvature cotangents were pulled back by the forward pass
        at = self.timer.now()
        value.backward()
        end = self.timer.now()
        stages = len(self.segment.trajectory.stages)
        for index in reversed(range(stages)):
            # The loss belongs to the last stage's time; a stage that was not reached takes none.
            until = self.timer.reached.get(index - 1, at) if index else end
            self.seconds["backward"][index] += until - at
            at = until

    def _sweep(self, sizes: Sequence[int]) -> None:
        micro_batches = self.optimizer.capture.take()
        self.optimizer.check(micro_batches)
        groups = recursion_groups(sizes, self.optimizer.options.scope, 1, "mean")
        work = self.optimizer.new_step(micro_batches, groups, sum(sizes))
        self.optimizer.fill_gradients(work)
        alone = [_only(work, self.segment.trajectory, stage) for stage in self.segment.trajectory.stages]
        if self.feedback:
            # A recursion by micro-batch runs before there is a mean gradient.
            known = work.grads if self.protocol.by == "step" else {}
            self._recursion([dataclasses.replace(part, grads=known) for part in alone])
        for index, part in enumerate(alone):
            (player,) = part.trajectory.players
            samples = part.samples.of(player, "gradient")
            if samples is not None:
                self._add("weight", index, partial(samples.weighted, part.mean_weights()))
        self._statistics(alone)
        work.complete_statistics()
        work.update_plain()
        for player in work.trajectory.players:
            work.act(player, *work.collect(player))
        self.optimizer.finish(work)

    def _recursion(self, alone: Sequence[Step]) -> None:
        for index, part in enumerate(alone):
            self._add("gram", index, part.prepare)
        values: list[Value] | None = None
        for index, part in reversed(list(enumerate(alone))):
            values = self._add("sweep", index, partial(part.backward, values))
        first = alone[0]
        phis = [torch.zeros(g.samples * first.rows, dtype=torch.float64, device=first.device) for g in first.groups]
        for index, part in enumerate(alone):
            phis = self._add("feedback", index, partial(part.feedback, phis))

    def _statistics(self, alone: Sequence[Step]) -> None:
        """Factors are made of every micro-batch, decompositions once a step; each as often as the curvature says."""
        curvature = self.optimizer.curvature
        if not curvature.needs_samples or not isinstance(curvature, KroneckerCurvature):
            return
        never = 2**62
        at_once = dataclasses.replace(curvature, factor_every=1, basis_spread=False, basis_lag=0)
        shared = self.protocol.micro_batches / self.protocol.n_micro
        for index, part in enumerate(alone):
            factors, both = (
                self.timer.seconds(
                    dataclasses.replace(
                        part,
                        statistics={},
                        curvature=dataclasses.replace(at_once, basis_every=every, basis_lag=every - 1),
                    ).complete_statistics
                )
                for every in (never, 1)
            )
            self.seconds["statistics"][index] = (
                factors / curvature.factor_every + max(both - factors, 0.0) * shared / curvature.basis_every
            )

    def _add(self, name: str, index: int, work: Callable[[], T]) -> T:
        started = self.timer.now()
        found = work()
        self.seconds[name][index] += self.timer.now() - started
        return found


def _only(work: Step, trajectory: Trajectory, stage: Stage) -> Step:
    """The same step with one stage in its trajectory; what it finds is found by the step as well."""
    return dataclasses.replace(work, trajectory=dataclasses.replace(trajectory, stages=(stage,)))
