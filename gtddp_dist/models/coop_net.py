"""`coop-net`: blocks of two layers with the same input whose outputs are added (arXiv 2007.08880, Fig. 7a)."""

from __future__ import annotations

from torch import Tensor, nn

from ..config_schema import ModelConfig
from .small_resnet import ACTIVATIONS, DEFAULT_WIDTH, HIDDEN_FEATURES


class CooperativeBlock(nn.Module):
    """activation(first(x) + second(x)): two layers of the same shape that act on one state at once."""

    def __init__(self, first: nn.Module, second: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The layers' common output, after the non-linearity."""
        return self.activation(self.first(x) + self.second(x))


class CoopNet(nn.Module):
    """conv3x3(in, width), activation; two cooperative blocks of 3x3 convolutions of stride 2, to `width` and 2 `width`
    channels; one cooperative block of linear layers, to 64 features; Linear(classes).

    Args:
        in_channels: channels of the images.
        classes: outputs of the last layer.
        image_size: height and width of the images.
        width: output channels of the first convolution.
        activation: name of the non-linearity, a key of `ACTIVATIONS`.
    """

    def __init__(self, in_channels: int, classes: int, *, image_size: int, width: int, activation: str) -> None:
        super().__init__()
        new_activation = ACTIVATIONS[activation]

        def strided(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)

        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.stem_activation = new_activation()
        self.blocks = nn.Sequential(
            *(
                CooperativeBlock(strided(width, outputs), strided(width, outputs), new_activation())
                for outputs in (width, 2 * width)
            )
        )
        self.flatten = nn.Flatten()
        side = (image_size + 3) // 4  # a convolution of stride 2 halves it, rounding up
        features = 2 * width * side * side
        self.hidden = CooperativeBlock(
            nn.Linear(features, HIDDEN_FEATURES), nn.Linear(features, HIDDEN_FEATURES), new_activation()
        )
        self.classifier = nn.Linear(HIDDEN_FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, in_channels, image_size, image_size)."""
        maps = self.blocks(self.stem_activation(self.stem(images)))
        return self.classifier(self.hidden(self.flatten(maps)))


def build(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> CoopNet:
    """The network that `model.width` and `model.activation` describe; the paper's has a width of 16 and tanh."""
    return CoopNet(
        in_channels,
        classes,
        image_size=image_size,
        width=config.width or DEFAULT_WIDTH,
        activation=config.activation or "tanh",
    )
