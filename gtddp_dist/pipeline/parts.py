"""What a run on several ranks is made of, built from its configuration."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from .. import __version__, schedule
from ..build import plain_parts
from ..config_schema import Config
from ..data import DataSet, network_input
from ..data.batches import BatchOrder
from ..diagnostics import Totals, figures
from ..environment import prepare_cpu
from ..errors import UserError
from ..launch import Ranks, StopRequest
from ..optimizer import GTDDP
from ..parts import Parts, build_model, load_data, new_optimizer_of
from ..results import config_hash
from ..team import Team
from ..tracing import trace
from ..training_state import Progress, TrainingState
from ..training_step import Precision, StepResult
from ..trajectory import Trajectory
from ..watchdog import Witness
from .company import Company, Place, company
from .costs import Expected, balanced_cuts, check_cuts
from .grid import Grid, Shape
from .initialize import Engine
from .plan import describe, expected, stage_costs
from .segment import check_segments


@dataclass(frozen=True)
class Prepared:
    """What every rank makes by itself before it meets the others: the same everywhere."""

    data: DataSet
    model: nn.Module
    trajectory: Trajectory
    cuts: tuple[int, ...]
    expected: Expected


def prepare(config: Config, cuts: Sequence[int] | None = None) -> Prepared:
    """The whole network on the host, its stages, and where it is cut.

    Args:
        config: of the run.
        cuts: those of an earlier start of the run; None: as the configuration says.

    Raises:
        UserError: a network that cannot be cut so, or not taken at all.
    """
    prepare_cpu(config.train.threads)
    data = load_data(config)
    BatchOrder(len(data.train_labels), config.train.batch_size, config.train.seed)  # refuses a batch that is too large
    torch.manual_seed(config.train.seed)
    precision = Precision(config.train.dtype, torch.device("cpu"))
    model = build_model(config, data, precision)
    trajectory = trace(model, **plain_parts(model, config), projection=config.optimizer.projection or "cooperative")
    pipe = config.parallel.pipe
    chosen = config.parallel.cuts if cuts is None else cuts
    twin = copy.deepcopy(model).to("meta")  # an optimizer's hooks must not see the counting
    subject = describe(config, twin, trajectory, data.classes)
    stages, unit = stage_costs(config, subject, data.train_images.shape[1:], precision)
    if chosen is None:
        chosen = balanced_cuts(stages, pipe)
    check_cuts(chosen, pipe, len(trajectory.stages))
    check_segments(model, trajectory, chosen)
    return Prepared(data, model, trajectory, tuple(chosen), expected(config, subject, stages, unit, chosen))


@contextmanager
def met(
    config: Config, ranks: Ranks, stop: StopRequest, cuts: Sequence[int] | None, advice: str
) -> Iterator[RankBuilder]:
    """The ranks of a run while the block runs, once all are there and agree."""
    shape = Shape(config.parallel.pipe, config.parallel.data)
    problem, prepared = "", None
    try:
        prepared = prepare(config, cuts)
    except UserError as error:
        problem = str(error)
    where = None if config.train.device == "auto" else torch.device(config.train.device)
    backend = None if config.parallel.backend == "auto" else config.parallel.backend
    known = prepared.cuts if prepared else tuple(range(1, shape.pipe))
    stages = len(prepared.trajectory.stages) if prepared else shape.pipe
    place = Place(ranks, shape, known, stages, where, backend)
    facts = {
        "gtddp-dist": __version__,
        "torch": torch.__version__,
        "grid": str(shape),
        "configuration": config_hash(config),
        "cuts": json.dumps(list(known)),
        "costs": prepared.expected.digest() if prepared else "",  # a measured cost file is each host's own
    }
    lost_after_s = config.parallel.lost_after_s
    together = company(place, facts, problem=problem, advice=advice, lost_after_s=lost_after_s, stop=stop)
    with together as grid:
        assert prepared is not None
        yield RankBuilder(together, grid, prepared)


class RankBuilder:
    """Builds the parts of runs on a grid: the first from what was prepared to meet, later ones anew."""

    def __init__(self, together: Company, grid: Grid, prepared: Prepared) -> None:
        self.team: Team = grid
        self.layout: tuple[int, ...] | None = prepared.cuts
        self.witness: Witness = together
        self._together, self._grid = together, grid
        self._prepared: Prepared | None = prepared

    def prepare_for_loss(self, advice: str, note: Callable[[str], None]) -> None:
        """Once a rank is lost, from now on: `advice` says what to do, and `note` is called with who it was."""
        self._together.prepare_for_loss(advice, note)

    def build(self, config: Config) -> Parts:
        """Parts of a run at its start."""
        prepared, self._prepared = self._prepared or prepare(config, self.layout), None
        return build_on(self._grid, config, prepared)


@dataclass(frozen=True)
class RankParts(Parts):
    """Parts of a run on this rank: its segment of the network, its replica's share of the batches."""

    engine: Engine | None = None

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def validate(self) -> dict[str, float]:
        grid, data, size = self._engine.grid, self.data, self.config.eval.batch_size
        mine = itertools.islice(data.validation_batches(size), grid.replica, None, grid.shape.data)
        measured = self._engine.evaluate((network_input(x, self.precision.dtype), y) for x, y in mine)
        return {f"val/{name}": value for name, value in measured.items()}

    def diagnostics(self, images: Tensor, labels: Tensor, loss: float) -> dict[str, float]:
        if not isinstance(self.optimizer, GTDDP):
            return {}
        own = dataclasses.astuple(self._engine.worker.facts.totals())
        told = figures(Totals.joined(Totals(*numbers) for numbers in self._engine.grid.gather(own)))
        ages = self.optimizer.ages()  # the same names in every segment
        oldest = [max(column) for column in zip(*self._engine.grid.gather(list(ages.values())), strict=True)]
        told |= dict(zip(ages, oldest, strict=True))
        told["skipped_steps"] = float(self.optimizer.skipped_steps)
        if "predicted_decrease" in told:
            told["actual_decrease"] = loss - self.step.loss_now(images, labels)
        return {f"gtddp/{name}": value for name, value in told.items()}

    def resources(self, steps: int) -> dict[str, float]:
        worker, grid = self._engine.worker, self._engine.grid
        busy, idle, sent = worker.take_measurements()
        memory = (
            torch.cuda.max_memory_allocated(grid.device)
            if grid.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        told: dict[str, float] = {}
        names = ("busy_s", "idle_s", "sent_mb", "memory_mb")
        every = grid.gather([busy / steps, idle / steps, sent / steps / 1e6, memory / 1e6])
        for rank, numbers in enumerate(every):
            told |= {f"rank-{rank}/{name}": number for name, number in zip(names, numbers, strict=True)}
        return told


class RankStep:
    """A training step of all ranks; each takes its own part of the batch."""

    def __init__(self, engine: Engine, precision: Precision) -> None:
        self._engine, self._precision = engine, precision

    def __call__(self, images: Tensor, labels: Tensor) -> StepResult:
        outcome = self._engine.step(*self._own(images, labels))
        return StepResult(outcome.loss, outcome.correct, outcome.refused, outcome.source)

    def loss_now(self, images: Tensor, labels: Tensor) -> float:
        total, _ = self._engine.worker.forward_only(*self._own(images, labels), training=True)
        return sum(numbers[0] for numbers in self._engine.grid.gather([total])) / len(labels)

    def _own(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """This replica's micro-batches: replica by replica, as one process cuts the batch."""
        grid, n = self._engine.grid, self._engine.n_micro
        mine = slice(grid.replica * n, (grid.replica + 1) * n)
        chunks = n * grid.shape.data
        inputs = [network_input(x, self._precision.dtype) for x in images.chunk(chunks)[mine]]
        return inputs, list(labels.chunk(chunks)[mine])


def build_on(grid: Grid, config: Config, prepared: Prepared) -> RankParts:
    """This rank's part of a run at its start."""
    precision = Precision(config.train.dtype, grid.device)
    # The first segment reads images, the last one labels.
    data = prepared.data if grid.segment == 0 else prepared.data.without_images()
    if grid.segment in (0, grid.shape.pipe - 1):
        data = data.to(grid.device)
    order = BatchOrder(len(data.train_labels), config.train.batch_size, config.train.seed)
    total_steps = config.train.steps or config.train.epochs * order.steps_per_epoch
    parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    scaler = precision.new_scaler()
    new_optimizer = new_optimizer_of(config)
    engine = Engine(
        prepared.model.to(grid.device),
        prepared.trajectory,
        lambda segment: new_optimizer(segment, config),
        F.cross_entropy,
        grid=grid,
        cuts=prepared.cuts,
        micro_batch=_micro_batch(config),
        n_micro=config.train.micro_batches,
        clip_norm=config.train.clip_norm,
        autocast=precision.autocast,
        scaler=scaler,
        sync_batch_norm=config.parallel.sync_batch_norm,
        zero=config.parallel.zero,
        expected=prepared.expected,
    )
    if grid.rank > 0:  # other dropout masks in every rank; rank 0 goes on where making the network left off
        torch.manual_seed(int(np.random.SeedSequence([config.train.seed, grid.rank]).generate_state(1)[0]))
    scheduler = LambdaLR(engine.optimizer, lambda step: schedule.factor(config.schedule, step, total_steps))
    return RankParts(
        config=config,
        data=data,
        model=engine.segment,
        optimizer=engine.optimizer,
        scheduler=scheduler,
        step=RankStep(engine, precision),
        state=TrainingState(engine.segment, engine.optimizer, scheduler, scaler, Progress(), grid),
        precision=precision,
        order=order,
        total_steps=total_steps,
        parameters=parameters,
        team=grid,
        engine=engine,
    )


def _micro_batch(config: Config) -> int:
    return config.train.batch_size // (config.train.micro_batches * config.parallel.data)
