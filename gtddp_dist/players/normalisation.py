"""Scale and shift of normalisation layers.

The gradient of a sample is the gradient with scale and shift expanded to one copy a sample: sum over positions of
y * x_hat and of y. BatchNorm's x_hat comes from the statistics of the micro-batch the forward pass used.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import SampleGradients

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class _NormGradients(SampleGradients):
    affine = False

    def _sum_positions(self, z: Tensor) -> Tensor:
        """(B, ...) -> (B, *parameter shape)."""
        raise NotImplementedError

    def per_sample(self) -> dict[str, Tensor]:
        y = self.output_grads * self.factor
        grads = {}
        if "weight" in self.controls:
            grads["weight"] = self._sum_positions(y * self.inputs)
        if "bias" in self.controls:
            grads["bias"] = self._sum_positions(y)
        return grads


class _ChannelNormGradients(_NormGradients):
    """Parameters of one number a channel, channels in dimension 1."""

    def _sum_positions(self, z: Tensor) -> Tensor:
        return z.flatten(2).sum(2) if z.ndim > 2 else z


class BatchNormGradients(_ChannelNormGradients):
    """nn.BatchNorm1d, 2d and 3d."""

    @staticmethod
    def prepare(module: nn.Module, inputs: Tensor) -> Tensor:
        norm = cast(_BatchNorm, module)
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return F.batch_norm(inputs, None, None, training=True, eps=norm.eps)
        return F.batch_norm(inputs, norm.running_mean, norm.running_var, training=False, eps=norm.eps)


class GroupNormGradients(_ChannelNormGradients):
    """nn.GroupNorm."""

    @staticmethod
    def prepare(module: nn.Module, inputs: Tensor) -> Tensor:
        norm = cast(nn.GroupNorm, module)
        return F.group_norm(inputs, norm.num_groups, eps=norm.eps)


class LayerNormGradients(_NormGradients):
    """nn.LayerNorm: parameters of the normalised shape, positions before it."""

    @staticmethod
    def prepare(module: nn.Module, inputs: Tensor) -> Tensor:
        norm = cast(nn.LayerNorm, module)
        return F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)

    def _sum_positions(self, z: Tensor) -> Tensor:
        shape = cast(nn.LayerNorm, self.module).normalized_shape
        return torch.reshape(z, (z.shape[0], -1, *shape)).sum(1)
