"""`plain-net`: `small-resnet` without its shortcuts, for optimizers that take none (DDPNOpt, MSA)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..config_schema import ModelConfig
from . import small_resnet
from .small_resnet import ConvNorm, SmallResNet


class PlainBlock(nn.Module):
    """conv3x3(c, c), activation, conv3x3(c, c', stride), activation; the stride is 2 where the channels change."""

    def __init__(self, inputs: int, outputs: int, *, batch_norm: bool, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, inputs, kernel=3, batch_norm=batch_norm)
        self.inner_activation = activation()
        stride = 1 if outputs == inputs else 2
        self.second = ConvNorm(inputs, outputs, kernel=3, stride=stride, batch_norm=batch_norm)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """From (B, c, H, W) to (B, c', H / stride, W / stride)."""
        return self.activation(self.second(self.inner_activation(self.first(x))))


def build(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> SmallResNet:
    """`model.blocks`, `width`, `channels`, `batch_norm` and `activation` mean what they do for `small-resnet`."""
    return small_resnet.build(config, in_channels, classes, image_size, block=PlainBlock)
