"""`gtddp plan`: how long a step on a grid takes, who waits, what is sent and kept; without a rank being started."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from ..build import base_optimizer, gtddp_optimizer, plain_parts
from ..config_schema import Config
from ..curvature import EKFAC, KFAC, SGD, Curvature
from ..curvature.base import Controls
from ..curvature.kronecker import KroneckerCurvature
from ..errors import OK, UserError
from ..optimizer import GTDDP
from ..parts import build_model, load_data
from ..tracing import trace
from ..training_step import Precision
from ..trajectory import Trajectory
from .costs import (
    Counting,
    Expected,
    Metric,
    StageCosts,
    WorkUnit,
    balanced_cuts,
    check_cuts,
    count_stages,
    link_of,
    read_costs,
    segment_costs,
    speed_of,
)
from .order import StepShape, one_forward_one_backward, rank_orders, step_shape, zero_bubble
from .simulate import Link, RankCosts, Timeline, simulate
from .timeline import plot_timelines


@dataclass(frozen=True)
class Plan:
    """A planned step and what it is to be compared with.

    Attributes:
        cuts: first stage of every segment but the first.
        shape: of the step.
        link: between ranks.
        data: replicas.
        costs: of every pipeline rank.
        step: the step itself.
        instant: the same with messages that take no time: what they cost is the difference.
        doubled: the same with twice 1F1B's number of micro-batches in flight.
        one_forward_one_backward: the base optimizer's step as 1F1B, with the same cuts.
        zero_bubble: the same with weight-gradients put off.
    """

    cuts: tuple[int, ...]
    shape: StepShape
    link: Link
    data: int
    costs: tuple[RankCosts, ...]
    step: Timeline
    instant: Timeline
    doubled: Timeline
    one_forward_one_backward: Timeline
    zero_bubble: Timeline


def plan_step(
    stages: Sequence[StageCosts],
    shape: StepShape,
    counting: Counting,
    link: Link,
    *,
    speed: float,
    data: int = 1,
    cuts: Sequence[int] | None = None,
    base_cotangents: bool = False,
) -> Plan:
    """Plans a step of counted or measured stages.

    Args:
        stages: costs of all stages for one micro-batch.
        shape: of the step.
        counting: the optimizer's part, as the stages were counted with.
        link: between ranks.
        speed: units of work that a rank does in a second; 1 for costs in seconds.
        data: replicas.
        cuts: first stage of every segment but the first; None: balanced.
        base_cotangents: whether the base optimizer back-propagates a second stream, too.

    Raises:
        UserError: cuts that do not exist, more ranks than stages.
    """
    if cuts is None:
        cuts = balanced_cuts(stages, shape.pipe)
    check_cuts(cuts, shape.pipe, len(stages))
    costs = segment_costs(stages, cuts, shape, counting, speed)
    instant = Link(math.inf, 0.0)
    base = StepShape(shape.pipe, shape.n_micro, feedback=False, cotangents=base_cotangents)
    fused = segment_costs(stages, cuts, base, counting, speed)
    apart = _weights_apart(stages, cuts, fused, speed)
    size = (shape.pipe, shape.n_micro)
    return Plan(
        cuts=tuple(cuts),
        shape=shape,
        link=link,
        data=data,
        costs=tuple(costs),
        step=simulate(rank_orders(shape, costs, link), costs, link, data),
        instant=simulate(rank_orders(shape, costs, instant), costs, instant, data),
        doubled=simulate(rank_orders(shape, costs, link, in_flight=2), costs, link, data),
        one_forward_one_backward=simulate(
            one_forward_one_backward(*size, fused, link, cotangents=base_cotangents), fused, link, data
        ),
        zero_bubble=simulate(zero_bubble(*size, apart, link, cotangents=base_cotangents), apart, link, data),
    )


def _weights_apart(
    stages: Sequence[StageCosts], cuts: Sequence[int], fused: Sequence[RankCosts], speed: float
) -> list[RankCosts]:
    """A base optimizer's costs with its weight-gradients as work of their own."""
    bounds = [0, *cuts, len(stages)]
    apart = []
    for index, cost in enumerate(fused):
        own = stages[bounds[index] : bounds[index + 1]]
        weight = sum(stage.weight for stage in own) / speed
        captured = sum(stage.captured_bytes for stage in own)
        apart.append(
            dataclasses.replace(cost, backward=max(cost.backward - weight, 0.0), weight=weight, captured_bytes=captured)
        )
    return apart


# ----------------------------------------------------------------------------------------------------------
# From a configuration


@dataclass(frozen=True)
class Subject:
    """What a configuration plans.

    Attributes:
        trajectory: of its network.
        shape: of its step.
        counting: its optimizer's part.
        samples: of a micro-batch.
        base_cotangents: whether its base optimizer back-propagates a second stream.
    """

    trajectory: Trajectory
    shape: StepShape
    counting: Counting
    samples: int
    base_cotangents: bool


def describe(config: Config, model: nn.Module, trajectory: Trajectory, classes: int) -> Subject:
    """The step that a configuration asks for.

    Args:
        config: whose optimizer and grid are planned.
        model: the network; an optimizer is attached to it.
        trajectory: of a network like it, which the optimizer does not know.
        classes: of the data set: cotangents a sample with terminal="exact".
    """
    train, parallel = config.train, config.parallel
    n_micro = train.micro_batches * train.replica_groups
    samples = train.batch_size // (n_micro * parallel.data)
    name = config.optimizer.name
    if name in ("sgd", "rmsprop", "adam", "adamw"):
        optimizer = base_optimizer(model, config)
        state = _state_per_parameter(optimizer.param_groups[0], name)
        shape = StepShape(parallel.pipe, n_micro, feedback=False)
        return Subject(
            trajectory, shape, Counting(feedback=False, state_per_parameter=state, n_micro=n_micro), samples, False
        )
    optimizer = gtddp_optimizer(model, config)
    options, curvature = optimizer.options, optimizer.curvature
    if options.recompute:
        raise UserError("optimizer.recompute=true is not offered on ranks, which are what is planned here: take false")
    sampled_factors = curvature.stream != "gradient"
    shape = step_shape(
        parallel.pipe,
        n_micro,
        feedback=options.feedback,
        scope=options.scope,
        rollout=options.rollout,
        metric_known=options.metric == "previous" or not curvature.adaptive,
        clipped=options.clip_norm is not None,
        value_statistics=options.statistics == "value",
        cotangents=sampled_factors or (options.feedback and options.stream != "gradient"),
    )
    group = None
    if options.scope == "batch":
        group = samples * train.micro_batches
    elif options.scope != "micro_batch":
        group = int(options.scope)
    weighted = options.capture == "weighted"
    counting = Counting(
        feedback=options.feedback,
        metric=_metric(curvature),
        recursion_samples=group,
        rows=classes if options.feedback and options.terminal == "exact" else 1,
        full_value=options.value_hessian == "batch",
        weight_in_backward=not weighted,
        weight_products=2 if weighted and not _absorbs(optimizer) else 1,
        state_per_parameter=_state_per_parameter(optimizer.param_groups[0], type(curvature).__name__.lower()),
        n_micro=n_micro,
    )
    if isinstance(curvature, KroneckerCurvature):
        counting = dataclasses.replace(
            counting,
            factors=curvature.factors,
            factor_every=curvature.factor_every,
            basis_every=curvature.basis_every,
            basis_work=curvature.basis_work,
        )
    return Subject(trajectory, shape, counting, samples, sampled_factors)


def _metric(curvature: Curvature) -> Metric:
    if isinstance(curvature, EKFAC):
        return "ekfac"
    if isinstance(curvature, KFAC):
        return "kfac"
    return "number" if isinstance(curvature, SGD) else "diagonal"


def _absorbs(optimizer: GTDDP) -> bool:
    """Whether one weighted gradient serves base step and correction of every player."""
    options = optimizer.options
    controls = Controls({}, {}, {str(i): group for i, group in enumerate(optimizer.param_groups)}, None)
    return (
        options.clip_norm is None
        and options.stream == "gradient"
        and optimizer.curvature.absorbs_correction(controls, options.momentum_of)
    )


def _state_per_parameter(group: Mapping[str, object], name: str) -> float:
    """Numbers of optimizer state a parameter, besides Kronecker factors."""
    extra = sum(bool(group.get(option)) for option in ("momentum", "centered", "amsgrad"))
    return extra + {"rmsprop": 1, "adam": 2, "adamw": 2}.get(name, 0)


def run_plan(config: Config, config_name: str, out: Path | None) -> int:
    """Prints what a step of a configuration takes on its grid, and draws it.

    Args:
        config: whose groups parallel and plan say the grid and the machine.
        config_name: for the heading, and for the picture's name where there is no other.
        out: the picture to write; None: <config_name>-plan.png here.

    Returns:
        The exit code.

    Raises:
        UserError: more ranks than stages, cuts that do not exist, a cost file that does not fit.
    """
    out = out if out is not None else Path(f"{config_name}-plan.png")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{out}: a timeline is written as .png, .svg or .pdf")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")
    # The work does not depend on where it is done: shapes and types are those of the CPU.
    precision = Precision(config.train.dtype, torch.device("cpu"))
    data = load_data(config)
    model = build_model(config, data, precision)
    plain = plain_parts(model, config)
    trajectory = trace(model, **plain, projection=config.optimizer.projection or "cooperative")
    subject = describe(config, build_model(config, data, precision), trajectory, data.classes)
    stages, unit = stage_costs(config, subject, data.train_images.shape[1:], precision)
    plan = plan_step(
        stages,
        subject.shape,
        subject.counting,
        link_of(config.plan),
        speed=speed_of(config.plan, unit),
        data=config.parallel.data,
        cuts=config.parallel.cuts,
        base_cotangents=subject.base_cotangents,
    )
    name = config.optimizer.name
    grid = f"pipe={config.parallel.pipe},data={config.parallel.data}"
    source = (
        f"measured, {config.plan.costs}" if unit == "seconds" else f"counted, {config.plan.tflops:g} TFLOP/s a rank"
    )
    print(f"{name} on {config.model.name}, {len(stages)} stages, grid {grid}")
    print(
        f"batch {config.train.batch_size}: {subject.shape.n_micro} micro-batches of {subject.samples} a replica; "
        f"recursion: {_regime(subject.shape)}"
    )
    print(f"work: {source}; links: {config.plan.bandwidth:g} GB/s, {config.plan.latency_us:g} us\n")
    print(report(plan, name))
    plot_timelines(
        out,
        {
            f"{name}: {_milliseconds(plan.step.seconds)}": plan.step,
            f"base optimizer, 1F1B: {_milliseconds(plan.one_forward_one_backward.seconds)}": (
                plan.one_forward_one_backward
            ),
        },
        f"One step of {config.model.name} on grid {grid}",
    )
    print(f"\ntimeline: {out}")
    return OK


def stage_costs(
    config: Config, subject: Subject, image: Sequence[int], precision: Precision
) -> tuple[tuple[StageCosts, ...], WorkUnit]:
    """The costs of a configuration's stages and their unit: from the file `plan.costs` names, or counted."""
    if config.plan.costs is None:
        with precision.autocast():
            images = torch.empty((subject.samples, *image), dtype=precision.dtype, device="meta")
            return count_stages(subject.trajectory, images, subject.counting), "operations"
    path = Path(config.plan.costs)
    file = read_costs(path)
    if len(file.stages) != len(subject.trajectory.stages):
        raise UserError(
            f"plan.costs: {path} has {len(file.stages)} stages, {config.model.name} as configured "
            f"{len(subject.trajectory.stages)}: take the costs of a run of this network"
        )
    if file.stages[0].samples != subject.samples:
        raise UserError(
            f"plan.costs: {path} is of micro-batches of {file.stages[0].samples} samples, the configuration has "
            f"{subject.samples}: adapt train.batch_size, train.micro_batches or parallel.data"
        )
    return file.stages, file.unit


def expected(
    config: Config, subject: Subject, stages: Sequence[StageCosts], unit: WorkUnit, cuts: Sequence[int]
) -> Expected:
    """What a configuration's step is expected to take on ranks, as `gtddp plan` shows it.

    Args:
        config: whose group plan says the machine.
        subject: its step.
        stages: its stages' costs.
        unit: of their work.
        cuts: first stage of every segment but the first.
    """
    costs = segment_costs(stages, cuts, subject.shape, subject.counting, speed_of(config.plan, unit))
    return Expected(tuple(costs), link_of(config.plan))


def _regime(shape: StepShape) -> str:
    if not shape.feedback:
        return "none"
    if shape.by == "micro_batch":
        return "by micro-batch, between backward passes"
    first = ", after the mean gradient of all replicas" if shape.mean_first else ""
    return f"by step, after all backward passes{first}; {shape.rollout} rollout"


# ----------------------------------------------------------------------------------------------------------
# Tables


def report(plan: Plan, name: str) -> str:
    """The tables of a plan; `name` is the optimizer's."""
    return "\n\n".join((_ranks(plan), _links(plan), _schedules(plan, name)))


def _ranks(plan: Plan) -> str:
    bounds = plan.cuts
    rows = []
    for rank, (work, busy, peak) in enumerate(zip(plan.step.work, plan.step.busy, plan.step.peak_bytes, strict=True)):
        first = bounds[rank - 1] if rank else 0
        last = f"{bounds[rank] - 1}" if rank < len(bounds) else "last"
        rows.append((rank, f"{first} to {last}", f"{1e3 * work:.3f}", f"{100 * busy:.1f}", f"{peak / 2**20:.1f}"))
    headers = ("pipe rank", "stages", "work (ms)", "busy (%)", "peak memory (MiB)")
    return tabulate(rows, headers, disable_numparse=True, colalign=("right", "left", "right", "right", "right"))


def _links(plan: Plan) -> str:
    """Megabytes a step of every link, and over those of plain back-propagation."""
    sent: dict[tuple[int, int], dict[str, float]] = {}
    for (source, target, kind), size in plan.step.link_bytes.items():
        sent.setdefault((source, target), {})[kind] = size
    plain: dict[tuple[int, int], float] = {}
    for (source, target, _), size in plan.one_forward_one_backward.link_bytes.items():
        plain[source, target] = plain.get((source, target), 0.0) + size
    rows = []
    for source, target in sorted(sent, key=lambda pair: (min(pair), pair)):
        kinds = sent[source, target]
        total = sum(kinds.values())
        listed = ", ".join(f"{kind} {size / 1e6:.4g}" for kind, size in kinds.items())
        ratio = total / plain[source, target] if plain.get((source, target)) else math.nan
        rows.append((f"{source} to {target}", listed, f"{total / 1e6:.3f}", f"{ratio:.4f}"))
    if plan.data > 1:
        for rank, cost in enumerate(plan.costs):
            size = 2 * (plan.data - 1) / plan.data * (cost.parameter_bytes + cost.statistics_bytes)
            rows.append((f"replicas of {rank}", "sum over the data axis", f"{size / 1e6:.3f}", ""))
    if not rows:
        return "one rank: nothing is sent"
    headers = ("link", "messages (MB a step)", "total (MB a step)", "over back-propagation")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", "right", "right"))


def _schedules(plan: Plan, name: str) -> str:
    rivals = (
        (name, plan.step),
        ("  if messages took no time", plan.instant),
        ("  with twice the micro-batches in flight", plan.doubled),
        ("base optimizer, 1F1B", plan.one_forward_one_backward),
        ("base optimizer, zero-bubble", plan.zero_bubble),
    )
    rows = [
        (
            label,
            f"{1e3 * timeline.seconds:.3f}",
            f"{1e3 * max(timeline.work):.3f}",
            f"{timeline.over_largest_work:.3f}",
            f"{timeline.seconds / plan.one_forward_one_backward.seconds:.3f}",
        )
        for label, timeline in rivals
    ]
    headers = ("schedule", "step (ms)", "largest work (ms)", "step / work", "step / 1F1B")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4), preserve_whitespace=True)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms a step"
