"""Fast ways to Gram matrices and weighted gradients: equal to the plain ones, and chosen by counted work."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gtddp_dist.capture import MicroBatch
from gtddp_dist.groups import StepSamples
from gtddp_dist.players import (
    AffineGradients,
    FormedGradients,
    GramPath,
    SampleGradients,
    Scale,
    prepare,
    sample_gradients,
)
from gtddp_dist.players import pairs as pairs_module
from gtddp_dist.players.conv import SHIFTED_CHANNELS, SHIFTED_POSITIONS
from gtddp_dist.trajectory import Player

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def captured(module: nn.Module, samples: int, space: tuple[int, ...], seed: int = 0) -> AffineGradients:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    torch.manual_seed(seed)
    x = torch.randn([samples, module.in_channels, *space], dtype=torch.float64)
    y = torch.randn_like(module(x))
    part = sample_gradients(module, prepare(module, x), y, 1.5)
    assert isinstance(part, AffineGradients)
    return part


along = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))
"""Size, kernel, stride, padding and dilation of one dimension."""


@settings(max_examples=150, deadline=None)
@given(
    dimensions=st.lists(along, min_size=1, max_size=3),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "circular", "replicate"]),
    samples=st.integers(1, 5),
    block_rows=st.sampled_from([1, 20, 10**6]),
)
def test_pairs_are_the_gram_matrix_of_formed_gradients(
    dimensions: list[tuple[int, ...]], groups: int, bias: bool, mode: str, samples: int, block_rows: int
) -> None:
    size, kernel, stride, padding, dilation = zip(*dimensions, strict=True)
    fits = all(n + 2 * p > d * (k - 1) for n, k, _, p, d in dimensions)
    if not fits or (mode == "circular" and any(p > n for n, _, _, p, _ in dimensions)):
        return
    module = CONVOLUTIONS[len(size)](
        2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias, mode, dtype=torch.float64
    )
    part = captured(module, samples, size)
    metric: dict[str, Scale] = {"weight": 0.5, "bias": 2.0}
    expected = part.gram(metric, "materialise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pairs_module.BLOCK_ROWS, "cpu", block_rows)
        paths: tuple[GramPath, ...] = ("pixels", "positions")
        for path in paths:
            torch.testing.assert_close(
                part.gram(metric, path), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max())
            )


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(3, 4, (3, 2), (1, 2), 1, (1, 2), bias=False),
        nn.Conv1d(3, 4, 3, 2, 1),
        nn.Conv3d(2, 3, 2, 1, 1),
        nn.Conv2d(4, 4, 3, 1, 1, groups=2),
    ],
    ids=str,
)
def test_one_product_makes_weighted_gradients(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    part = captured(module.double(), 5, (6,) * (next(module.parameters()).ndim - 2))
    weights = torch.randn(5, dtype=torch.float64)
    found = {}
    for limit in (0, 10**9):
        monkeypatch.setattr("gtddp_dist.players.conv.PRODUCT_POSITIONS", limit)
        found[limit] = part.weighted(weights)
    for name, expected in found[0].items():
        torch.testing.assert_close(found[10**9][name], expected, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------
# Norms


def test_each_micro_batch_has_its_own_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    batches = []
    for n, offset in ((4, 5.0), (3, -2.0)):
        x, y = torch.randn(n, 3, 4, 4, dtype=torch.float64) * 2 + offset, torch.randn(n, 3, 4, 4, dtype=torch.float64)
        batches.append(MicroBatch(n, inputs={norm: x}, derivatives={"gradient": {norm: y}}))
    found = StepSamples(batches, 2.0).of(Player(0, {"norm": norm}), "gradient")
    assert found is not None
    expected = [
        2 * (b.derivatives["gradient"][norm] * nn.functional.batch_norm(b.inputs[norm], None, None, training=True))
        for b in batches
    ]
    torch.testing.assert_close(found.per_sample()["norm.weight"], torch.cat(expected).sum((2, 3)))


def test_formed_gradients_add_up_like_others() -> None:
    module = nn.Conv2d(2, 3, 3).double()
    own, other = captured(module, 3, (5, 5)), captured(module, 6, (5, 5), seed=1)
    other.inputs = own.inputs.repeat_interleave(2, dim=0)
    weights = torch.randn(6, dtype=torch.float64)
    expected = own.plus(other, weights).per_sample()
    found = FormedGradients(module, own.per_sample()).plus(other, weights).per_sample()
    for name, grads in expected.items():
        torch.testing.assert_close(found[name], grads, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------
# Counted work


def counted(part: SampleGradients, samples: int) -> tuple[bool, int, int]:
    """Whether gradients are formed, and multiplications and additions of Gram matrix (with forming) and S^T w."""
    metric: dict[str, Scale] = dict.fromkeys(part.controls, 1.0)
    with FlopCounterMode(display=False) as gram:
        formed = part.formed(False, samples)
        formed.gram(metric)
    with FlopCounterMode(display=False) as weighted:
        formed.weighted(torch.ones(samples))
    return isinstance(formed, FormedGradients), gram.get_total_flops(), weighted.get_total_flops()


def layer(C: int, O: int, pixels: int, kernel: int, stride: int, B: int) -> SampleGradients:  # noqa: E741
    """A layer of ResNet18 for 32 x 32 pixels."""
    module = nn.Conv2d(C, O, kernel, stride, kernel // 2, bias=False)
    x, y = torch.zeros(B, C, pixels, pixels), torch.zeros(B, O, pixels // stride, pixels // stride)
    return sample_gradients(module, x, y)


@pytest.mark.parametrize(
    ("C", "O", "pixels", "kernel", "stride"),
    [(3, 64, 32, 3, 1), (64, 64, 32, 3, 1), (64, 128, 32, 3, 2), (128, 128, 16, 3, 1)],
)
@pytest.mark.parametrize("B", [8, 16])
def test_large_images_keep_per_sample_gradients(C: int, O: int, pixels: int, kernel: int, stride: int, B: int) -> None:  # noqa: E741
    size, I = pixels // stride, C * kernel**2  # noqa: E741
    rows = [size] * kernel  # of each kernel element's column, what lies between rows of positions included
    if size**2 >= SHIFTED_POSITIONS and C >= SHIFTED_CHANNELS:
        rows = [size + 2] * 3 if stride == 1 else [size + 1, size, size + 1]
    forming = 2 * B * C * O * kernel * size * sum(rows)
    expected = (True, forming + 2 * B * B * I * O, 2 * B * I * O)
    assert counted(layer(C, O, pixels, kernel, stride, B), B) == expected


def test_per_sample_gradients_too_large_to_keep_are_formed_in_blocks() -> None:
    B, C, O, L = 16, 128, 256, 64  # noqa: E741
    forming = 2 * B * C * O * 8 * 3 * (9 + 8 + 9)
    assert counted(layer(C, O, 16, 3, 2, B), B) == (False, forming + 2 * B * B * C * 9 * O, 2 * B * L * C * 9 * O)


@pytest.mark.parametrize(
    ("C", "O", "pixels", "kernel", "stride", "B", "cut"),
    [
        (128, 256, 16, 3, 2, 8, [8]),
        (256, 256, 8, 3, 1, 8, [8]),
        (256, 256, 8, 3, 1, 32, [8] * 4),
        (256, 512, 8, 3, 2, 8, [8]),
        (256, 512, 8, 1, 2, 8, [8]),
        (512, 512, 4, 3, 1, 8, [8]),
        (512, 512, 4, 3, 1, 40, [20] * 2),
    ],
)
def test_small_images_take_pairs_of_pixels(
    C: int,
    O: int,  # noqa: E741
    pixels: int,
    kernel: int,
    stride: int,
    B: int,
    cut: list[int],
) -> None:
    """Pairs of blocks on one side of the diagonal; with a stride of 2, four phases of a quarter of the pixels each."""
    L = (pixels // stride) ** 2
    phases = 1 if kernel == 1 or stride == 1 else 4
    pairs = sum(a * b for a, b in itertools.combinations_with_replacement(cut, 2))
    expected = (False, 2 * pairs * L * L * (phases * C + O), 2 * B * L * C * kernel**2 * O)
    assert counted(layer(C, O, pixels, kernel, stride, B), B) == expected


def test_the_cheapest_path_follows_the_samples_of_a_group() -> None:
    part = layer(256, 256, 8, 3, 1, 4)
    assert isinstance(part, AffineGradients)
    assert part.cheapest_path(8) == "pixels"  # 0.2e9 multiplications in all against 0.5e9
    assert part.cheapest_path(256) == "materialise"  # pairs grow with the square of the samples
    patches = sample_gradients(nn.Conv2d(3, 768, 16, 16), torch.zeros(8, 3, 32, 32), torch.zeros(8, 768, 2, 2))
    assert isinstance(patches, AffineGradients)
    assert patches.cheapest_path(8) == "positions"  # 256 phases of four pixels: unfolded is less to go over
    linear = sample_gradients(nn.Linear(512, 10), torch.zeros(32, 512), torch.zeros(32, 10))
    assert isinstance(linear, AffineGradients)
    assert linear.cheapest_path(32) == "positions"
