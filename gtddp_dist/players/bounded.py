"""A layer's per-sample gradients and Gram matrix within a budget of memory (`budget`): some input channels at a time.

No work is done twice: a channel's gradients are formed once, and their products added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Scale, is_diagonal
from .budget import Budget

if TYPE_CHECKING:
    from .affine import AffineGradients, GramPath


def least_bytes(part: AffineGradients) -> int:
    """The least memory that the Gram matrix of these samples can be formed in, one input channel at a time."""
    return (_fixed(part) + part.channel_numbers()) * part.output_grads.element_size()


def bounded_gram(part: AffineGradients, inverse_metric: Mapping[str, Scale], path: GramPath, held: Budget) -> Tensor:
    """S R^-1 S^T of a layer with a trainable weight; ``path`` is taken where it keeps to the budget."""
    scale = inverse_metric["weight"]
    if path != "materialise" and part.pair_numbers(path) * part.output_grads.element_size() <= held.half:
        gram = scale * part.pair_gram(path)
    else:
        gram = part.output_grads.new_zeros(len(part.output_grads), len(part.output_grads))
        rows = scale.reshape(part.channel_groups, -1, scale[0].numel()) if is_diagonal(scale) else None
        for group, inputs, block in _chunks(part, held):
            if rows is not None:
                block.mul_(rows[group][:, inputs].sqrt())
            flat = block.flatten(1)
            gram += flat @ flat.mT
            del block, flat  # before the next is there
        gram = gram * part.factor**2 if rows is not None else gram * (scale * part.factor**2)
    if "bias" in part.controls:
        bias, scale = _bias(part), inverse_metric["bias"]
        gram = gram + ((bias * scale) @ bias.mT) * part.factor**2
    return gram


def bounded_gradients(part: AffineGradients, held: Budget) -> dict[str, Tensor]:
    """S by parameter name, but for the factor; beside it, no more is taken than the budget has."""
    grads = {}
    if "weight" in part.controls:
        weight = part.controls["weight"]
        S_BGOI = part.output_grads.new_empty(
            len(part.output_grads), part.channel_groups, weight.shape[0] // part.channel_groups, weight[0].numel()
        )
        for group, inputs, block in _chunks(part, held):
            S_BGOI[:, group, :, inputs] = block
            del block
        grads["weight"] = S_BGOI.reshape(-1, *weight.shape)
    if "bias" in part.controls:
        grads["bias"] = _bias(part)
    return grads


def _chunks(part: AffineGradients, held: Budget) -> Iterator[tuple[int, slice, Tensor]]:
    """Channel group, which of its inputs, and every sample's gradient of the weight there, shape (B, O, i)."""
    numbers = held.half // part.output_grads.element_size() - _fixed(part)
    some = max(1, numbers // part.channel_numbers())
    for group in range(part.channel_groups):
        y_BOL = part.output_channels(group)
        for first in range(0, part.channels, some):
            x_BiL = part.input_channels(group, slice(first, first + some))
            each = part.inputs_of_channel
            inputs = slice(first * each, first * each + x_BiL.shape[1])
            yield group, inputs, torch.bmm(y_BOL, x_BiL.mT)
            del x_BiL


def _bias(part: AffineGradients) -> Tensor:
    return torch.cat([part.output_channels(group).sum(2) for group in range(part.channel_groups)], dim=1)


def _fixed(part: AffineGradients) -> int:
    """Numbers besides those of channels: the matrix, its sum, and a product that is added to it."""
    return 3 * len(part.output_grads) ** 2
