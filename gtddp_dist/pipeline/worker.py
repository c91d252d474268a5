"""What a rank does: one method for every instruction, on one segment and one replica's micro-batches.

The order in which they run comes from `order`; who runs them is DeepSpeed's engine (`engine`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..buffers import copy_buffers, restore_buffers, unchanged_buffers, unchanged_random_state
from ..capture import MicroBatch, Stream
from ..diagnostics import StepFacts
from ..errors import CurvatureError
from ..groups import RecursionGroup, recursion_groups
from ..nonfinite import Kind, Source, in_step, in_training, of_ranks, packed
from ..optimizer import GTDDP, all_finite, derivatives, values_finite
from ..step import Grads, Step
from ..sweep import Value
from ..trajectory import LiveValue
from .grid import Grid
from .instructions import Instruction, Op
from .messages import KINDS, Channels, Form, Layout
from .order import StepShape
from .segment import Segment

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(output, target) of a micro-batch -> its mean loss."""


@dataclass
class Outcome:
    """What a step came to; the same on every rank."""

    loss: float
    correct: int
    refused: bool
    source: Source | None = None
    """Of a refused step: what was not finite, and on which rank."""


@dataclass
class _Work:
    """One step's working data."""

    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    live: dict[int, tuple[LiveValue, ...]] = field(default_factory=dict)
    outputs: dict[int, tuple[LiveValue, ...]] = field(default_factory=dict)
    output_grads: dict[int, list[Tensor]] = field(default_factory=dict)
    cotangents: dict[int, list[Tensor]] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    captured: dict[int, MicroBatch] = field(default_factory=dict)
    units: dict[int, Step] = field(default_factory=dict)
    after: dict[int, list[Value]] = field(default_factory=dict)
    before: dict[int, list[Value]] = field(default_factory=dict)
    phis: dict[int, list[Tensor]] = field(default_factory=dict)
    states: list[tuple[LiveValue, ...]] = field(default_factory=list)
    gradient: dict[int, Grads] = field(default_factory=dict)
    correction: dict[int, Grads] = field(default_factory=dict)
    mean: dict[int, Grads] = field(default_factory=dict)
    finite: list[Tensor] = field(default_factory=list)
    whole: Step | None = None
    facts: StepFacts = field(default_factory=StepFacts)
    correct: int = 0
    poisoned: bool = False
    failure: str | None = None
    refused: bool = False
    source: Source | None = None
    agreed: int = 0
    loss: float = math.nan
    all_correct: int = 0


class Worker:
    """Carries out instructions.

    Args:
        grid: where this rank is.
        segment: what it owns.
        optimizer: of the segment's parameters: a GTDDP on it, or one of torch.optim.
        loss: the mean loss of a micro-batch.
        shape: what a step consists of.
        micro_batch: samples of a micro-batch.
        clip_norm: largest norm of the mean gradient, for an optimizer that does not clip by itself.
        autocast: the context of every forward pass.
        loss_scale: by what losses are multiplied before their backward pass.
    """

    def __init__(
        self,
        grid: Grid,
        segment: Segment,
        optimizer: Optimizer,
        loss: LossFunction,
        shape: StepShape,
        micro_batch: int,
        *,
        clip_norm: float | None,
        autocast: Callable[[], AbstractContextManager[object]],
        loss_scale: Callable[[], float],
    ) -> None:
        self.grid, self.segment, self.optimizer, self.shape = grid, segment, optimizer, shape
        self.channels = Channels(grid)
        self.first = grid.segment == 0
        self.last = grid.segment == grid.shape.pipe - 1
        self.seconds: dict[Op, float] = dict.fromkeys(Op, 0.0)
        """Spent on instructions of each kind since the last :meth:`take_measurements`, waiting included."""
        self._waited_within = 0.0
        """Of these seconds, those that were waiting."""
        self._loss, self._clip_norm = loss, clip_norm
        self._autocast, self._loss_scale = autocast, loss_scale
        self._micro_batch = micro_batch
        self._samples = micro_batch * shape.n_micro * grid.shape.data
        self._before: Layout | None = None
        self._after: Layout | None = None
        self._cotangent_forms: list[Form] | None = None
        self._announced: set[str] = set()
        self._buffers: list[Tensor] = []
        self._work = _Work()
        self._ahead: dict[str, list[int]] = {}
        self._lets_go = False
        """Whether nothing needs a micro-batch's captured data once its weight-gradients are formed."""
        if isinstance(optimizer, GTDDP):
            optimizer.first_sample = grid.replica * micro_batch * shape.n_micro
            self._lets_go = shape.by == "micro_batch" and not optimizer.curvature.needs_samples
        self._do: dict[Op, Callable[[int], None]] = {
            Op.LOAD: lambda m: None,
            Op.RECV_ACTIVATION: self._receive_activation,
            Op.FORWARD: self._forward,
            Op.SEND_ACTIVATION: self._send_activation,
            Op.RECV_GRADIENT: self._receive_gradient,
            Op.BACKWARD: self._backward,
            Op.SEND_GRADIENT: self._send_gradient,
            Op.RECV_COTANGENT: self._receive_cotangent,
            Op.COTANGENT: self._cotangent,
            Op.SEND_COTANGENT: self._send_cotangent,
            Op.GRAM: self._gram,
            Op.RECV_VALUE: self._receive_value,
            Op.SWEEP: self._sweep,
            Op.SEND_VALUE: self._send_value,
            Op.RECV_FEEDBACK: self._receive_feedback,
            Op.FEEDBACK: self._feedback,
            Op.SEND_FEEDBACK: self._send_feedback,
            Op.WEIGHT: self._weight,
            Op.REDUCE: self._reduce,
            Op.STATISTICS: self._statistics,
            Op.AGREE: self._agree,
            Op.UPDATE: self._update,
            Op.RECV_STATE: self._receive_state,
            Op.ROLLOUT: self._roll_out,
            Op.SEND_STATE: self._send_state,
        }

    # ------------------------------------------------------------------------------------------------------
    # A step

    def start(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Begin a step on this replica's micro-batches; the first segment reads inputs, the last targets."""
        self._work = _Work(list(inputs), list(targets))
        self.segment.train()
        self._buffers = copy_buffers(self.segment)
        self.optimizer.zero_grad(set_to_none=True)

    def perform(self, instruction: Instruction) -> None:
        """Carry out one instruction; after a refused step was agreed on, those that are left do nothing."""
        if self._work.refused:
            return
        started, waited = time.perf_counter(), self._waited
        self._do[instruction.op](instruction.unit)
        self.seconds[instruction.op] += time.perf_counter() - started
        self._waited_within += self._waited - waited

    def finish(self) -> Outcome:
        """End the step; what it came to."""
        self.channels.flush()
        work = self._work
        if work.refused:
            restore_buffers(self.segment, self._buffers)
        else:
            self._average_buffers()
        return Outcome(work.loss, work.all_correct, work.refused, work.source)

    def take_measurements(self) -> tuple[float, float, float]:
        """Seconds of work, seconds of waiting for other ranks, and bytes sent, since the last call."""
        traffic = self.channels.traffic
        idle = self._waited  # between instructions too: for metrics, and for those who are late
        busy = sum(self.seconds.values()) - self._waited_within
        sent = sum(traffic.bytes_sent.values()) + self.grid.bytes_reduced
        self.seconds = dict.fromkeys(Op, 0.0)
        traffic.waited = self.grid.waited = self._waited_within = 0.0
        traffic.bytes_sent = dict.fromkeys(KINDS, 0)
        self.grid.bytes_reduced = 0
        return busy, idle, float(sent)

    @property
    def _waited(self) -> float:
        """Seconds of waiting for other ranks since the last measurements were taken."""
        return self.channels.traffic.waited + self.grid.waited

    @property
    def facts(self) -> StepFacts:
        """What diagnostics of this rank's part of the last step are made of."""
        return self._work.facts

    @torch.no_grad()
    def forward_only(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], *, training: bool) -> tuple[float, int]:
        """Summed loss of samples and how many are classified right, over these chunks of this replica; 0 and 0 where
        this is not the last segment.

        Args:
            inputs: chunks of any sizes; the first segment reads them.
            targets: the last segment reads these.
            training: in training mode, as a step sees its batch; running statistics are left as they are.
        """
        self.segment.train(training)
        total, correct = 0.0, 0
        with unchanged_buffers(self.segment), unchanged_random_state(self.grid.device):
            for x, y in zip(inputs, targets, strict=True):
                live: tuple[LiveValue, ...] = (x,)
                if not self.first:
                    source = self.grid.segment - 1
                    layout = self.channels.receive_layout("evaluation", source)
                    self.channels.post("evaluation", source, layout.forms)
                    live = layout.filled(self.channels.receive("evaluation", source), leaves=False)
                with self._autocast():
                    output = self.segment(*live)
                    if self.last:
                        logits = cast(Tensor, output)
                        loss = self._loss(logits if training else logits.double(), y)
                        total += float(loss.double()) * len(y)
                        correct += self._correct(cast(Tensor, output), y)
                        continue
                after = cast(tuple[LiveValue, ...], output)
                self.channels.send_layout("evaluation", self.grid.segment + 1, Layout.of(after))
                self._send_live("evaluation", after)
            self.channels.flush()
        return total, correct

    @staticmethod
    def _correct(output: Tensor, target: Tensor) -> int:
        """Samples classified right; 0 where the task is no classification."""
        if output.ndim != 2 or target.ndim != 1 or target.is_floating_point():
            return 0
        return int((output.detach().argmax(1) == target).sum())

    def _average_buffers(self) -> None:
        """Running statistics are of each replica's samples; the mean over replicas goes on."""
        buffers = [b for b in self.segment.buffers() if b.is_floating_point()]
        if self.grid.shape.data > 1 and buffers:
            for buffer, total in zip(buffers, self.grid.sum_over_replicas(buffers), strict=True):
                buffer.copy_(total / self.grid.shape.data)

    # ------------------------------------------------------------------------------------------------------
    # Forward and backward passes

    def _receive_live(self, kind: str) -> list[Tensor]:
        """The next message from upstream; room for the one after it is made at once."""
        if self._before is None:
            self._before = self.channels.receive_layout(kind, self.grid.segment - 1)
        if not self.channels.is_posted(kind, self.grid.segment - 1):
            self.channels.post(kind, self.grid.segment - 1, self._before.forms)
        return self.channels.receive(kind, self.grid.segment - 1)

    def _receive_activation(self, m: int) -> None:
        assert self.first is False
        received = self._receive_live("activation")
        assert self._before is not None
        if m + 1 < self.shape.n_micro:
            self.channels.post("activation", self.grid.segment - 1, self._before.forms)
        self._work.live[m] = self._before.filled(received, leaves=True)

    def _forward(self, m: int) -> None:
        work = self._work
        live = (work.inputs[m],) if self.first else work.live[m]
        with self._autocast():
            output = self.segment(*live)
            if self.last:
                loss = self._loss(cast(Tensor, output), work.targets[m])
                work.losses[m] = loss / (self.shape.n_micro * self.grid.shape.data)
                work.correct += self._correct(cast(Tensor, output), work.targets[m])
        work.live[m] = live
        if not self.last:
            work.outputs[m] = cast(tuple[LiveValue, ...], output)
            self._after = Layout.of(work.outputs[m])
        if isinstance(self.optimizer, GTDDP):
            captured = self.optimizer.capture.latest
            assert captured is not None
            work.captured[m] = captured

    def _send_activation(self, m: int) -> None:
        assert self._after is not None
        self._announce("activation", self.grid.segment + 1, self._after)
        self._send_live("activation", self._work.outputs[m])

    def _announce(self, kind: str, segment: int, layout: Layout) -> None:
        if kind not in self._announced:
            self._announced.add(kind)
            self.channels.send_layout(kind, segment, layout)

    def _send_live(self, kind: str, live: Sequence[LiveValue]) -> None:
        self.channels.send(kind, self.grid.segment + 1, [v for v in live if isinstance(v, Tensor)])

    def _receive_gradient(self, m: int) -> None:
        assert self._after is not None
        source = self.grid.segment + 1
        if not self.channels.is_posted("gradient", source):
            self.channels.post("gradient", source, self._after.gradient_forms)
        self._work.output_grads[m] = self.channels.receive("gradient", source)
        self.channels.delivered("activation", source)  # or there would be no gradient of it
        if m + 1 < self.shape.n_micro:
            self.channels.post("gradient", source, self._after.gradient_forms)

    def _backward(self, m: int) -> None:
        work = self._work
        if self.last:
            (work.losses[m] * self._loss_scale()).backward()
            work.losses[m] = work.losses[m].detach()  # its graph holds on to what was captured
        else:
            torch.autograd.backward(self._carrying(work.outputs.pop(m)), work.output_grads.pop(m))
        if m in work.captured:
            work.captured[m].edges.clear()
            if self._lets_go and not self.shape.feedback:
                self._form(self._new_step([m]))
                self._let_go(m)

    def _carrying(self, live: Sequence[LiveValue]) -> list[Tensor]:
        """Those live tensors at the segment's last cut that carry a gradient."""
        assert self._after is not None
        return [cast(Tensor, live[i]) for i in self._after.gradient_positions]

    def _send_gradient(self, m: int) -> None:
        assert self._before is not None
        live = self._work.live.pop(m)
        tensors = [cast(Tensor, live[i]) for i in self._before.gradient_positions]
        self.channels.send(
            "gradient",
            self.grid.segment - 1,
            [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors],
        )

    # ------------------------------------------------------------------------------------------------------
    # The second backward stream: curvature cotangents

    @property
    def _streams(self) -> list[Stream]:
        return sorted(self._gtddp.capture.cotangents)

    def _receive_cotangent(self, m: int) -> None:
        source = self.grid.segment + 1
        if self._cotangent_forms is None:
            self._cotangent_forms = self.channels.receive_layout("cotangent", source).forms
        if not self.channels.is_posted("cotangent", source):
            self.channels.post("cotangent", source, self._cotangent_forms)
        self._work.cotangents[m] = self.channels.receive("cotangent", source)
        if m + 1 < self.shape.n_micro:
            self.channels.post("cotangent", source, self._cotangent_forms)

    def _cotangent(self, m: int) -> None:
        """Pull all streams of a micro-batch back through the segment; on the last one the forward pass did so."""
        if self.last:
            return
        received = self._work.cotangents.pop(m)
        captured, outputs = self._work.captured[m], self._carrying(self._work.outputs[m])
        for index, stream in enumerate(self._streams):
            own = received[index * len(outputs) : (index + 1) * len(outputs)]
            by_sample = [t.reshape(captured.samples, -1, *t.shape[1:]) for t in own]  # K cotangents a sample
            each = [
                [t[:, k].to(o.dtype) for t, o in zip(by_sample, outputs, strict=True)]
                for k in range(by_sample[0].shape[1])
            ]
            self._gtddp.capture.pull_back(captured, stream, outputs, each)

    def _send_cotangent(self, m: int) -> None:
        assert self._before is not None
        captured, live = self._work.captured[m], self._work.live[m]
        tensors = []
        for stream in self._streams:
            found = captured.derivatives[stream]
            rows = next(d.shape[0] for d in found.values())
            for position in self._before.gradient_positions:
                at = cast(Tensor, live[position])
                tensors.append(found.get((0, position), at.new_zeros(rows, *at.shape[1:])))
        self._announce("cotangent", self.grid.segment - 1, Layout.of(tensors))
        self.channels.send("cotangent", self.grid.segment - 1, tensors)

    # ------------------------------------------------------------------------------------------------------
    # The recursion

    @property
    def _gtddp(self) -> GTDDP:
        assert isinstance(self.optimizer, GTDDP)
        return self.optimizer

    def _groups(self, micro_batches: int) -> list[RecursionGroup]:
        """Recursion groups of that many micro-batches of this replica; their shares are of the whole step."""
        sizes = [self._micro_batch] * micro_batches
        part = micro_batches / (self.shape.n_micro * self.grid.shape.data)
        groups = recursion_groups(sizes, self._gtddp.options.scope, 1, "mean")
        return [replace(group, share=group.share * part) for group in groups]

    def _new_step(self, micro_batches: Sequence[int]) -> Step:
        captured = [self._work.captured[m] for m in micro_batches]
        groups = self._groups(len(captured))
        return self._gtddp.new_step(captured, groups, self._samples, self._loss_scale(), self.grid)

    def _whole(self) -> Step:
        """The step over all micro-batches of this replica, with its mean gradient over all replicas."""
        work = self._work
        if work.whole is None:
            captured = [work.captured[m] for m in sorted(work.captured)]  # none where they were let go
            if not self._lets_go:
                self._gtddp.check(captured)
            self._unscale()
            groups = self._groups(self.shape.n_micro)
            work.whole = self._gtddp.new_step(captured, groups, self._samples, self._loss_scale(), self.grid)
            self._gtddp.fill_gradients(work.whole, work.mean if self._lets_go else None)
        return work.whole

    def _unscale(self) -> None:
        """Take the loss scale out of p.grad; what was captured keeps it, and is divided where it is used."""
        scale, grads = self._loss_scale(), [p.grad for p in self.segment.parameters() if p.grad is not None]
        if scale != 1 and grads:
            torch._foreach_div_(grads, scale)

    def _gram(self, u: int) -> None:
        by_step = self.shape.by == "step"
        step = self._work.units[u] = self._whole() if by_step else self._new_step([u])
        if not by_step or not self.shape.mean_first:
            with self._poisoned_by_nonfinite():
                step.prepare()

    @contextmanager
    def _poisoned_by_nonfinite(self) -> Iterator[None]:
        """Dense algebra may fail on what is not finite; the step is then refused when ranks agree."""
        try:
            yield
        except torch.linalg.LinAlgError:
            if self._finite_so_far():
                raise
            self._work.poisoned = True

    def _value_sizes(self, u: int) -> list[tuple[int, tuple[int, ...]]]:
        step = self._work.units[u]
        diagonal = self._gtddp.options.value_hessian == "block_diagonal" and step.rows == 1
        sizes = [group.samples * step.rows for group in step.groups]
        return [(n, (n,) if diagonal else (n, n)) for n in sizes]

    def _receive_value(self, u: int) -> None:
        sizes = self._value_sizes(u)
        total = sum(n + math.prod(shape) for n, shape in sizes)
        source = self.grid.segment + 1
        self.channels.post("value", source, [(torch.float64, (total,))])
        (packed,) = self.channels.receive("value", source)
        values = []
        for n, shape in sizes:
            slope, curvature, packed = packed[:n], packed[n : n + math.prod(shape)], packed[n + math.prod(shape) :]
            values.append(Value(slope, curvature.view(shape)))
        self._work.after[u] = values

    def _sweep(self, u: int) -> None:
        after = self._work.after.pop(u, None)
        self._work.before[u] = [
            Value(*map(torch.full_like, (v.slope, v.curvature), (math.nan,) * 2)) for v in after or ()
        ]
        with self._poisoned_by_nonfinite(), torch.no_grad():
            self._work.before[u] = self._work.units[u].backward(after)

    def _send_value(self, u: int) -> None:
        values = self._work.before[u] or [
            Value(torch.full((n,), math.nan, dtype=torch.float64), torch.full(shape, math.nan, dtype=torch.float64))
            for n, shape in self._value_sizes(u)
        ]
        packed = torch.cat([part for v in values for part in (v.slope, v.curvature.flatten())])
        self.channels.send("value", self.grid.segment - 1, [packed.to(self.grid.device)])

    def _receive_feedback(self, u: int) -> None:
        step, source = self._work.units[u], self.grid.segment - 1
        sizes = [group.samples * step.rows for group in step.groups]
        self.channels.post("feedback", source, [(torch.float64, (sum(sizes),))])
        (packed,) = self.channels.receive("feedback", source)
        if self.shape.by == "micro_batch":  # upstream has used what went there
            self.channels.delivered("gradient", source)
            self.channels.delivered("cotangent", source)
        self._work.phis[u] = list(packed.split(sizes))

    def _no_feedback(self, step: Step) -> list[Tensor]:
        return [torch.zeros(g.samples * step.rows, dtype=torch.float64, device=self.grid.device) for g in step.groups]

    def _feedback(self, u: int) -> None:
        step = self._work.units[u]
        phis = self._work.phis.get(u) or self._no_feedback(step)
        self._work.phis[u] = step.feedback(phis)
        if self.last:
            step.facts.finish(step.groups, self._work.phis[u], step.options)
        self._work.facts.join(step.facts)

    def _send_feedback(self, u: int) -> None:
        self.channels.send("feedback", self.grid.segment + 1, [torch.cat(self._work.phis[u])])

    def _weight(self, u: int) -> None:
        """Weighted weight-gradients; what a unit held is then free."""
        self._form(self._work.units[u])
        if self.shape.by == "micro_batch":
            del self._work.units[u]
            if self._lets_go:
                self._let_go(u)

    @torch.no_grad()
    def _form(self, step: Step) -> None:
        """What the samples of a unit add to the controls, added up over units."""
        work = self._work
        apart = self._lets_go and self._gtddp.options.capture == "weighted"
        for player in step.trajectory.players:
            mean = self._gtddp.mean_gradient(step, player) if apart else {}
            parts = (*step.collect(player), mean)
            for found, total in zip(parts, (work.gradient, work.correction, work.mean), strict=True):
                kept = total.setdefault(player.index, {})
                for name, grad in found.items():
                    kept[name] = kept[name].add_(grad) if name in kept else grad  # formed here: nobody else has it

    def _let_go(self, m: int) -> None:
        """Free what was captured of a micro-batch."""
        captured = self._work.captured.pop(m)
        self._gtddp.check([captured])
        self._work.finite.append(all_finite(derivatives([captured])))
        self._gtddp.capture.forget(captured)

    # ------------------------------------------------------------------------------------------------------
    # Once a step

    def _reduce(self, _: int) -> None:
        """Sum over replicas what has been formed."""
        work = self._work
        if not isinstance(self.optimizer, GTDDP):
            self._unscale()
            found = [p for p in self.segment.parameters() if p.grad is not None]
            for parameter, total in zip(
                found, self.grid.sum_over_replicas([p.grad for p in found if p.grad is not None]), strict=True
            ):
                parameter.grad = total
            return
        if work.gradient or work.correction:
            self._sum_collected()
        else:
            self._whole()

    def _sum_collected(self) -> None:
        for total in (self._work.gradient, self._work.correction):
            names = [(index, name) for index, grads in total.items() for name in grads]
            sums = self.grid.sum_over_replicas([total[index][name] for index, name in names])
            for (index, name), value in zip(names, sums, strict=True):
                total[index][name] = value

    def _statistics(self, _: int) -> None:
        if not (isinstance(self.optimizer, GTDDP) and self.optimizer.curvature.needs_samples):
            return
        try:
            with torch.no_grad():
                self._whole().complete_statistics()
        except CurvatureError as error:
            self._work.failure = str(error)

    def _finite_so_far(self) -> bool:
        """Whether the losses of this rank are finite, and what its backward passes have left."""
        work = self._work
        formed = [g for total in (work.gradient, work.mean) for grads in total.values() for g in grads.values()]
        grads = [p.grad for p in self.segment.parameters() if p.grad is not None]
        found = all_finite([*derivatives(work.captured.values()), *work.losses.values(), *grads, *formed])
        return bool(torch.stack([flag.to(found.device) for flag in (found, *work.finite)]).all())

    def _is_finite(self) -> bool:
        """The same at an agreement. What was agreed on is not looked at again: only what has come to it."""
        work = self._work
        if work.poisoned or not (work.agreed or self._finite_so_far()):
            return False
        return bool(values_finite([value for values in work.before.values() for value in values]))

    def _agree(self, _: int) -> None:
        """One exchange: whether all is finite, whether anybody failed, the loss, the samples classified right."""
        work = self._work
        loss = sum(float(v.detach()) for v in work.losses.values())
        failed = work.failure is not None
        finite = self._is_finite()
        if failed and not finite:
            failed = False  # factors of a step that is refused anyway
        own = [float(not finite), float(failed), loss if math.isfinite(loss) else math.nan, float(work.correct)]
        every = self.grid.gather(own)
        last = every[self.grid.shape.rank(self.grid.shape.pipe - 1, 0) :]
        work.loss = sum(numbers[2] for numbers in last)
        work.all_correct = int(sum(numbers[3] for numbers in last))
        work.agreed += 1
        if any(numbers[0] for numbers in every):
            work.refused = True
            work.source = of_ranks(self.grid.gather_text(packed(self._source(), self._name)))
            if isinstance(self.optimizer, GTDDP):
                self.optimizer.refuse()
                self.optimizer.capture.clear()
        elif any(numbers[1] for numbers in every):
            reasons = self.grid.gather_text(work.failure or "")
            raise CurvatureError(next(text for text in reasons if text))

    @property
    def _name(self) -> str:
        return f"rank {self.grid.rank} (segment {self.grid.segment + 1} of {self.grid.shape.pipe})"

    def _source(self) -> Source | None:
        """What is not finite on this rank, of a step that is refused."""
        work, losses = self._work, list(self._work.losses.values())
        began = in_training(self.segment, self.optimizer, work.inputs if self.first else ())
        if began is not None or not isinstance(self.optimizer, GTDDP):
            return began or in_step(self.segment, {}, [], losses, [])
        facts = [work.facts, *(unit.facts for unit in work.units.values())]
        made = self.optimizer.source_in(work.captured.values(), losses, facts)
        if made is None and not all(bool(flag) for flag in work.finite):
            return Source(Kind.GRADIENT, "the loss gradient of a micro-batch")
        return made

    @torch.no_grad()
    def _update(self, _: int) -> None:
        work = self._work
        if not isinstance(self.optimizer, GTDDP):
            self._clip()
            self.optimizer.step()
            return
        whole = self._whole()
        whole.update_plain()
        for player in whole.trajectory.players:
            gradient, correction = work.gradient.get(player.index, {}), work.correction.get(player.index, {})
            if not self.shape.feedback and not self._lets_go:
                gradient, correction = whole.collect(player)
                gradient = dict(zip(gradient, self.grid.sum_over_replicas(list(gradient.values())), strict=True))
            whole.act(player, gradient, correction)
        self._end(whole)

    def _end(self, whole: Step) -> None:
        whole.facts = self._work.facts
        self._gtddp.finish(whole)
        self._gtddp.capture.clear()

    def _clip(self) -> None:
        if self._clip_norm is None:
            return
        parameters = [p for p in self.segment.parameters() if p.grad is not None]
        square = sum((p.grad.double() ** 2).sum() for p in parameters if p.grad is not None)
        norm = self.grid.sum_over_segments(torch.as_tensor(square, dtype=torch.float64, device=self.grid.device)).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)

    # ------------------------------------------------------------------------------------------------------
    # The nonlinear rollout

    def _receive_state(self, _: int) -> None:
        assert self._before is not None
        for _each in range(self.shape.n_micro):
            self.channels.post("state", self.grid.segment - 1, self._before.forms)
        for _each in range(self.shape.n_micro):
            received = self.channels.receive("state", self.grid.segment - 1)
            self._work.states.append(self._before.filled(received, leaves=False))

    @torch.no_grad()
    def _roll_out(self, _: int) -> None:
        work, whole = self._work, self._whole()
        whole.update_plain()
        lives = work.states or [m.live[0] for m in whole.samples.micro_batches]
        phis = whole.real_feedback(0, lives) if work.states else self._no_feedback(whole)
        work.states, phis = whole.roll_out(lives, phis)
        if self.last:
            whole.facts.finish(whole.groups, phis, whole.options)
        work.facts = whole.facts
        self._end(whole)

    def _send_state(self, _: int) -> None:
        for live in self._work.states:
            self._send_live("state", live)
