"""Gram matrices by pairs of positions: <g_b, g_b'> without either gradient.

A sample's gradient is a sum over positions q of y_q x_q^T, so <g_b, g_b'> is the sum over q and q' of
<y_bq, y_b'q'> <x_bq, x_b'q'>: two Gram matrices of all positions of all samples, multiplied entry by entry. What a
convolution's kernel sees at q are the pixels q + k, one for each kernel element k, and <x_bq, x_b'q'> is the sum over k
of the inner products of pixels q + k and q' + k: shifted diagonals of the Gram matrix of the pixels themselves, which
has as many channels fewer as the kernel has elements. With a stride, elements with the same k modulo the stride see
pixels of one *phase*, every stride-th of them.

Samples are taken in blocks, and only pairs of blocks on one side of the diagonal: that halves the work and bounds
memory.

Shape suffixes beyond those of `base`: S the positions, one dimension for each of space, between group and samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

BLOCK_ROWS = {"cpu": 2**9}
"""Rows (samples times positions) of a block by device: pairs of them stay in a core's cache."""
OTHER_BLOCK_ROWS = 2**13
"""On other devices: few large products rather than many small ones."""

PASS = 32
"""What it costs to go over one number element by element, in multiplications of a matrix product (measured: 0.4 ns and
75 a nanosecond on a CPU core; only the choice between ways to the same matrix depends on it)."""


@dataclass(frozen=True)
class Phase:
    """The pixels that some of a kernel's elements see.

    Attributes:
        pixels: which they are, along each dimension of space.
        sizes: how many, likewise.
        elements: along each dimension, the kernel elements that see them.
        offsets: along each dimension, for each of these, the number of the pixel at position 0.
    """

    pixels: tuple[slice, ...]
    sizes: tuple[int, ...]
    elements: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]


def phases(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[Phase]:
    """All phases that a kernel sees of a space of that size; those without a pixel are left out."""
    along: list[list[tuple[slice, int, tuple[int, ...], tuple[int, ...]]]] = []
    for size, elements, step, border, gap in zip(space, kernel, stride, padding, dilation, strict=True):
        seeing: dict[int, list[tuple[int, int]]] = {}
        for element in range(elements):
            offset, start = divmod(element * gap - border, step)
            seeing.setdefault(start, []).append((element, offset))
        along.append(
            [
                (
                    slice(start, size, step),
                    len(range(start, size, step)),
                    tuple(element for element, _ in found),
                    tuple(offset for _, offset in found),
                )
                for start, found in seeing.items()
                if start < size
            ]
        )
    return [Phase(*zip(*each, strict=True)) for each in itertools.product(*along)]


def unfolded(positions: int) -> list[Phase]:
    """The one phase of inputs that are as the layer sees them, position by position, along one dimension."""
    return [Phase((slice(None),), (positions,), ((0,),), ((0,),))]


def blocks(samples: int, positions: int, device: str) -> list[slice]:
    """The samples in blocks of nearly the same size."""
    rows = BLOCK_ROWS.get(device, OTHER_BLOCK_ROWS)
    count = math.ceil(samples / max(1, rows // positions))
    bounds = [index * samples // count for index in range(count + 1)]
    return [slice(*each) for each in itertools.pairwise(bounds)]


def pair_cost(samples: int, seen: Sequence[Phase], outputs: int, I: int, O: int, device: str) -> int:  # noqa: E741
    """What :func:`pair_gram` costs a channel group, in multiplications.

    Args:
        samples: B.
        seen: the phases.
        outputs: positions of the output.
        I, O: channels of a group's input and output.
        device: the type of the device.
    """
    largest = max([outputs, *(math.prod(phase.sizes) for phase in seen)])
    cut = [each.stop - each.start for each in blocks(samples, largest, device)]
    pairs = sum(a * b for index, a in enumerate(cut) for b in cut[index:])
    cost = outputs**2 * (O + 2 * PASS)
    for phase in seen:
        pixels, passes = math.prod(phase.sizes), sum(len(each) for each in phase.offsets) + 1
        cost += pixels**2 * I + max(pixels, outputs) ** 2 * passes * PASS
    return pairs * cost


def pair_numbers(samples: int, seen: Sequence[Phase], outputs: int, device: str) -> int:
    """Numbers that :func:`pair_gram` makes of a pair of blocks and a channel group, at most at once."""
    largest = max([outputs, *(math.prod(phase.sizes) for phase in seen)])
    rows = max(each.stop - each.start for each in blocks(samples, largest, device)) * largest
    return 4 * rows**2  # of pixels, two steps of the sum over kernel elements, and the sum over phases or outputs


def pair_gram(x_GSBI: Tensor, y_GSBO: Tensor, seen: Sequence[Phase]) -> Tensor:
    """S S^T, shape (B, B), of the weight's per-sample gradients.

    Args:
        x_GSBI: inputs, their pixels as the dimensions between the first and the last two.
        y_GSBO: output gradients, their positions likewise.
        seen: the phases of the inputs.
    """
    G, B = x_GSBI.shape[0], x_GSBI.shape[-2]
    outputs = y_GSBO.shape[1:-2]
    largest = max([math.prod(outputs), *(math.prod(phase.sizes) for phase in seen)])
    cut = blocks(B, largest, x_GSBI.device.type)
    places = [(slice(None), *phase.pixels) for phase in seen]
    pixels = [x_GSBI[place] for place in places]
    x_rows = [[x[..., each, :].reshape(G, -1, x.shape[-1]) for each in cut] for x in pixels]
    y_rows = [y_GSBO[..., each, :].reshape(G, -1, y_GSBO.shape[-1]) for each in cut]
    gram = x_GSBI.new_zeros(B, B)
    for first, second in itertools.combinations_with_replacement(range(len(cut)), 2):
        sizes = [cut[index].stop - cut[index].start for index in (first, second)]
        total: Tensor | None = None
        for phase, rows in zip(seen, x_rows, strict=True):
            of_pixels = (rows[first] @ rows[second].mT).reshape(G, *phase.sizes, sizes[0], *phase.sizes, sizes[1])
            of_positions = _shifted(of_pixels, phase, outputs)
            total = of_positions if total is None else total.add_(of_positions)
        if total is None:  # the kernel sees nothing but padding
            continue
        of_outputs = (y_rows[first] @ y_rows[second].mT).reshape(total.shape)
        n = len(outputs)
        own = total.mul_(of_outputs).sum((*range(1 + n), *range(2 + n, 2 + 2 * n)))
        gram[cut[first], cut[second]] = own
        if first != second:
            gram[cut[second], cut[first]] = own.mT
    return gram


def _shifted(gram: Tensor, phase: Phase, outputs: Sequence[int]) -> Tensor:
    """Pixels (G, *S, B, *S, B) -> positions: the sum over kernel elements, dimension after dimension."""
    n = len(outputs)
    for axis, (length, offsets) in enumerate(zip(outputs, phase.offsets, strict=True)):
        here, there = 1 + axis, 2 + n + axis
        size = gram.shape[here]
        if offsets == (0,) and size == length:
            continue
        shape = list(gram.shape)
        shape[here] = shape[there] = length
        total = gram.new_zeros(shape)
        for offset in offsets:
            low, high = max(0, -offset), min(length, size - offset)
            if high > low:
                total.narrow(here, low, high - low).narrow(there, low, high - low).add_(
                    gram.narrow(here, low + offset, high - low).narrow(there, low + offset, high - low)
                )
        gram = total
    return gram
