"""A model on a grid of ranks: `gtddp_dist.initialize`, and the engine that it and `gtddp train` use."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.optim import Optimizer

from .. import __version__
from ..checkpoint import CheckpointError, newest_agreed, set_aside
from ..checkpoint_writer import Writer
from ..config_schema import PlanConfig
from ..errors import OptionError, UserError
from ..launch import alone, discover, told_once
from ..optimizer import GTDDP
from ..tracing import Projection, trace
from ..training_state import Progress, TrainingState, attempt_name
from ..trajectory import Trajectory, from_stages
from .company import Company, Place, company
from .costs import (
    Counting,
    Expected,
    balanced_cuts,
    check_cuts,
    count_stages,
    link_of,
    segment_costs,
    speed_of,
)
from .grid import Backend, Grid, Shape
from .order import StepShape, rank_orders, step_shape
from .segment import check_segments
from .worker import LossFunction, Outcome, Worker

NewOptimizer = Callable[[nn.Module], Optimizer]
"""The segment of a rank -> its optimizer: a GTDDP on it, or one of torch.optim on its parameters."""


class Engine:
    """A model cut into segments over the ranks of a grid; every rank makes one.

    Args:
        model: the whole model, the same on every rank. It cannot be used afterwards: only the segment stays.
        trajectory: its stages.
        new_optimizer: makes the optimizer of this rank's segment.
        loss: mean loss of a micro-batch.
        grid: the ranks.
        cuts: first stage of every segment but the first.
        micro_batch: samples of a micro-batch.
        n_micro: micro-batches of a replica in a step.
        clip_norm: largest norm of the mean gradient, for an optimizer of torch.optim (a GTDDP has its own).
        autocast: the context of every forward pass.
        scaler: scales losses, for float16.
        zero: 1: replicas share out the state of an optimizer of torch.optim (ZeRO-1).
        expected: what the instructions of a step take, to put them in order by; None: all as long. Results do not
            depend on it.

    Attributes:
        segment: what this rank owns.
        optimizer: its optimizer.
        order: the instructions of a step.
        worker: carries them out, and measures them.
    """

    def __init__(
        self,
        model: nn.Module,
        trajectory: Trajectory,
        new_optimizer: NewOptimizer,
        loss: LossFunction,
        *,
        grid: Grid,
        cuts: Sequence[int],
        micro_batch: int,
        n_micro: int,
        clip_norm: float | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        scaler: torch.amp.GradScaler | None = None,
        sync_batch_norm: bool = False,
        zero: int = 0,
        expected: Expected | None = None,
    ) -> None:
        from .engine import PartitionedModel, new_engine, quiet  # deepspeed takes a second to import

        check_cuts(cuts, grid.shape.pipe, len(trajectory.stages))
        check_segments(model, trajectory, cuts)
        with quiet():
            partitioned = PartitionedModel(model, trajectory, cuts, grid)
        self.grid, self.cuts = grid, tuple(cuts)
        self.micro_batch, self.n_micro = micro_batch, n_micro
        self.segment = partitioned.segment
        if sync_batch_norm:
            from .batch_norm import synchronise

            synchronise(self.segment, grid)
        self.optimizer = new_optimizer(self.segment)
        if isinstance(self.optimizer, GTDDP):
            if self.optimizer.options.recompute:
                raise OptionError(
                    "recompute=True is not offered on ranks: take recompute=False; more micro-batches save memory "
                    "there, too"
                )
            if self.optimizer.options.gram_memory is not None:
                raise OptionError(
                    "gram_memory is not offered on ranks: take gram_memory=None, and a smaller micro-batch or scope"
                )
            self.optimizer.forms_early = "norms"  # what waits for no other rank is done when ranks wait
        if zero and grid.shape.data > 1:
            self.optimizer = shared_out(self.optimizer, grid)
        self.scaler = scaler
        self._engine = new_engine(
            partitioned, self.optimizer, micro_batch=micro_batch, n_micro=n_micro, replicas=grid.shape.data
        )
        self.shape = shape_of(self.optimizer, grid.shape.pipe, n_micro)
        self.worker = self._engine.worker = Worker(
            grid,
            self.segment,
            self.optimizer,
            loss,
            self.shape,
            micro_batch,
            clip_norm=clip_norm,
            autocast=autocast,
            loss_scale=(lambda: 1.0) if scaler is None else scaler.get_scale,
        )
        costs, link = (None, None) if expected is None else (expected.costs, expected.link)
        self.order = self._engine.order = rank_orders(self.shape, costs, link)[grid.segment]
        self._scale = None if scaler is None else _ScaleKeeper(scaler)
        self._writer: Writer | None = None
        self._company: Company | None = None
        self._writing_to: Path | None = None
        self.progress = Progress()

    def step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Outcome:
        """One step on this replica's micro-batches; what it came to is the same on every rank.

        Args:
            inputs: ``n_micro`` tensors of ``micro_batch`` samples; only the first segment reads them.
            targets: as many; only the last one reads them.

        Raises:
            CurvatureError: curvature factors are refused, on whichever rank.
        """
        outcome = self._engine.train_step(inputs, targets)
        if self._scale is not None:
            self._scale.update(refused=outcome.refused)
        self.progress.step += 1
        self.progress.skipped += int(outcome.refused)
        return outcome

    def train_batch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """One step on the next micro-batches of an iterator; the mean loss before it, over all samples.

        Args:
            batches: of this replica's own (input, target) micro-batches; the first and the last segment take
                ``n_micro`` of them, the others none. Only the first reads inputs, only the last one targets.

        Raises:
            UserError: a micro-batch has another number of samples than was said.
        """
        inputs, targets = [], []
        if self.worker.first or self.worker.last:
            for _ in range(self.n_micro):
                x, y = next(batches)
                if len(x) != self.micro_batch or len(y) != self.micro_batch:
                    raise UserError(
                        f"train_batch: a micro-batch of {len(x)} inputs and {len(y)} targets, initialize was told "
                        f"micro_batch={self.micro_batch}; drop the last partial batch (drop_last=True)"
                    )
                inputs.append(self._own_input(x))
                targets.append(self._own_target(y))
        return self.step(inputs, targets).loss

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Mean loss and accuracy in evaluation mode, over the batches of all replicas; the same on every rank.

        Args:
            batches: (input, target) of this replica; as many on all segments. Only the first segment reads inputs,
                only the last one targets.
        """
        pairs = [(self._own_input(x), self._own_target(y)) for x, y in batches]
        loss, correct = self.worker.forward_only([x for x, _ in pairs], [y for _, y in pairs], training=False)
        seen = float(sum(len(y) for _, y in pairs)) if self.worker.last else 0.0
        total = [sum(column) for column in zip(*self.grid.gather([loss, float(correct), seen]), strict=True)]
        return {"loss": total[0] / total[2], "accuracy": total[1] / total[2]}

    def _own_input(self, x: Tensor) -> Tensor:
        """On the rank's device where it reads it."""
        return x.to(self.grid.device) if self.worker.first else x

    def _own_target(self, y: Tensor) -> Tensor:
        return y.to(self.grid.device) if self.worker.last else y

    @property
    def training_state(self) -> TrainingState:
        """What a checkpoint holds of this rank."""
        return TrainingState(self.segment, self.optimizer, None, self.scaler, self.progress, self.grid)

    def save(self, directory: str | Path, keep: int = 2) -> None:
        """Write a checkpoint of this step, in the background; one that is still being written is waited for.

        Args:
            directory: of checkpoints, shared by all ranks.
            keep: how many of them stay.
        """
        directory = Path(directory)
        if self._writer is None or self._writing_to != directory:
            self._close_writer()
            self._writer = Writer(directory, self.grid.rank, self.grid.world, keep)
            self._writing_to = directory
        tensors, values, rank_values = self.training_state.collect()
        attempt = attempt_name(self.grid)
        self._writer.save(self.progress.step, tensors, values, rank_values=rank_values, attempt=attempt)

    def load(self, directory: str | Path) -> int:
        """Continue from the newest checkpoint that all ranks can use, of whichever grid; the number of its step.

        Raises:
            CheckpointError: there is none, or it is of another model or optimizer.
        """
        state = self.training_state
        checkpoint, refused = newest_agreed(Path(directory), state.wanted, self.grid.gather_text)
        if checkpoint is None:
            reasons = "".join(f"; {item.reason}" for item in refused)
            raise CheckpointError(f"{directory}: no checkpoint there can be used{reasons}")
        if self.grid.rank == 0:
            set_aside(refused)
        state.restore(checkpoint)
        return self.progress.step

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and leave the other ranks."""
        self._close_writer()
        if self._company is not None:
            self._company.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._company is not None:
            self._company.__exit__(kind, error, trace)


def initialize(
    model_fn: Callable[[], nn.Module],
    *,
    optimizer: NewOptimizer,
    micro_batch: int,
    sample: Tensor,
    pipe: int = 1,
    data: int = 1,
    n_micro: int = 1,
    loss: LossFunction = F.cross_entropy,
    cuts: Sequence[int] | None = None,
    stages: Callable[[nn.Module], Sequence[nn.Module]] | None = None,
    plain_modules: Collection[str] = (),
    plain_parameters: Collection[str] = (),
    projection: Projection = "cooperative",
    clip_norm: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: Backend | None = None,
    lost_after_s: float = 30.0,
) -> Engine:
    """Put a model on a grid of ranks, in a program that torchrun, mpirun or srun started (or in one process).

    Every rank calls it with the same arguments::

        with gtddp_dist.initialize(
            lambda: torchvision.models.resnet18(num_classes=100),
            optimizer=lambda model: GTDDP(model, curvature.SGD(lr=0.1), scope="micro_batch"),
            pipe=2, data=1, micro_batch=32, n_micro=4, sample=torch.zeros(32, 3, 32, 32),
        ) as engine:
            for _ in range(steps):
                loss = engine.train_batch(batches)

    Args:
        model_fn: makes the whole model, in host memory; with the seed set, so that all ranks make the same.
        optimizer: makes the optimizer of this rank's segment, which is given as a module.
        micro_batch: samples of a micro-batch.
        sample: an input of the model's shape and type; only those count. The cost of stages is counted with it, as of
            GT-DDP on SGD: cuts and the order of a step's work follow it.
        pipe: segments.
        data: replicas.
        n_micro: micro-batches of a replica in a step.
        loss: mean loss of a micro-batch.
        cuts: first stage of every segment but the first; None: balanced by counted cost.
        stages: the stages by hand, from the model; None: traced by torch.fx.
        plain_modules, plain_parameters, projection: as for :class:`GTDDP`.
        clip_norm: largest norm of the mean gradient, for an optimizer of torch.optim.
        seed: of the weights.
        device: None: the GPU with the local rank's number, where there is one, else the CPU.
        backend: None: nccl on GPUs, else gloo.
        lost_after_s: seconds without a sign of life after which a rank is taken for lost.

    Raises:
        UserError: not pipe x data ranks, more ranks than stages, cuts that do not exist, ranks that disagree, a forward
            pass that depends on training mode other than through modules. It says so on rank 0; the others raise its
            subclass ToldElsewhere.
    """
    shape = Shape(pipe, data)
    ranks = discover() or alone()
    if ranks.world != shape.world:
        raise told_once(
            UserError(
                f"initialize: the grid {shape} needs {shape.world} ranks, but {ranks.world} "
                f"{'was' if ranks.world == 1 else 'were'} started ({ranks.started_by}); start the program with "
                f"torchrun --nproc-per-node={shape.world}, mpirun -n {shape.world} or srun --ntasks={shape.world}"
            )
        )
    torch.manual_seed(seed)
    model = model_fn()
    try:
        trajectory = (
            trace(model, plain_modules, plain_parameters, projection)
            if stages is None
            else from_stages(model, stages(model), plain_modules, plain_parameters)
        )
        counted = count_stages(trajectory, sample[:micro_batch])
        if cuts is None:
            cuts = balanced_cuts(counted, pipe)
        check_cuts(cuts, pipe, len(trajectory.stages))
        check_segments(model, trajectory, cuts)
    except UserError as error:
        raise told_once(error) from error
    place = Place(ranks, shape, tuple(cuts), len(trajectory.stages), torch.device(device) if device else None, backend)
    expected = Expected(
        tuple(segment_costs(counted, cuts, StepShape(pipe, n_micro), Counting(), speed_of(PlanConfig(), "operations"))),
        link_of(PlanConfig()),
    )
    facts = {
        "gtddp-dist": __version__,
        "torch": torch.__version__,
        "grid": str(shape),
        "cuts": json.dumps(list(cuts)),
        "costs": expected.digest(),
    }
    joined = company(place, facts, lost_after_s=lost_after_s)
    grid = joined.__enter__()
    try:
        model.to(grid.device)
        engine = Engine(
            model,
            trajectory,
            optimizer,
            loss,
            grid=grid,
            cuts=cuts,
            micro_batch=micro_batch,
            n_micro=n_micro,
            clip_norm=clip_norm,
            expected=expected,
        )
    except BaseException as error:
        joined.__exit__(type(error), error, error.__traceback__)
        raise
    engine._company = joined
    return engine


def shared_out(optimizer: Optimizer, grid: Grid) -> Optimizer:
    """The same optimizer of torch.optim, each parameter's state and update in one replica (ZeRO-1).

    Raises:
        UserError: it is a GTDDP, whose sweep needs a layer's whole state in every replica.
    """
    if isinstance(optimizer, GTDDP):
        raise UserError("zero=1 is for optimizers of torch.optim: the metric of GT-DDP's sweep is made of the state")
    groups = [
        {"params": group["params"], **{k: v for k, v in group.items() if k != "params"}}
        for group in optimizer.param_groups
    ]
    return ZeroRedundancyOptimizer(
        groups, optimizer_class=type(optimizer), process_group=grid.replica_group, **optimizer.defaults
    )


def shape_of(optimizer: Optimizer, pipe: int, n_micro: int) -> StepShape:
    """What a step of this optimizer consists of."""
    if not isinstance(optimizer, GTDDP):
        return StepShape(pipe, n_micro, feedback=False)
    options = optimizer.options
    return step_shape(
        pipe,
        n_micro,
        feedback=options.feedback,
        scope=options.scope,
        rollout=options.rollout,
        metric_known=options.metric == "previous" or not optimizer.curvature.adaptive,
        clipped=options.clip_norm is not None,
        value_statistics=options.statistics == "value",
        cotangents=bool(optimizer.capture.cotangents),
    )


class _ScaleKeeper:
    """Moves a loss scale as GradScaler does, on every rank alike, from whether the step was refused."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler
        self._parameter = nn.Parameter(torch.zeros(1))
        self._optimizer = torch.optim.SGD([self._parameter], lr=0.0)

    def update(self, *, refused: bool) -> None:
        self._scaler.scale(torch.zeros(1))  # makes sure that its own state is there
        self._parameter.grad = torch.full((1,), float("inf") if refused else 0.0)
        self._scaler.unscale_(self._optimizer)
        self._scaler.step(self._optimizer)
        self._scaler.update()
