"""`vit`: torchvision's vision transformer, small enough for images of 8x8 and 32x32, without dropout."""

from __future__ import annotations

import math

from torch import nn

from ..config_schema import ModelConfig
from ..errors import ConfigError
from ..trajectory import PlainParts
from .torchvision_import import import_torchvision

DEFAULT_WIDTH = 64


def build(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> nn.Module:
    """The transformer that `model.patch_size`, `width`, `depth`, `heads` and `mlp_ratio` describe.

    Raises ConfigError where the patches do not fill the image, or the heads do not share out the width.
    """
    patch_size = config.patch_size or (2 if image_size < 16 else 4)
    width = config.width or DEFAULT_WIDTH
    if image_size % patch_size:
        raise ConfigError(
            f"model.patch_size: patches of {patch_size} x {patch_size} pixels do not fill images of {image_size} x "
            f"{image_size}; take a divisor of {image_size}"
        )
    if width % config.heads:
        raise ConfigError(
            f"model.heads: {config.heads} heads cannot share out a width of {width}; take a divisor of it"
        )
    network: nn.Module = import_torchvision("torchvision.models").VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=width,
        mlp_dim=round(width * config.mlp_ratio),
        num_classes=classes,
    )
    if in_channels != 3:
        network.conv_proj = _patch_projection(in_channels, width, patch_size)
    return network


def plain_parts(model: nn.Module) -> PlainParts:
    """What of a vision transformer of torchvision can be no player, as keywords of GTDDP::

        GTDDP(model, curvature=..., **plain_parts(model))

    Nothing that GT-DDP can act on stands between the projections of an attention, and the class token and the position
    embedding are inputs rather than layers: they get the base update without feedback.
    """
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return {"plain_modules": attentions, "plain_parameters": ["class_token", "encoder.pos_embedding"]}


def _patch_projection(in_channels: int, width: int, patch_size: int) -> nn.Conv2d:
    """torchvision's first layer, whose three input channels are fixed, for another number of them."""
    convolution = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
    nn.init.trunc_normal_(convolution.weight, std=math.sqrt(1 / (in_channels * patch_size**2)))
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
