"""Scale and shift of normalisation layers.

The gradient of a sample is the gradient with scale and shift expanded to one copy a sample: sum over positions of
y * x_hat and of y. BatchNorm's x_hat comes from the statistics of the micro-batch the forward pass used: of all samples
that it is given, so that several micro-batches are put together once their gradients are formed.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FormedGradients, SampleGradients
from .blocks import block_numbers

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class _NormGradients(SampleGradients):
    affine = False

    def _sum_positions(self, z: Tensor) -> Tensor:
        """(B, ...) -> (B, *parameter shape)."""
        raise NotImplementedError

    def _scales(self) -> Tensor:
        """Gradients of the scale, without the factor."""
        return self._sum_positions(self.output_grads * self.inputs)

    def per_sample(self) -> dict[str, Tensor]:
        grads = {}
        if "weight" in self.controls:
            grads["weight"] = self._scales() * self.factor
        if "bias" in self.controls:
            grads["bias"] = self._sum_positions(self.output_grads) * self.factor
        return grads

    def rows(self, rows: slice) -> SampleGradients:
        return FormedGradients(self.module, self.per_sample()).rows(rows)


class _ChannelNormGradients(_NormGradients):
    """Parameters of one number a channel, channels in dimension 1."""

    def _sum_positions(self, z: Tensor) -> Tensor:
        return z.flatten(2).sum(2) if z.ndim > 2 else z


class BatchNormGradients(_ChannelNormGradients):
    """nn.BatchNorm1d, 2d and 3d."""

    def _scales(self) -> Tensor:
        # x_hat itself is not formed: only its sums are needed, and scaling them is cheaper than scaling x. What is
        # centred is let go some samples later, so that all of it has the same little memory.
        norm = cast(_BatchNorm, self.module)
        x_BCL, y_BCL = (z.reshape(*z.shape[:2], -1) for z in (self.inputs, self.output_grads))
        of_batch = norm.training or norm.running_mean is None or norm.running_var is None
        count = len(x_BCL) * x_BCL.shape[2]
        mean_C = x_BCL.sum(2).sum(0) / count if of_batch else cast(Tensor, norm.running_mean).to(x_BCL)
        products, squares = [], []
        some = max(1, block_numbers(x_BCL.device) // x_BCL[0].numel())
        for x_bCL, y_bCL in zip(x_BCL.split(some), y_BCL.split(some), strict=True):
            centred_bCL = x_bCL - mean_C[:, None]
            products.append(torch.linalg.vecdot(centred_bCL, y_bCL))
            if of_batch:
                squares.append(torch.linalg.vector_norm(centred_bCL, dim=2).square().sum(0))
        variance_C = torch.stack(squares).sum(0) / count if of_batch else cast(Tensor, norm.running_var).to(x_BCL)
        return torch.cat(products) * torch.rsqrt(variance_C + norm.eps)


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
