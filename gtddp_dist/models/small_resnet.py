"""`small-resnet`: a residual network of 3x3 convolutions for small images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..config_schema import ModelConfig

DEFAULT_WIDTH = 16
HIDDEN_FEATURES = 64
POOLED_SIZE = 4

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class ConvNorm(nn.Sequential):
    """A convolution that keeps the image size at stride 1, with a BatchNorm behind it where asked for.

    The convolution has a bias only without BatchNorm, which would remove it.
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int = 1, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=not batch_norm)
        if batch_norm:
            self.norm = nn.BatchNorm2d(outputs)


class ResidualBlock(nn.Module):
    """conv3x3(c, c), activation, conv3x3(c, c', stride), plus the shortcut, activation.

    Where the number of channels changes, the stride is 2 and the shortcut a 1x1 convolution of stride 2;
    otherwise the stride is 1 and the shortcut the identity.
    """

    def __init__(self, inputs: int, outputs: int, *, batch_norm: bool, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        stride = 1 if outputs == inputs else 2
        layer = partial(ConvNorm, batch_norm=batch_norm)
        self.first = layer(inputs, inputs, kernel=3)
        self.inner_activation = activation()
        self.second = layer(inputs, outputs, kernel=3, stride=stride)
        self.shortcut = nn.Identity() if stride == 1 else layer(inputs, outputs, kernel=1, stride=stride)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """From (B, c, H, W) to (B, c', H / stride, W / stride)."""
        main = self.second(self.inner_activation(self.first(x)))
        return self.activation(main + self.shortcut(x))


class SmallResNet(nn.Module):
    """conv3x3(in, width), activation; residual blocks; pooling to 4x4; Linear(64), activation;
    Linear(classes).

    Has no control flow that depends on shapes, so torch.fx traces it. The pooling is adaptive: it averages a
    map larger than 4x4, leaves one of 4x4 as it is, and repeats values of a smaller one (an 8x8 image after
    two strided blocks).

    Args:
        in_channels: channels of the images.
        classes: outputs of the last layer.
        width: output channels of the first convolution.
        channels: output channels of each residual block.
        batch_norm: put a BatchNorm behind each convolution.
        activation: name of the non-linearity, a key of `ACTIVATIONS`.
        block: makes a block, as `ResidualBlock` is made.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        width: int,
        channels: tuple[int, ...],
        batch_norm: bool = False,
        activation: str = "relu",
        block: Callable[..., nn.Module] = ResidualBlock,
    ) -> None:
        super().__init__()
        new_activation = ACTIVATIONS[activation]
        self.stem = ConvNorm(in_channels, width, kernel=3, batch_norm=batch_norm)
        self.stem_activation = new_activation()
        self.blocks = nn.Sequential(
            *(
                block(inputs, outputs, batch_norm=batch_norm, activation=new_activation)
                for inputs, outputs in zip((width, *channels[:-1]), channels, strict=True)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(POOLED_SIZE)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(channels[-1] * POOLED_SIZE**2, HIDDEN_FEATURES)
        self.hidden_activation = new_activation()
        self.classifier = nn.Linear(HIDDEN_FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, in_channels, H, W)."""
        maps = self.pool(self.blocks(self.stem_activation(self.stem(images))))
        return self.classifier(self.hidden_activation(self.hidden(self.flatten(maps))))


def default_channels(width: int, blocks: int) -> tuple[int, ...]:
    """Output channels of each block: (2 width) for one block, (width, 2 width, 4 width, ...) for more."""
    return (2 * width,) if blocks == 1 else tuple(width * 2**block for block in range(blocks))


def build(
    config: ModelConfig,
    in_channels: int,
    classes: int,
    image_size: int,
    block: Callable[..., nn.Module] = ResidualBlock,
) -> SmallResNet:
    """The network that `model.blocks`, `width`, `channels`, `batch_norm`, `activation` and `init_scale` describe."""
    width = config.width or DEFAULT_WIDTH
    network = SmallResNet(
        in_channels,
        classes,
        width=width,
        channels=config.channels or default_channels(width, config.blocks),
        batch_norm=config.batch_norm,
        activation=config.activation or "relu",
        block=block,
    )
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in module.parameters():
                    parameter.mul_(config.init_scale)
    return network
