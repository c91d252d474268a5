"""Per-sample gradients of a convolution's weight, one kernel element at a time and without unfolding.

The gradient at kernel element k is Y X_k^T: output gradients times the pixels that k sees at each position. In memory
the pixels that k sees are those that any other element of its phase sees, some places further on, once the image is
padded so that rows of positions and rows of pixels have the same length. So X_k is a view of the padded image, and what
lies in it between rows meets zeros of Y.

Shape suffixes beyond those of `base`: C channels of a group; S space and K kernel, one dimension for each of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Block, block_numbers
from .pairs import Phase

PADDED_BLOCKS = 4
"""Numbers of some samples' padded images, in blocks: with fewer, batches of matrix products become too small."""


def shifted_gradients(x_BGCS: Tensor, y_BGOS: Tensor, seen: Sequence[Phase], kernel: Sequence[int]) -> Tensor:
    """Every sample's gradient of the weight, shape (B, G, O, C, *kernel); kernel elements come first in memory.

    Args:
        x_BGCS: inputs, shape (B, G, C, *space).
        y_BGOS: output gradients, shape (B, G, O, *space of the output).
        seen: the phases of the inputs.
        kernel: the kernel's size.
    """
    B, G, C = x_BGCS.shape[:3]
    O = y_BGOS.shape[2]  # noqa: E741
    # An element that sees nothing but padding is in no phase: its gradient stays 0.
    found = x_BGCS.new_zeros if sum(_elements(phase) for phase in seen) < math.prod(kernel) else x_BGCS.new_empty
    grads_KBGOC = found(*kernel, B, G, O, C)
    for phase in seen:
        padded = _Padded.of(phase, y_BGOS.shape[3:])
        parts = max(
            1, round(B * G * (C + O) * math.prod(padded.extent) / (PADDED_BLOCKS * block_numbers(x_BGCS.device)))
        )
        samples = math.ceil(B / parts)  # of a part, so that padded copies stay small
        for first in range(0, B, samples):
            some = slice(first, first + samples)
            pixels = (some, slice(None), slice(None), *phase.pixels)
            x = padded.pixels(x_BGCS[pixels].flatten(0, 1))
            y = padded.positions(y_BGOS[some].flatten(0, 1))
            for place, start in padded.starts:
                torch.bmm(y, x[:, start : start + y.shape[2]], out=grads_KBGOC[place][some].flatten(0, 1))
    n = len(kernel)
    return grads_KBGOC.permute(n, n + 1, n + 2, n + 3, *range(n))


def shifted_blocks(x_BGCS: Tensor, y_BGOS: Tensor, seen: Sequence[Phase]) -> Iterator[Block]:
    """The same in blocks, one kernel element and some channels each; those that see nothing but padding have none."""
    B, G, C = x_BGCS.shape[:3]
    O = y_BGOS.shape[2]  # noqa: E741
    size = min(C, max(1, block_numbers(x_BGCS.device) // (B * G * O)))
    memory = x_BGCS.new_empty(B * G * O * size)
    for phase in seen:
        padded = _Padded.of(phase, y_BGOS.shape[3:])
        pixels = (slice(None), slice(None), slice(None), *phase.pixels)
        x = padded.pixels(x_BGCS[pixels].flatten(0, 1))
        y = padded.positions(y_BGOS.flatten(0, 1))
        for (place, start), first in itertools.product(padded.starts, range(0, C, size)):
            channels = slice(first, min(C, first + size))
            block = memory[: B * G * O * (channels.stop - first)].view(B * G, O, -1)
            torch.bmm(y, x[:, start : start + y.shape[2], channels], out=block)
            yield Block((channels, *place), block.view(B, G, O, -1))


@dataclass(frozen=True)
class _Padded:
    """How images are padded for one phase.

    Attributes:
        extent: size along each dimension of space.
        before: padding before the pixels, along each.
        sizes: pixels along each.
        outputs: positions along each.
        starts: for each kernel element, where in a padded image the first pixel is that it sees.
    """

    extent: tuple[int, ...]
    before: tuple[int, ...]
    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    starts: tuple[tuple[tuple[int, ...], int], ...]

    @classmethod
    def of(cls, phase: Phase, outputs: Sequence[int]) -> _Padded:
        before = tuple(max(0, -min(each)) for each in phase.offsets)
        extent = tuple(n + max(each) + b for n, each, b in zip(outputs, phase.offsets, before, strict=True))
        steps = [math.prod(extent[axis + 1 :]) for axis in range(len(extent))]
        starts = []
        along = (zip(e, o, strict=True) for e, o in zip(phase.elements, phase.offsets, strict=True))
        for seen in itertools.product(*along):
            start = sum((offset + b) * step for (_, offset), b, step in zip(seen, before, steps, strict=True))
            starts.append((tuple(element for element, _ in seen), start))
        return cls(extent, before, phase.sizes, tuple(outputs), tuple(starts))

    def pixels(self, x_BCS: Tensor) -> Tensor:
        """(B, C, *space) -> (B, pixels, C), padded; products of what lies in memory like that are the fastest."""
        extent = [self.extent[0] + 1, *self.extent[1:]]  # the last element's view ends somewhat behind the last row
        x_BSC = x_BCS.new_zeros(len(x_BCS), *extent, x_BCS.shape[1])
        some = [min(size, n - before) for size, n, before in zip(self.sizes, extent, self.before, strict=True)]
        inside = (slice(None), *(slice(b, b + size) for b, size in zip(self.before, some, strict=True)))
        seen = (
            slice(None),
            slice(None),
            *(slice(size) for size in some),
        )  # a stride may leave pixels over at the border
        x_BSC[inside] = x_BCS[seen].movedim(1, -1)
        return x_BSC.flatten(1, -2)

    def positions(self, y_BOS: Tensor) -> Tensor:
        """(B, O, *space of the output) -> (B, O, positions): rows as long as those of the pixels."""
        after = [0, *(e - n for e, n in zip(self.extent[1:], self.outputs[1:], strict=True))]
        return F.pad(y_BOS, [amount for each in reversed(after) for amount in (0, each)]).flatten(2)


def _elements(phase: Phase) -> int:
    return math.prod(len(each) for each in phase.elements)
