"""What is measured: the configured network for random images, its stages, and where a rank is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..build import plain_parts
from ..config_schema import Config, OptimizerConfig
from ..errors import UserError
from ..launch import Ranks
from ..pipeline.company import Place
from ..pipeline.costs import balanced_cuts, check_cuts
from ..pipeline.grid import Grid, Shape
from ..pipeline.plan import Subject, describe, stage_costs
from ..registry import MODELS, OPTIMIZERS, load_object
from ..tracing import trace
from ..training_step import Precision, laid_out
from ..trajectory import Trajectory


def new_model(config: Config) -> nn.Module:
    """The configured network for the images of `bench`; the same weights at every call."""
    torch.manual_seed(config.train.seed)
    channels, height, _ = config.bench.image
    build = load_object(MODELS[config.model.name].builder)
    model: nn.Module = build(config.model, in_channels=channels, classes=config.bench.classes, image_size=height)  # type: ignore[operator]
    return laid_out(model.to(Precision(config.train.dtype, torch.device("cpu")).dtype), config.train)


def with_optimizer(config: Config, name: str, **options: object) -> Config:
    """The same with another optimizer, as far as that takes the options of the configured one; ``options`` count over
    these."""
    taken = {option: getattr(config.optimizer, option) for option in OPTIMIZERS[name].options}
    optimizer = OptimizerConfig(name=name, **{**taken, **options})
    return dataclasses.replace(config, optimizer=optimizer)


def micro_batch_of(config: Config) -> int:
    """Samples of a micro-batch."""
    return config.train.batch_size // (config.train.micro_batches * config.parallel.data)


def described(config: Config, model: nn.Module | None = None) -> Subject:
    """The stages of a network (None: a new one), and the step that the configuration asks for.

    Raises:
        UserError: replicas that are emulated, or a network that the optimizer cannot take.
    """
    if config.train.replica_groups > 1:
        raise UserError(
            f"train.replica_groups={config.train.replica_groups}: bench measures replicas that are ranks; take "
            f"parallel.data={config.train.replica_groups}"
        )
    model = new_model(config) if model is None else model
    trajectory = trace(model, **plain_parts(model, config), projection=config.optimizer.projection or "cooperative")
    twin = copy.deepcopy(model).to("meta")  # an optimizer's hooks must not see the network itself
    return describe(config, twin, trajectory, config.bench.classes)


def cut(config: Config) -> tuple[Trajectory, tuple[int, ...]]:
    """A network's stages, and where the configuration cuts them (else balanced, as `gtddp train` does it)."""
    subject = described(config)
    cuts = config.parallel.cuts
    if cuts is None:
        precision = Precision(config.train.dtype, torch.device("cpu"))
        stages, _ = stage_costs(config, subject, config.bench.image, precision)
        cuts = balanced_cuts(stages, config.parallel.pipe)
    check_cuts(cuts, config.parallel.pipe, len(subject.trajectory.stages))
    return subject.trajectory, tuple(cuts)


def images_and_labels(
    config: Config, micro_batches: int, device: torch.device, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """So many random micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    dtype = Precision(config.train.dtype, device).dtype
    shape = (micro_batch_of(config), *config.bench.image)
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).to(device) for _ in range(micro_batches)]
    labels = [torch.randint(config.bench.classes, shape[:1], generator=generator).to(device) for _ in inputs]
    return inputs, labels


def batches(config: Config, grid: Grid, step: int) -> tuple[list[Tensor], list[Tensor]]:
    """This replica's random micro-batches of a step; the same on all segments."""
    return images_and_labels(config, config.train.micro_batches, grid.device, seed=1000 * step + grid.replica)


def place_of(config: Config, ranks: Ranks, cuts: Sequence[int], stages: int) -> Place:
    """Where a rank is, as the configuration says."""
    device = None if config.train.device == "auto" else torch.device(config.train.device)
    backend = None if config.parallel.backend == "auto" else config.parallel.backend
    return Place(ranks, Shape(config.parallel.pipe, config.parallel.data), tuple(cuts), stages, device, backend)
