"""Module types that can be players: one file and one line here for each."""

from __future__ import annotations

from torch import Tensor, nn

from .affine import AffineGradients, GramPath, LinearGradients
from .base import FormedGradients, SampleGradients, Scale, put_together
from .budget import Budget, within
from .conv import ConvGradients
from .normalisation import BatchNormGradients, GroupNormGradients, LayerNormGradients
from .samples import PlayerSamples, of_module, qualified

# By exact type: a subclass may compute something else in its forward.
SUPPORTED: dict[type[nn.Module], type[SampleGradients]] = {
    nn.Linear: LinearGradients,
    nn.Conv1d: ConvGradients,
    nn.Conv2d: ConvGradients,
    nn.Conv3d: ConvGradients,
    nn.BatchNorm1d: BatchNormGradients,
    nn.BatchNorm2d: BatchNormGradients,
    nn.BatchNorm3d: BatchNormGradients,
    nn.LayerNorm: LayerNormGradients,
    nn.GroupNorm: GroupNormGradients,
}


def is_supported(module: nn.Module) -> bool:
    """Whether the module's parameters can be the controls of a player."""
    return type(module) in SUPPORTED


def is_affine(module: nn.Module) -> bool:
    """Whether the module opens a player (Linear, convolutions), rather than joining one."""
    return SUPPORTED[type(module)].affine


def prepare(module: nn.Module, inputs: Tensor) -> Tensor:
    """What of a micro-batch's input the gradients of ``module`` need."""
    return SUPPORTED[type(module)].prepare(module, inputs)


def sample_gradients(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, factor: float | Tensor = 1.0
) -> SampleGradients:
    """The per-sample gradients of ``module``'s controls; ``inputs`` as :func:`prepare` made them."""
    return SUPPORTED[type(module)](module, inputs, output_grads, factor)


__all__ = [
    "SUPPORTED",
    "AffineGradients",
    "Budget",
    "FormedGradients",
    "GramPath",
    "PlayerSamples",
    "SampleGradients",
    "Scale",
    "is_affine",
    "is_supported",
    "of_module",
    "prepare",
    "put_together",
    "qualified",
    "sample_gradients",
    "within",
]
