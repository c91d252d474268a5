"""Data sets and the order of samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gtddp_dist.config import DataConfig
from gtddp_dist.data import DataSet, network_input
from gtddp_dist.data.batches import BatchOrder
from gtddp_dist.data.digits import load
from gtddp_dist.errors import UserError


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load(DataConfig())


def test_digits_has_the_sizes_and_the_range_of_the_standard_split(digits: DataSet) -> None:
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.validation_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.float32
    assert (float(digits.train_images.min()), float(digits.train_images.max())) == (0.0, 1.0)
    # 17 grey levels: division by 16 is exact in every floating-point type.
    assert torch.equal(digits.train_images * 16, (digits.train_images * 16).round())
    assert (digits.classes, digits.in_channels, digits.image_size) == (10, 1, (8, 8))


def test_digits_is_stratified_and_complete(digits: DataSet) -> None:
    train = digits.train_labels.bincount(minlength=10)
    validation = digits.validation_labels.bincount(minlength=10)
    share = validation / (train + validation)
    assert (share - 360 / 1797).abs().max() < 0.003  # less than one sample of a class off
    images = torch.cat([digits.train_images, digits.validation_images])
    assert len(images.flatten(1).unique(dim=0)) == 1797  # no image is in both parts (all of them differ)


def test_digits_split_is_always_the_same(digits: DataSet) -> None:
    again = load(DataConfig())
    assert torch.equal(again.train_images, digits.train_images)
    # Labels of the first samples of the split with random_state=0, written down once.
    assert digits.train_labels[:12].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8, 3, 5]


def test_a_data_set_without_images_has_all_else(digits: DataSet) -> None:
    """What ranks keep that read none."""
    bare = digits.without_images()
    assert bare.train_images.numel() == bare.validation_images.numel() == 0
    assert torch.equal(bare.train_labels, digits.train_labels) and len(bare.validation_images) == 360
    assert len(network_input(bare.train_images[torch.arange(5)], torch.float64).chunk(2)) == 2


def test_an_epoch_visits_a_sample_at_most_once_and_drops_the_partial_batch() -> None:
    order = BatchOrder(samples=23, batch_size=5, seed=0)
    assert order.steps_per_epoch == 4
    left_out = []
    for epoch in range(3):
        batches = [order.batch_indices(epoch * 4 + i) for i in range(4)]
        seen = torch.cat(batches)
        assert all(len(batch) == 5 for batch in batches)
        assert len(seen.unique()) == 20 and seen.min() >= 0 and seen.max() < 23
        left_out.append(frozenset(range(23)) - frozenset(seen.tolist()))
    assert len(set(left_out)) == 3  # not always the same samples


def test_the_order_depends_on_seed_and_step_alone() -> None:
    forwards = BatchOrder(100, 10, seed=7)
    backwards = BatchOrder(100, 10, seed=7)
    there = [forwards.batch_indices(step) for step in range(25)]
    back = [backwards.batch_indices(step) for step in reversed(range(25))]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    torch.manual_seed(1)
    assert torch.equal(BatchOrder(100, 10, seed=7).batch_indices(13), there[13])
    assert not torch.equal(BatchOrder(100, 10, seed=8).batch_indices(13), there[13])
    assert not torch.equal(there[3], there[13])  # another epoch, another order


def test_a_batch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size is 101, .* only 100 samples"):
        BatchOrder(100, 101, seed=0)
    assert BatchOrder(100, 100, seed=0).steps_per_epoch == 1


def test_network_input_scales_bytes_and_leaves_floats() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert network_input(pixels, torch.float64).tolist() == [0.0, 0.2, 1.0]
    floats = torch.tensor([0.5, 3.0])
    assert torch.equal(network_input(floats, torch.float32), floats)
    assert network_input(floats, torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": torch.zeros(4, 8, 8)}, r"train_images has the shape \(4, 8, 8\)"),
        ({"train_images": torch.zeros(4, 1, 8, 8, dtype=torch.int32)}, "train_images is torch.int32"),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, r"train_labels .* of the shape \(3,\)"),
        ({"train_labels": torch.zeros(4)}, "train_labels is torch.float32"),
        ({"validation_labels": torch.tensor([2])}, "validation_labels has values from 2 to 2, outside 0 to 1"),
        ({"validation_images": torch.zeros(1, 3, 8, 8)}, r"validation images of \(3, 8, 8\)"),
    ],
)
def test_a_data_set_whose_parts_do_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    right = DataSet(
        name="two",
        train_images=torch.zeros(4, 1, 8, 8),
        train_labels=torch.tensor([0, 1, 0, 1]),
        validation_images=torch.zeros(1, 1, 8, 8),
        validation_labels=torch.tensor([1]),
        classes=2,
    )
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(right, **change)
