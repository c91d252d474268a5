"""BatchNorm over a micro-batch of all replicas.

torch.nn.SyncBatchNorm computes on GPUs alone; here sums go through the grid's own group, on any device, and the
per-sample gradients of scale and shift see the same normalised inputs as the forward pass.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..players import SUPPORTED
from ..players.normalisation import BatchNormGradients
from .grid import Grid


class _Sum(torch.autograd.Function):
    """A sum over replicas that back-propagation goes through: every replica's loss depends on every summand."""

    @staticmethod
    def forward(ctx, own_C: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return _summed(own_C, group)

    @staticmethod
    def backward(ctx, grad_C: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return _summed(grad_C, ctx.group), None


def _summed(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = own.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class ReplicaBatchNorm(_BatchNorm):
    """A BatchNorm whose statistics are of all replicas' samples; made of one of torch's by :func:`synchronise`."""

    replica_group: dist.ProcessGroup
    replicas: int

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected samples and channels, got {input.ndim} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.track_running_stats:
            return super().forward(input)
        mean_C, variance_C, count = self.moments(input)
        if self.training and self.track_running_stats:
            self._track(mean_C.detach(), variance_C.detach() * count / max(count - 1, 1))
        normalised = self._normalised(input, mean_C, variance_C)
        if not self.affine:
            return normalised
        return normalised * _by_channel(self.weight, input) + _by_channel(self.bias, input)

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance of every channel over all replicas, and over how many numbers."""
        dims = [0, *range(2, input.ndim)]
        count = input.numel() // input.shape[1] * self.replicas
        mean_C = self._sum(input.sum(dims)) / count
        variance_C = self._sum(((input - _by_channel(mean_C, input)) ** 2).sum(dims)) / count
        return mean_C, variance_C, count

    def normalised(self, input: Tensor) -> Tensor:
        """The input before scale and shift."""
        mean_C, variance_C, _ = self.moments(input)
        return self._normalised(input, mean_C, variance_C)

    def _normalised(self, input: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        scale_C = (variance_C + self.eps).rsqrt()
        return (input - _by_channel(mean_C, input)) * _by_channel(scale_C, input)

    def _sum(self, own_C: Tensor) -> Tensor:
        return cast(Tensor, _Sum.apply(own_C, self.replica_group))

    @torch.no_grad()
    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), factor)


class ReplicaBatchNormGradients(BatchNormGradients):
    """Per-sample gradients of its scale and shift.

    In training inputs are normalised where they are captured, a meeting of replicas; not where gradients are formed.
    """

    @staticmethod
    def prepare(module: nn.Module, inputs: Tensor) -> Tensor:
        norm = cast(ReplicaBatchNorm, module)
        return norm.normalised(inputs) if norm.training else inputs

    def _scales(self) -> Tensor:
        if self.module.training:
            return self._sum_positions(self.output_grads * self.inputs)
        return super()._scales()


SUPPORTED[ReplicaBatchNorm] = ReplicaBatchNormGradients


def synchronise(model: nn.Module, grid: Grid) -> None:
    """Have every BatchNorm of a segment normalise over all replicas; parameters and buffers stay what they are."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            # The same object: the traced stages hold on to it.
            module.__class__ = ReplicaBatchNorm
            synced = cast(ReplicaBatchNorm, module)
            synced.replica_group, synced.replicas = grid.replica_group, grid.shape.data


def _by_channel(values_C: Tensor, like: Tensor) -> Tensor:
    return values_C.view(1, -1, *[1] * (like.ndim - 2))
