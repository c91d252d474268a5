"""What is timed on ranks: a network trained by DeepSpeed's own PipelineEngine, and by this package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn
from torch.nn import functional as F

from ..build import base_optimizer, plain_parts
from ..config_schema import Config
from ..parts import new_optimizer_of
from ..pipeline.engine import quiet
from ..pipeline.grid import Grid
from ..pipeline.initialize import Engine
from ..pipeline.plan import expected, stage_costs
from ..tracing import trace
from ..training_step import Precision
from ..trajectory import LiveValue, Stage, Trajectory
from .subject import described, micro_batch_of, new_model, with_optimizer


class Contender(Protocol):
    """Something that takes training steps on all ranks."""

    name: str

    def step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        """One step on this replica's micro-batches; the loss before it."""
        ...


class Ours:
    """This package's engine with the optimizer of that name."""

    def __init__(self, config: Config, optimizer: str, grid: Grid, cuts: Sequence[int]) -> None:
        self.name = optimizer
        own = with_optimizer(config, optimizer)
        model = new_model(own).to(grid.device)
        trajectory = trace(model, **plain_parts(model, own), projection=own.optimizer.projection or "cooperative")
        precision = Precision(config.train.dtype, grid.device)
        subject = described(own)
        stages, unit = stage_costs(own, subject, own.bench.image, Precision(own.train.dtype, torch.device("cpu")))
        self.engine = Engine(
            model,
            trajectory,
            lambda segment: new_optimizer_of(own)(segment, own),
            F.cross_entropy,
            grid=grid,
            cuts=cuts,
            micro_batch=micro_batch_of(own),
            n_micro=own.train.micro_batches,
            clip_norm=own.train.clip_norm,
            autocast=precision.autocast,
            scaler=precision.new_scaler(),
            sync_batch_norm=own.parallel.sync_batch_norm,
            zero=own.parallel.zero if optimizer == config.optimizer.name else 0,
            expected=expected(own, subject, stages, unit, cuts),
        )

    def step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        return self.engine.step(inputs, targets).loss


class DeepSpeedPipeline:
    """DeepSpeed's PipelineEngine as it is, with an optimizer of torch.optim, on the same network and cuts."""

    def __init__(self, config: Config, optimizer: str, grid: Grid, cuts: Sequence[int]) -> None:
        self.name = f"deepspeed {optimizer}"
        model = new_model(config).to(grid.device)
        trajectory = trace(model, **plain_parts(model, config), projection=config.optimizer.projection or "cooperative")
        layers = [_Layer(trajectory, stage) for stage in trajectory.stages]
        n, b = config.train.micro_batches, micro_batch_of(config)
        settings = {
            "train_batch_size": config.train.batch_size,
            "train_micro_batch_size_per_gpu": b,
            "gradient_accumulation_steps": n,
            "gradient_clipping": 0.0,  # by itself it clips to 1
            "steps_per_print": None,
        }
        with quiet():
            module = _CutAsWell(layers, cuts, PipeDataParallelTopology(config.parallel.pipe, config.parallel.data))
            mpu = module.mpu()
            self.engine = PipelineEngine(
                args=None,
                model=module,
                optimizer=base_optimizer(module, with_optimizer(config, optimizer)),
                model_parameters=None,
                training_data=None,
                lr_scheduler=None,
                mpu=mpu,
                dist_init_required=False,
                collate_fn=None,
                config=settings,
                config_class=DeepSpeedConfig(settings, mpu),
            )

    def step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(inputs, targets, strict=True)

        return float(self.engine.train_batch(pairs()))


class _Layer(nn.Module):
    """A stage as a layer of DeepSpeed's."""

    def __init__(self, trajectory: Trajectory, stage: Stage) -> None:
        super().__init__()
        self.members = nn.ModuleList(stage.player.modules.values())
        self._run, self._trajectory = stage.run, (trajectory,)
        self._first = stage is trajectory.stages[0]
        self._last = stage is trajectory.stages[-1]

    def forward(self, live: Tensor | tuple[LiveValue, ...]) -> object:
        (trajectory,) = self._trajectory
        values = trajectory.bind(live) if self._first else live if isinstance(live, tuple) else (live,)
        after = self._run(values)
        return trajectory.assemble(after) if self._last else after


class _CutAsWell(PipelineModule):
    def __init__(self, layers: Sequence[nn.Module], cuts: Sequence[int], topology: PipeDataParallelTopology) -> None:
        self._cuts = tuple(cuts)
        super().__init__(layers=list(layers), topology=topology, loss_fn=nn.CrossEntropyLoss())

    def _partition_layers(self, method: str = "cuts") -> None:
        self.parts = [0, *self._cuts, self._num_layers]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])
