"""Work, bytes and memory of each stage, counted without computing; cuts that share the work out evenly.

Counted are multiplications and additions of matrix products and convolutions, by running the very code of a step on
tensors without data. Work is of one micro-batch, in floating-point operations (counted) or seconds (measured).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..curvature import factors as bases
from ..curvature.coordinates import Coordinates
from ..curvature.factors import Factors, InputSide, Layout
from ..errors import UserError
from ..files import write_text_atomically
from ..players import AffineGradients, SampleGradients, is_affine, prepare, sample_gradients
from ..players.affine import outer_product_gram
from ..trajectory import LiveValue, Player, Trajectory, floating_tensors
from .order import StepShape
from .simulate import RankCosts

Metric = Literal["number", "diagonal", "kfac", "ekfac"]
"""Inverse metrics by what their Gram matrices cost: one number, a number a parameter, Kronecker bases."""

_NUMBER = 8  # bytes of a number of the recursion: float64


@dataclass(frozen=True, kw_only=True)
class Counting:
    """What of an optimizer decides the work of a step.

    Attributes:
        metric: the sweep's.
        recursion_samples: samples of one recursion; None: a micro-batch.
        rows: rows of S a sample: curvature cotangents; 1 but for the exact terminal Hessian.
        full_value: whether the value state is a matrix over the samples (else its diagonal blocks).
        absorbed: whether one weighted weight-gradient serves base step and correction; else BACKWARD forms the mean
            gradient besides.
        state_per_parameter: numbers of optimizer state a parameter.
        factors: kfac, ekfac: what factors are made of.
        factor_every, basis_every: kfac, ekfac: steps over which factors and decompositions are spread.
        n_micro: micro-batches over which decompositions are spread.
    """

    metric: Metric = "number"
    recursion_samples: int | None = None
    rows: int = 1
    full_value: bool = False
    absorbed: bool = True
    state_per_parameter: float = 0.0
    factors: Factors = "unfolded"
    factor_every: int = 1
    basis_every: int = 50
    n_micro: int = 1

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
        backward: of the gradient of its live tensors.
        gram: of its Gram matrices.
        sweep, feedback: of its part in the recursion.
        weight: of its weight-gradients, weighted or not.
        statistics: of curvature statistics, spread over the steps and micro-batches that share one.
        live_bytes: all live tensors of the cut before the stage: the message downstream.
        gradient_bytes: those that carry derivatives: the message upstream.
        parameter_bytes: its parameters.
        factor_bytes: curvature statistics that are averaged over replicas.
        kept_bytes: what autograd keeps from forward to backward.
        captured_bytes: layer inputs and output gradients kept for Gram matrices and weight-gradients.
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
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.enable_grad():
        live = trajectory.bind(*(fake.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs))
        runs = []
        kept = _Kept()
        for stage in trajectory.stages:
            run = _StageRun(stage.player, live, kept)
            live = run.forward(stage.run)
            runs.append(run)
        return tuple(run.costs(samples, counting) for run in runs)


class _Kept:
    """Storages that autograd keeps, each counted where it is first kept."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.same_as: dict[int, int] = {}
        self.held: list[Tensor] = []  # so that a storage's address is not used again

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy that counts as the same storage."""
        copy = tensor.clone()
        self.same_as[copy.untyped_storage()._cdata] = self._key(tensor)
        self.held += [tensor, copy]
        return copy

    def new_bytes(self, tensor: Tensor) -> int:
        """The bytes of a tensor's storage, where it is kept for the first time."""
        if not isinstance(tensor, FakeTensor) or self._key(tensor) in self.seen:  # parameters are not fake
            return 0
        self.seen.add(self._key(tensor))
        self.held.append(tensor)
        return tensor.untyped_storage().nbytes()

    def _key(self, tensor: Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        return self.same_as.get(key, key)


class _StageRun:
    """One stage, run on tensors without data, and what its player's code needs of that."""

    def __init__(self, player: Player, before: tuple[LiveValue, ...], kept: _Kept) -> None:
        self.player, self.kept = player, kept
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
        live = tuple(self.kept.copy_of(v) if isinstance(v, Tensor) and v.requires_grad else v for v in self.before)
        handles = [module.register_forward_hook(self._seen(name)) for name, module in self.player.modules.items()]
        try:
            with FlopCounterMode(display=False) as counter, saved_tensors_hooks(self._keep, lambda kept: kept):
                self.after = run(live)
        finally:
            for handle in handles:
                handle.remove()
        self.forward_work = float(counter.get_total_flops())
        return self.after

    def _seen(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0], output

        return hook

    def _keep(self, tensor: Tensor) -> Tensor:
        self.kept_bytes += self.kept.new_bytes(tensor)
        return tensor

    def costs(self, samples: int, counting: Counting) -> StageCosts:
        captured_bytes, gram, weight, statistics, factor_bytes = 0, 0.0, 0.0, 0.0, 0
        group = counting.recursion_samples or samples
        for name, module in self.player.modules.items():
            inputs = prepare(module, self.inputs[name].detach())
            slopes = self.outputs[name].detach()
            part = sample_gradients(module, inputs, slopes)
            captured_bytes += inputs.nbytes + slopes.nbytes * (1 if counting.rows == 1 else 1 + counting.rows)
            weight += _count(lambda part=part: part.weighted(torch.empty(samples)))  # type: ignore[misc]
            rows = sample_gradients(
                module, _resized(inputs, group * counting.rows), _resized(slopes, group * counting.rows)
            )
            gram += _count(lambda rows=rows: _gram(rows, counting)) * samples / group  # type: ignore[misc]
            if counting.metric in ("kfac", "ekfac") and is_affine(module):
                more, bytes_ = _factor_costs(cast(AffineGradients, part), counting)
                statistics += more
                factor_bytes += bytes_
        # One recursion: two products and a solution of a linear system of as many unknowns as rows, if full.
        n = group * counting.rows
        sweep = (2 / 3 + 2 + 2 * (2 if counting.full_value else 0)) * n**3
        return StageCosts(
            player=self.player.name,
            samples=samples,
            forward=self.forward_work,
            backward=self._backward(),
            gram=gram,
            sweep=sweep * samples / group,
            feedback=2.0 * n * n * samples / group,
            weight=weight,
            statistics=statistics,
            live_bytes=sum(value.nbytes for value in self.before if isinstance(value, Tensor)),
            gradient_bytes=sum(tensor.nbytes for _, tensor in floating_tensors(self.before)),
            parameter_bytes=sum(p.nbytes for p in self.player.controls().values()),
            factor_bytes=factor_bytes,
            kept_bytes=self.kept_bytes,
            captured_bytes=captured_bytes,
        )

    def _backward(self) -> float:
        """Gradients of the stage's live tensors and of its layers' outputs, not of its parameters."""
        ends = [tensor for _, tensor in floating_tensors(self.after) if tensor.requires_grad]
        wanted = [tensor for _, tensor in floating_tensors(self.before) if tensor.requires_grad]
        wanted += [output for output in self.outputs.values() if output.requires_grad]
        if not ends or not wanted:
            return 0.0
        slopes = [torch.empty_like(end) for end in ends]
        return _count(lambda: torch.autograd.grad(ends, wanted, slopes, retain_graph=True, allow_unused=True))


def _count(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _resized(tensor: Tensor, samples: int) -> Tensor:
    return tensor.new_empty((samples, *tensor.shape[1:]))


def _gram(part: SampleGradients, counting: Counting) -> Tensor:
    """The Gram matrix by the way that the metric takes."""
    if counting.metric == "number":
        return part.gram(dict.fromkeys(part.controls, 1.0))
    if counting.metric == "diagonal" or not isinstance(part, AffineGradients):
        return part.gram({name: torch.empty(p.shape) for name, p in part.controls.items()})
    layer = _coordinates(part, counting)
    if counting.metric == "kfac":
        return outer_product_gram(*layer.positions(part))
    grads = layer.per_sample(part)
    return grads.flatten(1) @ grads.flatten(1).mT


def _coordinates(part: AffineGradients, counting: Counting) -> Coordinates:
    layout = Layout.of(part.module)
    by_channel = counting.factors == "spatially_uncorrelated"
    G, n = layout.groups, layout.channels if by_channel else layout.inputs
    inputs = InputSide(torch.empty(G, n, n), layout, by_channel)
    return Coordinates(
        inputs, torch.empty(G, layout.outputs, layout.outputs), torch.empty(G, layout.outputs, layout.inputs)
    )


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
        work += _count(lambda: layer.per_sample(part)) / counting.factor_every
    n, O = layout.channels if by_channel else layout.inputs, layout.outputs  # noqa: E741
    decompositions = 9.0 * layout.groups * (n**3 + O**3)  # a symmetric eigendecomposition with vectors
    numbers = layout.groups * (n * n + O * O)
    return work + decompositions / (counting.basis_every * counting.n_micro), 4 * numbers


# ----------------------------------------------------------------------------------------------------------
# Cuts


def balanced_cuts(costs: Sequence[StageCosts], pipe: int) -> tuple[int, ...]:
    """First stage of every segment but the first: the largest work of a segment is as small as can be.

    Of cuts that are equal in that, those whose messages are smallest.

    Raises:
        UserError: more segments than stages.
    """
    stages = len(costs)
    _check_pipe(pipe, stages)
    before = [0.0, *accumulate(cost.work for cost in costs)]
    # smallest[i]: the least possible largest segment of stages 0 to i - 1, in as many segments as so far.
    smallest = list(before)
    for segments in range(2, pipe + 1):
        smallest = [
            min((max(smallest[j], before[i] - before[j]) for j in range(segments - 1, i)), default=float("inf"))
            for i in range(stages + 1)
        ]
    limit = smallest[stages] * (1 + 1e-12)  # the same sums, added up in another order
    # Among segments within the limit: the least bytes over all cuts.
    infinite = float("inf")
    ways: list[tuple[float, tuple[int, ...]]] = [
        (0.0, ()) if i and before[i] <= limit else (infinite, ()) for i in range(stages + 1)
    ]
    for segments in range(2, pipe + 1):
        ways = [
            min(
                (
                    (ways[j][0] + costs[j].live_bytes + costs[j].gradient_bytes, (*ways[j][1], j))
                    for j in range(segments - 1, i)
                    if before[i] - before[j] <= limit
                ),
                default=(infinite, ()),
            )
            for i in range(stages + 1)
        ]
    return ways[stages][1]


def check_cuts(cuts: Sequence[int], pipe: int, stages: int) -> None:
    """Refuses cuts that do not make `pipe` segments of that many stages.

    Raises:
        UserError: names the cuts and the choices.
    """
    _check_pipe(pipe, stages)
    listed = ", ".join(map(str, cuts))
    if len(cuts) != pipe - 1:
        raise UserError(f"parallel.cuts=[{listed}]: {pipe} segments need {pipe - 1} cuts")
    missing = [cut for cut in cuts if not 1 <= cut < stages]
    if missing:
        named = ", ".join(map(str, missing))
        raise UserError(
            f"parallel.cuts=[{listed}]: {named} is no stage that a segment can begin with; the network has {stages} "
            f"stages, so take 1 to {stages - 1}"
        )
    if list(cuts) != sorted(set(cuts)):
        raise UserError(f"parallel.cuts=[{listed}]: expected stages in increasing order, each once")


def _check_pipe(pipe: int, stages: int) -> None:
    if pipe < 1:
        raise UserError(f"parallel.pipe={pipe}: expected at least one segment")
    if pipe > stages:
        raise UserError(
            f"parallel.pipe={pipe}: more ranks than stages; the network has {stages} stages, so take at most {stages} "
            "segments and spend the other ranks on parallel.data"
        )


def segment_costs(
    costs: Sequence[StageCosts], cuts: Sequence[int], shape: StepShape, counting: Counting, speed: float = 1.0
) -> list[RankCosts]:
    """What every pipeline rank's work takes.

    Args:
        costs: of all stages, for one micro-batch.
        cuts: first stage of every segment but the first.
        shape: of the step: what is done by micro-batch, and what once.
        counting: the optimizer's part, as the stages were counted with.
        speed: units of work that a rank does in a second; 1 for costs in seconds.

    Raises:
        UserError: cuts that do not exist.
    """
    check_cuts(cuts, shape.pipe, len(costs))
    bounds = [0, *cuts, len(costs)]
    units = shape.n_micro if shape.by == "step" else 1  # micro-batches of a recursion unit
    samples = costs[0].samples
    values = _NUMBER * counting.value_numbers(samples) * units if shape.feedback else 0.0
    phis = _NUMBER * samples * counting.rows * units if shape.feedback else 0.0
    ranks = []
    for index in range(shape.pipe):
        own = costs[bounds[index] : bounds[index + 1]]
        live = costs[bounds[index + 1]].live_bytes if index + 1 < shape.pipe else 0
        back = own[0].gradient_bytes if index else 0
        seconds = {
            name: sum(getattr(stage, name) for stage in own) / speed
            for name in ("forward", "backward", "gram", "sweep", "feedback", "weight", "statistics")
        }
        plain = not shape.feedback or not counting.absorbed
        nonlinear = shape.feedback and shape.rollout == "nonlinear"
        linear = shape.feedback and shape.rollout == "linear"
        parameters = sum(stage.parameter_bytes for stage in own)
        factor_bytes = sum(stage.factor_bytes for stage in own)
        again = seconds["forward"] + seconds["feedback"] + seconds["weight"]
        ranks.append(
            RankCosts(
                forward=seconds["forward"],
                backward=seconds["backward"] + (seconds["weight"] if plain else 0.0),
                cotangent=seconds["backward"] * counting.rows if shape.cotangents else 0.0,
                gram=seconds["gram"] * units if shape.feedback else 0.0,
                sweep=seconds["sweep"] * units if shape.feedback else 0.0,
                feedback=seconds["feedback"] * units if linear else 0.0,
                weight=seconds["weight"] * units if linear else 0.0,
                statistics=seconds["statistics"] * shape.n_micro,
                rollout=again * shape.n_micro if nonlinear else 0.0,
                activation_bytes=live,
                gradient_bytes=back,
                cotangent_bytes=back * counting.rows if shape.cotangents else 0.0,
                value_bytes=values if index else 0.0,
                feedback_bytes=phis if linear and index + 1 < shape.pipe else 0.0,
                state_bytes=live * shape.n_micro if nonlinear else 0.0,
                parameter_bytes=parameters,
                optimizer_bytes=parameters * counting.state_per_parameter + 2 * factor_bytes,
                statistics_bytes=factor_bytes,
                kept_bytes=sum(stage.kept_bytes for stage in own),
                captured_bytes=sum(stage.captured_bytes for stage in own) if shape.feedback else 0.0,
            )
        )
    return ranks


# ----------------------------------------------------------------------------------------------------------
# Cost files

FORMAT = "gtddp-costs"
VERSION = 1

WorkUnit = Literal["operations", "seconds"]


@dataclass(frozen=True)
class CostFile:
    """What a cost file says.

    Attributes:
        unit: of all work: counted "operations", or measured "seconds".
        stages: all stages of the network, in order.
    """

    unit: WorkUnit
    stages: tuple[StageCosts, ...]


def write_costs(path: Path, stages: Sequence[StageCosts], unit: WorkUnit) -> None:
    """Writes a cost file, whole or not at all."""
    rows = [{item.name: getattr(stage, item.name) for item in fields(StageCosts)} for stage in stages]
    content = {"format": FORMAT, "version": VERSION, "unit": unit, "stages": rows}
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def read_costs(path: Path) -> CostFile:
    """Reads a cost file strictly.

    Raises:
        UserError: the file cannot be read, is no cost file of this version, or has a key too many, too few, or with a
            value of another kind; names file and key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from error
    top = _mapping(path, content, "the file", ("format", "version", "unit", "stages"))
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if top[key] != expected or isinstance(top[key], bool):
            raise UserError(f"{path}: {key} is {top[key]!r}, expected {expected!r}")
    unit = top["unit"]
    if unit not in ("operations", "seconds"):
        raise UserError(f"{path}: unit is {unit!r}, expected 'operations' or 'seconds'")
    if not isinstance(top["stages"], list) or not top["stages"]:
        raise UserError(f"{path}: stages: expected a list of at least one stage")
    stages = tuple(_stage(path, row, f"stages[{index}]") for index, row in enumerate(top["stages"]))
    if len({stage.samples for stage in stages}) > 1:
        raise UserError(f"{path}: samples: expected the same number in every stage")
    return CostFile(cast(WorkUnit, unit), stages)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _mapping(path: Path, value: object, where: str, keys: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where}: expected an object with the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise UserError(f"{path}: {where}: unknown key {key!r}; expected {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise UserError(f"{path}: {where}: missing key {key!r}")
    return cast(Mapping[str, object], value)


def _stage(path: Path, value: object, where: str) -> StageCosts:
    row = _mapping(path, value, where, [item.name for item in fields(StageCosts)])
    for item in fields(StageCosts):
        found = row[item.name]
        kind = {"str": "a text", "int": "a whole number >= 0", "float": "a number >= 0"}[str(item.type)]
        allowed = {"str": str, "int": int, "float": (int, float)}[str(item.type)]
        number = isinstance(found, int | float)
        least = 1 if item.name == "samples" else 0
        if isinstance(found, bool) or not isinstance(found, allowed) or (number and not least <= found < float("inf")):  # type: ignore[operator, arg-type]
            raise UserError(f"{path}: {where}.{item.name} is {found!r}, expected {kind}")
    return StageCosts(**row)  # type: ignore[arg-type]
