"""Work, bytes and memory of each stage, counted without computing.

Counted are multiplications and additions of matrix products and convolutions, by running the very code of a step on
tensors without data. Elementwise work is not, nor are the cross factors of cooperating layers. Work is of one
micro-batch, in floating-point operations (counted) or seconds (measured).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..curvature import factors as bases
from ..curvature.coordinates import Coordinates
from ..curvature.factors import Factors, InputSide, Layout
from ..errors import UserError
from ..players import AffineGradients, FormedGradients, SampleGradients, is_affine, prepare, sample_gradients
from ..players.affine import outer_product_gram
from ..trajectory import LiveValue, Player, Trajectory, floating_tensors

Metric = Literal["number", "diagonal", "kfac", "ekfac"]
"""Inverse metrics by what their Gram matrices cost: one number, a number a parameter, Kronecker bases."""


@dataclass(frozen=True, kw_only=True)
class Counting:
    """What of an optimizer decides the work of a step.

    Attributes:
        feedback: whether there is a recursion; without it, no Gram matrices are counted.
        metric: the sweep's.
        recursion_samples: samples of one recursion; None: a micro-batch.
        rows: rows of S a sample: curvature cotangents; 1 but for the exact terminal Hessian.
        full_value: whether the value state is a matrix over the samples (else its diagonal blocks).
        weight_in_backward: whether BACKWARD forms weight-gradients (capture="gradient").
        weight_products: weight-gradients that WEIGHT forms: 2 where base step and correction need one each.
        state_per_parameter: numbers of optimizer state a parameter.
        factors: kfac, ekfac: what factors are made of.
        factor_every, basis_every: kfac, ekfac: steps over which factors and decompositions are spread.
        basis_work: operations of a new basis of n vectors, as a multiple of n^3.
        n_micro: micro-batches over which decompositions are spread.
    """

    feedback: bool = True
    metric: Metric = "number"
    recursion_samples: int | None = None
    rows: int = 1
    full_value: bool = False
    weight_in_backward: bool = False
    weight_products: int = 1
    state_per_parameter: float = 0.0
    factors: Factors = "unfolded"
    factor_every: int = 1
    basis_every: int = 50
    basis_work: float = 9.0
    n_micro: int = 1

    def forms(self, module: nn.Module) -> bool:
        """Whether per-sample gradients of a module are formed in the backward pass (`GTDDP.forms_early`)."""
        return self.feedback and self.rows == 1 and not is_affine(module)

    def value_numbers(self, samples: int) -> float:
        """Numbers of the value states of so many samples: c and M of every recursion."""
        group = self.recursion_samples or samples
        block = group * self.rows if self.full_value else self.rows
        return samples * self.rows * (1 + block)


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """What one stage costs for one micro-batch. Work is in one unit throughout: operations, or seconds.

    Attributes:
        player: name of the stage's player.
        samples: of the micro-batch.
        forward: work of the stage.
        backward: of the gradient of its live tensors, of parameters that belong to no player, and of per-sample
            gradients that are formed at once.
        gram: of its Gram matrices.
        sweep, feedback: of its part in the recursion.
        weight: of its weight-gradients, weighted or not.
        statistics: of curvature statistics, spread over the steps and micro-batches that share one.
        live_bytes: all live tensors of the cut before the stage: the message downstream.
        gradient_bytes: those that carry derivatives: the message upstream.
        parameter_bytes: all parameters that it reads.
        factor_bytes: curvature statistics that are averaged over replicas.
        kept_bytes: what autograd keeps from forward to backward.
        captured_bytes: what is kept for Gram matrices and weight-gradients: layer inputs and output gradients, or
            per-sample gradients that were formed in the backward pass.
    """

    player: str
    samples: int
    forward: float
    backward: float
    gram: float
    sweep: float
    feedback: float
    weight: float
    statistics: float
    live_bytes: int
    gradient_bytes: int
    parameter_bytes: int
    factor_bytes: int
    kept_bytes: int
    captured_bytes: int

    @property
    def work(self) -> float:
        """All work of a micro-batch."""
        return self.forward + self.backward + self.gram + self.sweep + self.feedback + self.weight + self.statistics


# ----------------------------------------------------------------------------------------------------------
# Counting


def count_stages(
    trajectory: Trajectory, sample_input: Tensor | Sequence[LiveValue], counting: Counting | None = None
) -> tuple[StageCosts, ...]:
    """Counts every stage for one micro-batch. Nothing is computed, and the model stays as it is.

    Its modules are called, and so are their hooks: count before an optimizer is attached to it.

    Args:
        trajectory: of a model on any device, "meta" too.
        sample_input: a micro-batch as the model takes it, or the sequence of its arguments; only shapes count.
        counting: the optimizer's part; None: GT-DDP on SGD.
    """
    counting = counting or Counting()
    inputs = (sample_input,) if isinstance(sample_input, Tensor) else tuple(sample_input)
    first = next((value for value in inputs if isinstance(value, Tensor)), None)
    if first is None or not len(first):
        raise UserError("count_stages: the sample input has no tensor with samples in it")
    samples = len(first)
    device = next(iter(trajectory.players[0].controls().values())).device
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _SparedBuffers(), torch.enable_grad():
        live = trajectory.bind(
            *(torch.empty(v.shape, dtype=v.dtype, device=device) if isinstance(v, Tensor) else v for v in inputs)
        )
        runs = []
        storages = _Storages(fake)
        for stage in trajectory.stages:
            run = _StageRun(stage.player, live, storages)
            live = run.forward(stage.run)
            runs.append(run)
        return tuple(run.costs(samples, counting) for run in runs)


class _Storages:
    """Storages that autograd keeps, each counted where it is first kept; those of parameters are not."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self.counted: set[int] = set()
        self.same_as: dict[int, int] = {}
        self.held: list[Tensor] = []  # so that a storage's address is not used again

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy that counts as the same storage."""
        copy = tensor.clone()
        self.same_as[copy.untyped_storage()._cdata] = self._key(tensor)
        self.held += [tensor, copy]
        return copy

    def new_bytes(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> int:
        """The bytes of those storages that were not counted before."""
        self.held += tensors
        # A view of a parameter is one of the stand-in that the mode made for it.
        own = {self._key(self.fake.from_tensor(parameter)) for parameter in parameters}
        found = {
            self._key(t): t.untyped_storage().nbytes()
            for t in tensors
            if isinstance(t, FakeTensor) and self._key(t) not in own | self.counted
        }
        self.counted.update(found)
        return sum(found.values())

    def _key(self, tensor: Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        return self.same_as.get(key, key)


class _SparedBuffers:
    """While it is on, modules that are called change stand-ins of their buffers: not all writes stay in fake mode."""

    def __init__(self) -> None:
        self.own: list[tuple[nn.Module, str, Tensor]] = []
        self.seen: set[nn.Module] = set()

    def __enter__(self) -> None:
        self.handle = register_module_forward_pre_hook(self._spare)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
        for module, name, buffer in self.own:
            module._buffers[name] = buffer

    def _spare(self, module: nn.Module, _: object) -> None:
        if module not in self.seen:
            self.seen.add(module)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self.own.append((module, name, buffer))
                    module._buffers[name] = torch.empty_like(buffer)


class _StageRun:
    """One stage, run on tensors without data, and what its player's code needs of that."""

    def __init__(self, player: Player, before: tuple[LiveValue, ...], storages: _Storages) -> None:
        self.player, self.storages = player, storages
        # Derivatives end at the cut: one live tensor may have been made of another.
        self.before = tuple(
            v.detach().requires_grad_() if isinstance(v, Tensor) and v.requires_grad else v for v in before
        )
        self.after: tuple[LiveValue, ...] = ()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.kept_bytes = 0
        self.forward_work = 0.0

    def forward(self, run: Callable[[tuple[LiveValue, ...]], tuple[LiveValue, ...]]) -> tuple[LiveValue, ...]:
        # Copies, because a stage may change a live tensor in place.
        live = tuple(self.storages.copy_of(v) if isinstance(v, Tensor) and v.requires_grad else v for v in self.before)
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        handles = [module.register_forward_hook(self._seen(name)) for name, module in self.player.modules.items()]
        try:
            with flop_counter() as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
                self.after = run(live)
        finally:
            for handle in handles:
                handle.remove()
        self.forward_work = float(counter.get_total_flops())
        self.kept_bytes = self.storages.new_bytes(kept, self._parameters())
        return self.after

    def _seen(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0], output

        return hook

    def costs(self, samples: int, counting: Counting) -> StageCosts:
        captured_bytes, gram, weight, statistics, factor_bytes, forming = 0, 0.0, 0.0, 0.0, 0, 0.0
        group = counting.recursion_samples or samples
        for name, module in self.player.modules.items():
            x, y = self.inputs[name].detach(), self.outputs[name].detach()
            dtype = next(module.parameters(recurse=False)).dtype  # what autocast made is brought to it in the step
            inputs, slopes = prepare(module, x.to(dtype)), y.to(dtype)
            part = sample_gradients(module, inputs, slopes)
            rows = sample_gradients(
                module, _resized(inputs, group * counting.rows), _resized(slopes, group * counting.rows)
            )
            if counting.forms(module):  # in the backward pass, and what it is made of is let go
                forming += _count(part.per_sample)
                part, rows = (FormedGradients(module, each.per_sample()) for each in (part, rows))
                captured_bytes += sum(grads.nbytes for grads in part.per_sample().values())
            else:
                captured_bytes += inputs.numel() * x.element_size()
                captured_bytes += y.nbytes * (1 if counting.rows == 1 else 1 + counting.rows)
            weight += _count(partial(part.weighted, slopes.new_empty(samples)))
            if counting.feedback:
                gram += _count(partial(_gram, rows, counting)) * samples / group
            if counting.metric in ("kfac", "ekfac") and is_affine(module):
                more, bytes_ = _factor_costs(cast(AffineGradients, part), counting)
                statistics += more
                factor_bytes += bytes_
        # One recursion: two products and a solution of a linear system of as many unknowns as rows, if full.
        n = group * counting.rows if counting.feedback else 0
        sweep = (2 / 3 + 2 + 2 * (2 if counting.full_value else 0)) * n**3
        return StageCosts(
            player=self.player.name,
            samples=samples,
            forward=self.forward_work,
            backward=self._backward() + forming,
            gram=gram,
            sweep=sweep * samples / group,
            feedback=2.0 * n * n * samples / group,
            weight=weight,
            statistics=statistics,
            live_bytes=sum(value.nbytes for value in self.before if isinstance(value, Tensor)),
            gradient_bytes=sum(tensor.nbytes for _, tensor in floating_tensors(self.before)),
            parameter_bytes=sum(p.nbytes for p in self._parameters()),
            factor_bytes=factor_bytes,
            kept_bytes=self.kept_bytes,
            captured_bytes=captured_bytes,
        )

    def _backward(self) -> float:
        """Gradients of live tensors, of the layers' outputs and of parameters without a player; not of controls."""
        ends = [tensor for _, tensor in floating_tensors(self.after) if tensor.requires_grad]
        wanted = [tensor for _, tensor in floating_tensors(self.before) if tensor.requires_grad]
        wanted += [output for output in self.outputs.values() if output.requires_grad]
        controls = {id(parameter) for parameter in self.player.controls().values()}
        wanted += [parameter for parameter in self._parameters() if id(parameter) not in controls]
        if not ends or not wanted:
            return 0.0
        slopes = [torch.empty_like(end) for end in ends]
        return _count(lambda: torch.autograd.grad(ends, wanted, slopes, retain_graph=True, allow_unused=True))

    def _parameters(self) -> list[Tensor]:
        """The parameters that the stage reads: the ends of its graph that are not live tensors."""
        live = {id(value) for value in self.before}
        reading = [t.grad_fn for _, t in floating_tensors(self.after) if t.grad_fn is not None]
        seen, found = set(reading), {}
        while reading:
            node = reading.pop()
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor) and id(variable) not in live:
                found[id(variable)] = variable
            fresh = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(fresh)
            reading += fresh
        return list(found.values())


_BACKWARD = torch.ops.aten.convolution_backward


def flop_counter() -> FlopCounterMode:
    """torch's counter of the operations of matrix products and convolutions, right for grouped weight-gradients."""
    return FlopCounterMode(display=False, custom_mapping={_BACKWARD: _convolution_backward})


def _convolution_backward(*arguments: Any, out_val: object = None) -> int:
    """Work of a convolution's gradients. torch's own formula takes no notice of groups in that of the weight: it
    would be as many times too much as there are groups."""
    *others, groups, (inputs, weight, _) = arguments
    counted = flop_registry[_BACKWARD]
    of_inputs = counted(*others, groups, [inputs, False, False], out_val=out_val)
    of_weight = counted(*others, groups, [False, weight, False], out_val=out_val)
    return int(of_inputs + of_weight // groups)


_convolution_backward._get_raw = True  # type: ignore[attr-defined]  # torch hands it tensors, as its own formula has them


def _count(run: Callable[[], object]) -> float:
    with flop_counter() as counter:
        run()
    return float(counter.get_total_flops())


def _resized(tensor: Tensor, samples: int) -> Tensor:
    return tensor.new_empty((samples, *tensor.shape[1:]))


def _gram(part: SampleGradients, counting: Counting) -> Tensor:
    """The Gram matrix by the way that the metric takes."""
    if counting.metric == "number":
        return part.gram(dict.fromkeys(part.controls, 1.0))
    if counting.metric == "diagonal" or not isinstance(part, AffineGradients):
        return part.gram({name: part.output_grads.new_empty(p.shape) for name, p in part.controls.items()})
    layer = _coordinates(part, counting)
    if counting.metric == "kfac" and counting.factors != "spatially_uncorrelated":  # else not separable
        return outer_product_gram(*layer.positions(part))
    return layer.gram(part)


def _coordinates(part: AffineGradients, counting: Counting) -> Coordinates:
    """A layer's Kronecker coordinates, without data."""
    layout, empty = Layout.of(part.module), part.output_grads.new_empty
    by_channel = counting.factors == "spatially_uncorrelated"
    G, n = layout.groups, layout.channels if by_channel else layout.inputs
    inputs = InputSide(empty((G, n, n)), layout, by_channel)
    outputs = empty((G, layout.outputs, layout.outputs))
    return Coordinates(inputs, outputs, empty((G, layout.outputs, layout.inputs)))


def _factor_costs(part: AffineGradients, counting: Counting) -> tuple[float, int]:
    """Work of a layer's curvature statistics for a micro-batch, and the bytes of its factors."""
    layout = Layout.of(part.module)
    by_channel = counting.factors == "spatially_uncorrelated"

    def form() -> None:
        x, y = bases.reduced(*layout.positions(part), counting.factors)
        if by_channel:
            bases.channel_factor(part, layout)
        else:
            bases.input_factor(x)
        bases.output_factor(y)

    work = _count(form) / counting.factor_every
    if counting.metric == "ekfac":  # second moments of every sample's gradient in the eigenbasis
        layer = _coordinates(part, counting)
        work += _count(lambda: layer.mean_square(part)) / counting.factor_every
    n, O = layout.channels if by_channel else layout.inputs, layout.outputs  # noqa: E741
    decompositions = counting.basis_work * layout.groups * (n**3 + O**3)
    numbers = layout.groups * (n * n + O * O)
    return work + decompositions / (counting.basis_every * counting.n_micro), 4 * numbers
