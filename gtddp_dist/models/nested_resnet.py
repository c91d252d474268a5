"""`nested-resnet`: a residual network whose blocks hold a residual block on their main path."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..config_schema import ModelConfig
from . import small_resnet
from .small_resnet import ResidualBlock, SmallResNet


class NestedBlock(ResidualBlock):
    """conv3x3(c, c), activation, a residual block c to c, conv3x3(c, c', stride), plus the shortcut, activation.

    Two residual states are live within the inner block: its own, and that of the outer shortcut.
    """

    def __init__(self, inputs: int, outputs: int, *, batch_norm: bool, activation: Callable[[], nn.Module]) -> None:
        super().__init__(inputs, outputs, batch_norm=batch_norm, activation=activation)
        self.inner = ResidualBlock(inputs, inputs, batch_norm=batch_norm, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, c, H, W) to (B, c', H / stride, W / stride)."""
        main = self.second(self.inner(self.inner_activation(self.first(x))))
        return self.activation(main + self.shortcut(x))


def build(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> SmallResNet:
    """`small-resnet` with nested blocks: `model.blocks`, `width`, `batch_norm` and `activation` mean the same."""
    return small_resnet.build(config, in_channels, classes, image_size, block=NestedBlock)
