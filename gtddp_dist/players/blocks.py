"""Products of per-sample gradients by runs of memory and by blocks that stay in the cache.

Per-sample gradients are many times the size of what they are made of, so that on a CPU a step's time goes into writing
and reading them rather than into multiplying them. Two ways to touch less memory:

* Those that are kept may have any order of dimensions in memory; nothing here puts them into another one.
* Those that are only needed for a Gram matrix are formed for a few inputs of the layer at a time, all of them in the
  same small piece of memory. Of a convolution (`shifts`) that is a kernel element at a time.

Shape suffixes beyond those of `base`: T runs of memory, n numbers of a sample in each, i the inputs of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_NUMBERS = {"cpu": 2**21}
"""Numbers of a block by device: 8 MB in single precision, which stay in a processor's cache. Blocks of half that take a
tenth more time, of twice that the same."""
OTHER_BLOCK_NUMBERS = 2**26
"""On other devices: few large products."""


def block_numbers(device: torch.device) -> int:
    """How many numbers a block may have there."""
    return BLOCK_NUMBERS.get(device.type, OTHER_BLOCK_NUMBERS)


@dataclass(frozen=True)
class Block:
    """Some entries of every sample's gradient.

    Attributes:
        which: of the inputs (of a convolution: channels, then the kernel element).
        grads: shape (B, G, O, i). The next block takes the same memory.
    """

    which: tuple[slice | int, ...]
    grads: Tensor

    @property
    def where(self) -> tuple[slice | int, ...]:
        """In something of the shape (G, O, *inputs)."""
        return (slice(None), slice(None), *self.which)


def memory_order(grads: Tensor) -> list[int]:
    """The dimensions, those with the longest stride first."""
    return sorted(range(grads.ndim), key=grads.stride, reverse=True)


def runs(grads: Tensor) -> Tensor:
    """(B, ...) as it lies in memory, shape (T, B, n): a view, if B alone is cut."""
    order = memory_order(grads)
    place = order.index(0)
    before = math.prod(grads.shape[d] for d in order[:place])
    after = math.prod(grads.shape[d] for d in order[place + 1 :])
    return grads.permute(order).reshape(before, grads.shape[0], after)


def runs_like(value: Tensor, grads: Tensor) -> Tensor:
    """Something of a parameter's shape in the order of its per-sample gradients, shape (T, n)."""
    order = memory_order(grads)
    place = order.index(0)
    before = math.prod(grads.shape[d] for d in order[:place])
    return value.permute([d - 1 for d in order if d]).reshape(before, -1)


def weighted_runs(weights_B: Tensor, grads: Tensor) -> Tensor:
    """S^T w in the parameter's shape."""
    rest = [d for d in memory_order(grads) if d]
    summed = (weights_B @ runs(grads)).reshape([grads.shape[d] for d in rest])
    return summed.permute([rest.index(d) for d in range(1, grads.ndim)]).contiguous()


def inner_runs(grads: Tensor, direction: Tensor) -> Tensor:
    """S d, shape (B,)."""
    return (runs(grads) @ runs_like(direction, grads)[..., None]).sum((0, 2))


def gram_runs(grads: Tensor, scale: Tensor | None) -> Tensor:
    """S diag(scale) S^T, shape (B, B)."""
    runs_TBn = runs(grads)
    if scale is None:
        return (runs_TBn @ runs_TBn.mT).sum(0)
    scale_Tn = runs_like(scale, grads)
    T, B, n = runs_TBn.shape
    size = min(n, max(1, block_numbers(grads.device) // B))
    memory, gram = grads.new_empty(B * size), grads.new_zeros(B, B)
    for run, first in ((run, first) for run in range(T) for first in range(0, n, size)):
        block = runs_TBn[run, :, first : first + size]
        scaled = memory[: block.numel()].view(block.shape)
        torch.mul(block, scale_Tn[run, first : first + size], out=scaled)
        gram += scaled @ block.mT  # torch counts the operations of this, but not of addmm_
    return gram


def gradient_blocks(x_BGLI: Tensor, y_BGLO: Tensor) -> Iterator[Block]:
    """Per-sample gradients sum over positions of y x^T, some inputs at a time."""
    B, G, _, I = x_BGLI.shape  # noqa: E741
    O = y_BGLO.shape[3]  # noqa: E741
    x, y = x_BGLI.flatten(0, 1), y_BGLO.mT.flatten(0, 1)
    size = min(I, max(1, block_numbers(x.device) // (B * G * O)))
    memory = x.new_empty(B * G * O * size)
    for first in range(0, I, size):
        inputs = slice(first, min(I, first + size))
        block = memory[: B * G * O * (inputs.stop - first)].view(B * G, O, -1)
        torch.bmm(y, x[:, :, inputs], out=block)
        yield Block((inputs,), block.view(B, G, O, -1))


def gram_of_blocks(found: Iterable[Block], samples: int, like: Tensor, scale: Tensor | None) -> Tensor:
    """S diag(scale) S^T, shape (B, B), without S as a whole.

    Args:
        found: S in blocks, which are changed.
        samples: B.
        like: of the dtype and device.
        scale: not negative, shape (G, O, *inputs); None stands for ones.
    """
    gram = like.new_zeros(samples, samples)
    root = None if scale is None else scale.sqrt()
    for block in found:
        if root is not None:
            block.grads.mul_(root[block.where].contiguous())
        flat = block.grads.flatten(1)
        gram += flat @ flat.mT
    return gram


def mean_square_of_blocks(found: Iterable[Block], like: Tensor) -> Tensor:
    """The mean over samples of the squares of S, shape (G, O, *inputs) as ``like``, without S as a whole."""
    squares = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for block in found:
        squares[block.where] = block.grads.square_().mean(0)
    return squares
