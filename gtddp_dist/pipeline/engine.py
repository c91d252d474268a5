"""DeepSpeed's PipelineEngine, which carries a pipeline with GT-DDP's instructions.

DeepSpeed brings the topology, the partitioned module and the loop over a schedule's instructions. The schedule is
`order`'s, and `worker` carries its instructions out.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import PipeInstruction
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn
from torch.optim import Optimizer

from ..trajectory import LiveValue, Trajectory
from .grid import Grid
from .instructions import Instruction
from .order import Order
from .segment import Segment
from .worker import Outcome, Worker


class PartitionedModel(PipelineModule):
    """A model cut into segments by DeepSpeed's own class; it holds this rank's."""

    def __init__(self, model: nn.Module, trajectory: Trajectory, cuts: Sequence[int], grid: Grid) -> None:
        self._cuts = tuple(cuts)
        self._whole = (model, trajectory)  # in a tuple, lest it becomes a submodule
        topology = PipeDataParallelTopology(grid.shape.pipe, grid.shape.data)
        super().__init__(layers=list(trajectory.stages), topology=topology, partition_method="cuts")
        del self._whole

    def _partition_layers(self, method: str = "cuts") -> None:
        self.parts = [0, *self._cuts, self._num_layers]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        model, trajectory = self._whole
        self.segment = Segment(model, trajectory, self._cuts, self.stage_id)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False  # as DeepSpeed's own _build does

    def forward(self, *live: LiveValue) -> object:
        return self.segment(*live)


class Perform(PipeInstruction):
    """An instruction of `order` as one of DeepSpeed's."""

    def __init__(self, instruction: Instruction) -> None:
        super().__init__(instruction=instruction)


@dataclass(frozen=True)
class Schedule:
    """A rank's order as a schedule of DeepSpeed's: steps of instructions."""

    order: Order

    def num_pipe_buffers(self) -> int:
        return 0  # the worker keeps its own

    def __iter__(self) -> Iterator[list[Perform]]:
        return iter([[Perform(instruction)] for instruction in self.order])


class GTDDPEngine(PipelineEngine):
    """PipelineEngine whose steps follow `order`.

    Attributes:
        worker: carries out instructions; set before the first step.
    """

    worker: Worker
    order: Order

    def _train_schedule(self) -> Schedule:
        return Schedule(self.order)

    def _perform(self, instruction: Instruction) -> None:
        self.worker.perform(instruction)

    _INSTRUCTION_MAP: ClassVar[dict[type[PipeInstruction], Callable[..., None]]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        Perform: _perform,
    }

    def _aggregate_total_loss(self) -> Tensor:
        # DeepSpeed's own goes through float32; ranks have agreed on the loss by now.
        self.outcome: Outcome = self.worker.finish()
        return torch.tensor(self.outcome.loss, dtype=torch.float64)

    def _DeepSpeedEngine__check_params(self, model: nn.Module, dtype: torch.dtype) -> None:
        """DeepSpeed refuses float64, though nothing in a pipeline without its own mixed precision depends on it."""

    def train_step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Outcome:
        """One step on this replica's micro-batches."""
        self.worker.start(inputs, targets)
        self.train_batch()
        return self.outcome


def new_engine(
    model: PartitionedModel, optimizer: Optimizer, *, micro_batch: int, n_micro: int, replicas: int
) -> GTDDPEngine:
    """The engine of a rank; all ranks make theirs at the same time."""
    settings = {
        "train_batch_size": micro_batch * n_micro * replicas,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": n_micro,
        "steps_per_print": None,
    }
    with quiet():
        mpu = model.mpu()
        return GTDDPEngine(
            args=None,
            model=model,
            optimizer=optimizer,
            model_parameters=None,
            training_data=None,
            lr_scheduler=None,
            mpu=mpu,
            dist_init_required=False,
            collate_fn=None,
            config=settings,
            config_class=DeepSpeedConfig(settings, mpu),
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's announcements of its own set-up from the user's output; its warnings stay."""
    logger = deepspeed.utils.logger
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
