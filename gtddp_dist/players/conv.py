"""Two-dimensional convolutions, with every option of nn.Conv2d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .affine import AffineGradients


class Conv2dGradients(AffineGradients):
    """nn.Conv2d: stride, padding (numbers, "same", "valid", any padding mode), dilation, groups, bias."""

    module: nn.Conv2d

    @staticmethod
    def prepare(module: nn.Module, inputs: Tensor) -> Tensor:
        """The padded input where the padding is not the plain symmetric zeros that convolutions do themselves."""
        conv = cast(nn.Conv2d, module)
        if conv.padding_mode == "zeros" and conv.padding != "same":
            return inputs
        amounts: list[int] = []
        for kernel, dilation, padding in zip(
            reversed(conv.kernel_size), reversed(conv.dilation), _reversed_padding(conv), strict=True
        ):
            total = dilation * (kernel - 1)
            amounts += [total // 2, total - total // 2] if padding is None else [padding, padding]
        return F.pad(inputs, amounts, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)

    @property
    def _padding(self) -> tuple[int, int]:
        """The padding that is still to be done after :meth:`prepare`."""
        conv = self.module
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return (0, 0)
        return cast(tuple[int, int], conv.padding)

    def positions(self) -> tuple[Tensor, Tensor]:
        conv = self.module
        x = F.unfold(self.inputs, conv.kernel_size, dilation=conv.dilation, padding=self._padding, stride=conv.stride)
        x_BGIL = x.reshape(x.shape[0], conv.groups, -1, x.shape[-1])
        return x_BGIL.mT, self.positions_of_output()[1]

    def positions_of_output(self) -> tuple[None, Tensor]:
        y = self.output_grads * self.factor
        return None, y.reshape(y.shape[0], self.module.groups, -1, y.shape[2] * y.shape[3]).mT

    def weighted(self, weights_B: Tensor) -> dict[str, Tensor]:
        conv = self.module
        y = self.output_grads * (weights_B.to(self.output_grads) * self.factor)[:, None, None, None]
        grads = {}
        if "weight" in self.controls:
            # Positions that the stride leaves over at the border: the output gradient's size decides, as in autograd.
            grads["weight"] = conv2d_weight_grad(self.inputs, conv, y, self._padding)
        if "bias" in self.controls:
            grads["bias"] = y.sum((0, 2, 3))
        return grads

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        conv = self.module
        weight = direction["weight"] if "weight" in self.controls else conv.weight.new_zeros(conv.weight.shape)
        along = F.conv2d(
            self.inputs,
            weight,
            direction["bias"] if "bias" in self.controls else None,
            conv.stride,
            self._padding,
            conv.dilation,
            conv.groups,
        )
        return (along * self.output_grads).flatten(1).sum(1) * self.factor


def conv2d_weight_grad(inputs: Tensor, conv: nn.Conv2d, output_grads: Tensor, padding: tuple[int, int]) -> Tensor:
    """The weight gradient that autograd would form, by the library's own kernel."""
    from torch.nn.grad import conv2d_weight

    return conv2d_weight(
        inputs, list(conv.weight.shape), output_grads, conv.stride, padding, conv.dilation, conv.groups
    )


def _reversed_padding(conv: nn.Conv2d) -> list[int | None]:
    """Padding of the last dimension first; None stands for "same"."""
    if conv.padding == "same":
        return [None, None]
    if conv.padding == "valid":
        return [0, 0]
    return list(reversed(cast(tuple[int, int], conv.padding)))
