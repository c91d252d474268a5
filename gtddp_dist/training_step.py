"""One training step: forward, backward and update in the configured arithmetic, and what becomes of a bad one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .buffers import copy_buffers, restore_buffers, unchanged_buffers, unchanged_random_state
from .config_schema import TrainConfig
from .data import network_input
from .nonfinite import UNKNOWN, Source, in_step, in_training


@dataclass(frozen=True)
class Precision:
    """The arithmetic of `train.dtype` on a device.

    float32 and float64 are the type of weights and images alike. bfloat16 and float16 keep both in float32
    and let autocast choose which operations run in the short type; float16 needs its losses scaled, too
    (`new_scaler`).
    """

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and images."""
        return torch.float64 if self.name == "float64" else torch.float32

    def autocast(self) -> torch.autocast:
        """The context of every forward pass; does nothing for float32 and float64."""
        short = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.name)
        return torch.autocast(self.device.type, dtype=short or torch.bfloat16, enabled=short is not None)

    def new_scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of float16, whose gradients would otherwise vanish; None for the other types."""
        return torch.amp.GradScaler(self.device.type) if self.name == "float16" else None


def laid_out(model: nn.Module, config: TrainConfig) -> nn.Module:
    """The model with the memory layout of `train.channels_last`, which a convolution's output has from its weights."""
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's own types
    return model


@dataclass(frozen=True)
class StepResult:
    """What a training step did."""

    loss: float
    """Mean loss of the batch before the step."""
    correct: int
    """Samples of the batch classified right before the step."""
    refused: bool
    """The loss or the gradient was not finite: weights, optimizer state and buffers are as they were."""
    source: Source | None = None
    """Of a refused step: what was not finite."""


@runtime_checkable
class GuardsItself(Protocol):
    """An optimizer, as GT-DDP, that clips the gradient and refuses a non-finite step itself, and counts the latter."""

    skipped_steps: int
    source: Source | None
    """What the last refused step had made that was not finite."""


class TrainingStep:
    """Trains a model on one batch at a time.

    The batch is cut into `replica_groups * micro_batches` chunks of consecutive samples, replica by replica,
    whose losses are divided by their number: the gradient is that of the batch's mean loss. An optimizer that
    does not guard itself (`GuardsItself`) is guarded here: the gradient is clipped, a non-finite step refused.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None,
        precision: Precision,
        config: TrainConfig,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._precision = precision
        self._chunks = config.replica_groups * config.micro_batches
        self._clip_norm = config.clip_norm

    def __call__(self, images: Tensor, labels: Tensor) -> StepResult:
        """One step on images (B, C, H, W) and labels (B,), in training mode."""
        self._model.train()
        buffers = copy_buffers(self._model)
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=labels.device)
        correct = torch.zeros((), dtype=torch.int64, device=labels.device)
        for chunk_images, chunk_labels in self._split(images, labels):
            chunk_loss, logits = self._forward(chunk_images, chunk_labels)
            (chunk_loss if self._scaler is None else self._scaler.scale(chunk_loss)).backward()
            loss += chunk_loss.detach()
            correct += (logits.detach().argmax(dim=1) == chunk_labels).sum()
        mean_loss = float(loss)
        taken = self._update(math.isfinite(mean_loss))
        if not taken:
            restore_buffers(self._model, buffers)  # a NaN in the images is in the BatchNorm statistics by now
        return StepResult(
            mean_loss, int(correct), refused=not taken, source=None if taken else self._source(images, loss)
        )

    def _source(self, images: Tensor, loss: Tensor) -> Source:
        began = in_training(self._model, self._optimizer, [network_input(images, self._precision.dtype)])
        if isinstance(self._optimizer, GuardsItself):
            return began or self._optimizer.source or UNKNOWN
        return began or in_step(self._model, {}, [], [loss], []) or UNKNOWN

    def loss_now(self, images: Tensor, labels: Tensor) -> float:
        """The loss of a batch in training mode, cut into the same chunks, changing neither buffers nor random state."""
        self._model.train()
        with torch.no_grad(), unchanged_buffers(self._model), unchanged_random_state(images.device):
            return sum(float(self._forward(*chunk)[0]) for chunk in self._split(images, labels))

    def _split(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(images.chunk(self._chunks), labels.chunk(self._chunks), strict=True)

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk's share of the mean loss of the batch, and its logits."""
        with self._precision.autocast():
            logits = self._model(network_input(images, self._precision.dtype))
            return F.cross_entropy(logits, labels) / self._chunks, logits

    def _update(self, finite_loss: bool) -> bool:
        """Has the optimizer take the step unless it is not finite; whether it was taken."""
        if isinstance(self._optimizer, GuardsItself):
            refused_before = self._optimizer.skipped_steps
            taken = self._step_scaled()
            return taken and self._optimizer.skipped_steps == refused_before
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not (finite_loss and math.isfinite(norm)):
            if self._scaler is not None:
                self._scaler.update()  # lowers the scale, where it was too high
            return False
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        return self._step_scaled()

    def _step_scaled(self) -> bool:
        """`optimizer.step()`, through the loss scaler where there is one; False where that found an overflow."""
        if self._scaler is None:
            self._optimizer.step()
            return True
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= scale


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> dict[str, float]:
    """Mean loss and accuracy over batches of images and labels in evaluation mode, as `val/loss` and `val/accuracy`."""
    training = model.training
    model.eval()
    loss, correct, samples = 0.0, 0, 0
    with torch.no_grad(), precision.autocast():
        for images, labels in batches:
            logits = model(network_input(images, precision.dtype))
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            correct += int((logits.argmax(dim=1) == labels).sum())
            samples += len(labels)
    model.train(training)
    return {"val/loss": loss / samples, "val/accuracy": correct / samples}
