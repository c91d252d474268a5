"""`resnet18`, `resnet34`, `resnet50`: torchvision's ResNets, randomly initialised."""

from __future__ import annotations

from torch import nn

from ..config_schema import ModelConfig
from .torchvision_import import import_torchvision


def build_resnet18(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> nn.Module:
    """ResNet18 with `in_channels` inputs and `classes` outputs, for images of any size; `model.stem` as below."""
    return _build("resnet18", config, in_channels, classes)


def build_resnet34(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> nn.Module:
    """ResNet34, likewise."""
    return _build("resnet34", config, in_channels, classes)


def build_resnet50(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> nn.Module:
    """ResNet50, likewise."""
    return _build("resnet50", config, in_channels, classes)


def _build(name: str, config: ModelConfig, in_channels: int, classes: int) -> nn.Module:
    """torchvision's network of that name.

    `model.stem=imagenet` leaves it as it is: a 7x7 convolution of stride 2 and max-pooling of stride 2, which
    shrink an image 4 times before the first block. `model.stem=cifar` has a 3x3 convolution of stride 1 and
    no pooling there, as is usual for images of 32x32.
    """
    network: nn.Module = getattr(import_torchvision("torchvision.models"), name)(num_classes=classes)
    if config.stem == "cifar":
        network.conv1 = _first_convolution(in_channels, kernel=3, stride=1)
        network.maxpool = nn.Identity()
    elif in_channels != 3:
        network.conv1 = _first_convolution(in_channels, kernel=7, stride=2)
    return network


def _first_convolution(in_channels: int, *, kernel: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, 64, kernel, stride, padding=kernel // 2, bias=False)
    # As torchvision initialises the convolutions of its ResNets.
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
