"""What a run is made of, built from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from . import schedule
from .config_schema import Config
from .data import DataSet
from .data.batches import BatchOrder
from .environment import prepare_cpu, select_device
from .errors import ConfigError
from .registry import DATA_SETS, MODELS, OPTIMIZERS, load_object
from .team import SOLO, Team
from .training_state import Progress, TrainingState
from .training_step import Precision, StepResult, TrainingStep, evaluate, laid_out


@dataclasses.dataclass(frozen=True)
class Parts:
    """All that a run is made of, built from its configuration."""

    config: Config
    data: DataSet
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    step: StepFunction
    state: TrainingState
    precision: Precision
    order: BatchOrder
    total_steps: int
    parameters: int
    """Numbers that are trained, on all ranks."""
    team: Team = SOLO

    def validate(self) -> dict[str, float]:
        """Mean loss and accuracy on the validation set, as `val/loss` and `val/accuracy`."""
        return validate(self.config, self.model, self.data, self.precision)

    def diagnostics(self, images: Tensor, labels: Tensor, loss: float) -> dict[str, float]:
        """What the optimizer tells about its step, as `gtddp/<name>`; with a predicted decrease also the actual one.

        The actual decrease is that of the loss on the step's own batch, which costs another forward pass.
        """
        tell = getattr(self.optimizer, "diagnostics", None)
        if tell is None:
            return {}
        told = {f"gtddp/{name}": float(value) for name, value in tell().items()}
        if "gtddp/predicted_decrease" in told:
            told["gtddp/actual_decrease"] = loss - self.step.loss_now(images, labels)
        return told

    def resources(self, steps: int) -> dict[str, float]:
        """What each rank did and used over so many steps since the last call; nothing for one process."""
        return {}


class StepFunction(Protocol):
    """One training step on a whole batch, whoever holds the network."""

    def __call__(self, images: Tensor, labels: Tensor) -> StepResult:
        """Trains on images (B, C, H, W) and labels (B,)."""
        ...

    def loss_now(self, images: Tensor, labels: Tensor) -> float:
        """The loss of a batch in training mode, changing neither buffers nor random state."""
        ...


def build(config: Config) -> Parts:
    """Data, network, optimizer and schedule of a run at its start; a function of the configuration alone.

    Raises UserError for what the configuration cannot say by itself: a batch larger than the data set, no
    GPU, a network that the optimizer cannot take.
    """
    prepare_cpu(config.train.threads)
    precision = Precision(config.train.dtype, select_device(config.train.device))
    data = load_data(config).to(precision.device)
    order = BatchOrder(len(data.train_labels), config.train.batch_size, config.train.seed)
    total_steps = config.train.steps or config.train.epochs * order.steps_per_epoch
    torch.manual_seed(config.train.seed)
    model = build_model(config, data, precision)
    optimizer = new_optimizer_of(config)(model, config)
    scheduler = LambdaLR(optimizer, lambda step: schedule.factor(config.schedule, step, total_steps))
    scaler = precision.new_scaler()
    return Parts(
        config=config,
        data=data,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        step=TrainingStep(model, optimizer, scaler, precision, config.train),
        state=TrainingState(model, optimizer, scheduler, scaler, Progress()),
        precision=precision,
        order=order,
        total_steps=total_steps,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def new_optimizer_of(config: Config) -> Callable[[nn.Module, Config], Optimizer]:
    """What builds the optimizer that `optimizer.name` names."""
    return cast(Callable[[nn.Module, Config], Optimizer], load_object(OPTIMIZERS[config.optimizer.name].builder))


def load_data(config: Config) -> DataSet:
    """The data set that `data.name` names."""
    load = cast(Callable[[object], DataSet], load_object(DATA_SETS[config.data.name].loader))
    return load(config.data)


def build_model(config: Config, data: DataSet, precision: Precision) -> nn.Module:
    """The network that `model.name` names, for the images and classes of the data set.

    Raises ConfigError for images that are not square, and for options that the size of the images rules out.
    """
    height, width = data.image_size
    if height != width:
        raise ConfigError(
            f"data.name: images of {data.name!r} have {height} x {width} pixels; networks take square images"
        )
    new_model = cast(Callable[..., nn.Module], load_object(MODELS[config.model.name].builder))
    model = new_model(config.model, in_channels=data.in_channels, classes=data.classes, image_size=height)
    return laid_out(model.to(device=precision.device, dtype=precision.dtype), config.train)


def validate(config: Config, model: nn.Module, data: DataSet, precision: Precision) -> dict[str, float]:
    """Mean loss and accuracy of a model on the validation set, as `val/loss` and `val/accuracy`."""
    return evaluate(model, data.validation_batches(config.eval.batch_size), precision)
