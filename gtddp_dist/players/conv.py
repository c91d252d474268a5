"""Convolutions in one, two and three dimensions, with every option of nn.Conv1d, nn.Conv2d and nn.Conv3d."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as library_grad

from .affine import AffineGradients, GramPath
from .blocks import Block
from .pairs import Phase, pair_cost, pair_gram, pair_numbers, phases
from .shifts import shifted_blocks, shifted_gradients

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHT_GRADS: dict[int, Callable[..., Tensor]] = {
    1: library_grad.conv1d_weight,
    2: library_grad.conv2d_weight,
    3: library_grad.conv3d_weight,
}

SHIFTED_POSITIONS = 128
"""Positions from which on per-sample gradients are made faster one kernel element at a time than by a product of
unfolded inputs, on a CPU: 1024 of them in a quarter of the time, 256 in two thirds, 64 in the same."""

SHIFTED_CHANNELS = 16
"""The same for input channels: with 3 of them and 1024 positions it takes over twice the time."""

PRODUCT_POSITIONS = 16
"""Positions up to which one matrix product of unfolded inputs makes the weight's gradient faster than a convolution, on
a CPU: 16 of them in two thirds of the time (8 samples, 512 channels), 64 in 1.3 times."""


class ConvGradients(AffineGradients):
    """nn.Conv1d, 2d, 3d: stride, padding (numbers, "same", "valid", any padding mode), dilation, groups, bias.

    Inputs have the shape (B, channels, *space), output gradients (B, channels', *space'); positions are pixels of
    the output.
    """

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

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
    def _padding(self) -> tuple[int, ...]:
        """The padding that is still to be done after :meth:`prepare`."""
        conv = self.module
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return (0,) * len(conv.kernel_size)
        return conv.padding

    def positions(self) -> tuple[Tensor, Tensor]:
        conv = self.module
        x_BIL = unfold(self.inputs, conv.kernel_size, conv.stride, self._padding, conv.dilation)
        x_BGIL = x_BIL.reshape(x_BIL.shape[0], conv.groups, -1, x_BIL.shape[-1])
        return x_BGIL.mT, self.output_positions()

    def output_positions(self) -> Tensor:
        y = self.output_grads * self.factor
        return y.reshape(y.shape[0], self.module.groups, -1, y.shape[2:].numel()).mT

    def rotated(self, inputs_GCC: Tensor, outputs_GOO: Tensor) -> ConvGradients:
        x, y = (
            (E.mT @ z.reshape(len(z), len(E), E.shape[1], -1)).reshape(z.shape)
            for z, E in ((self.inputs, inputs_GCC), (self.output_grads, outputs_GOO))
        )
        return ConvGradients(self.module, x, y, self.factor)

    def _phases(self) -> list[Phase]:
        conv = self.module
        return phases(self.inputs.shape[2:], conv.kernel_size, conv.stride, self._padding, conv.dilation)

    def _pair_costs(self, samples: int) -> dict[GramPath, int]:
        B, L, _, O = self._sizes(samples)  # noqa: E741
        channels = self.module.in_channels // self.module.groups
        costs = super()._pair_costs(samples)
        costs["pixels"] = pair_cost(B, self._phases(), L, channels, O, self.inputs.device.type)
        return costs

    def pair_gram(self, path: GramPath) -> Tensor:
        if path != "pixels":
            return super().pair_gram(path)
        return pair_gram(self._pixels(self.inputs), self._pixels(self.output_grads), self._phases()) * self.factor**2

    def pair_numbers(self, path: GramPath) -> int:
        if path != "pixels":
            return super().pair_numbers(path)
        B, L, _, _ = self._sizes(len(self.inputs))
        pairs = pair_numbers(B, self._phases(), L, self.inputs.device.type) * self.module.groups
        return self.inputs.numel() + self.output_grads.numel() + pairs

    def input_channels(self, group: int, channels: slice) -> Tensor:
        conv = self.module
        x_BCS = self.inputs.unflatten(1, (conv.groups, -1))[:, group, channels]
        return unfold(x_BCS, conv.kernel_size, conv.stride, self._padding, conv.dilation)

    def output_channels(self, group: int) -> Tensor:
        return self.output_grads.unflatten(1, (self.module.groups, -1))[:, group].flatten(2)

    def channel_numbers(self) -> int:
        B, L, _, O = self._sizes(len(self.inputs))  # noqa: E741
        padded = math.prod(n + 2 * p for n, p in zip(self.inputs.shape[2:], self._padding, strict=True))
        elements = self.inputs_of_channel
        return B * (2 * padded + elements * (L + O))

    def _pixels(self, z: Tensor) -> Tensor:
        """(B, channels, *space) -> (groups, *space, B, channels of a group)."""
        z_BGCS = z.unflatten(1, (self.module.groups, -1))
        return z_BGCS.permute(1, *range(3, z_BGCS.ndim), 0, 2)

    def per_sample(self) -> dict[str, Tensor]:
        """One kernel element at a time where that is faster: for large images."""
        conv, y = self.module, self.output_grads
        few = self._few_channels or y.shape[2:].numel() < SHIFTED_POSITIONS
        if "weight" not in self.controls or few:
            return super().per_sample()
        weight = shifted_gradients(*self._images(), self._phases(), conv.kernel_size)
        bias = {"bias": self._bias_grads()} if "bias" in self.controls else {}
        return {"weight": weight.flatten(1, 2)} | bias

    def _images(self) -> tuple[Tensor, Tensor]:
        """Inputs x_BGCS and scaled output gradients y_BGOS."""
        groups = self.module.groups
        return self.inputs.unflatten(1, (groups, -1)), (self.output_grads * self.factor).unflatten(1, (groups, -1))

    def _blocks(self) -> Iterator[Block]:
        if self._few_channels:
            return super()._blocks()
        return shifted_blocks(*self._images(), self._phases())

    def _by_group(self, weight: Tensor) -> Tensor:
        return super()._by_group(weight) if self._few_channels else weight.unflatten(0, (self.module.groups, -1))

    @property
    def _few_channels(self) -> bool:
        return self.module.in_channels // self.module.groups < SHIFTED_CHANNELS

    @property
    def _few_positions(self) -> bool:
        positions = self.output_grads.shape[2:].numel()
        return self.module.groups == 1 and positions <= PRODUCT_POSITIONS and self.output_grads.device.type == "cpu"

    def weighted(self, weights_B: Tensor) -> dict[str, Tensor]:
        conv = self.module
        scale_B = weights_B.to(self.output_grads) * self.factor
        y = self.output_grads * scale_B.reshape(-1, *[1] * (self.output_grads.ndim - 1))
        grads = {}
        if "weight" in self.controls and self._few_positions:
            x_BIL = unfold(self.inputs, conv.kernel_size, conv.stride, self._padding, conv.dilation)
            x_IP = x_BIL.transpose(0, 1).flatten(1)
            grads["weight"] = (y.transpose(0, 1).flatten(1) @ x_IP.mT).reshape(conv.weight.shape)
        elif "weight" in self.controls:
            # By the library's own kernel. Positions that the stride leaves over at the border: the output
            # gradient's size decides, as in autograd.
            grads["weight"] = _WEIGHT_GRADS[len(conv.kernel_size)](
                self.inputs, list(conv.weight.shape), y, conv.stride, self._padding, conv.dilation, conv.groups
            )
        if "bias" in self.controls:
            grads["bias"] = y.sum((0, *range(2, y.ndim)))
        return grads

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        conv = self.module
        weight = direction["weight"] if "weight" in self.controls else conv.weight.new_zeros(conv.weight.shape)
        along = _CONVOLUTIONS[len(conv.kernel_size)](
            self.inputs,
            weight,
            direction["bias"] if "bias" in self.controls else None,
            conv.stride,
            self._padding,
            conv.dilation,
            conv.groups,
        )
        return (along * self.output_grads).flatten(1).sum(1) * self.factor


def unfold(
    inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a convolution's kernel sees at each position: (B, C, *space) -> (B, C * kernel elements, positions).

    torch.nn.functional.unfold for any number of dimensions, in its order: channels and then kernel elements in a
    row, positions along the last dimension.
    """
    if len(kernel) == 2:  # a fused kernel, a quarter faster than the copy below on (32, 64, 32, 32) and 3x3
        return F.unfold(inputs, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    windows = F.pad(inputs, [amount for each in reversed(padding) for amount in (each, each)])
    for dimension, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(dimension, gap * (size - 1) + 1, step)[..., ::gap]
    n = len(kernel)
    positions = windows.shape[2 : 2 + n]
    elements_first = windows.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
    return elements_first.reshape(inputs.shape[0], -1, positions.numel())


def _reversed_padding(conv: nn.Conv2d) -> list[int | None]:
    """Padding of the last dimension first; None stands for "same"."""
    if conv.padding == "same":
        return [None] * len(conv.kernel_size)
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    return list(reversed(cast(tuple[int, ...], conv.padding)))
