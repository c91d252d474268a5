"""Data sets and the order of samples."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gtddp_dist.cli import main
from gtddp_dist.config import DataConfig
from gtddp_dist.data import DataSet, network_input
from gtddp_dist.data.batches import BatchOrder
from gtddp_dist.data.cifar import load_cifar10, load_cifar100
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


# ----------------------------------------------------------------------------------------------------------
# CIFAR, from small files in its format

FILES = {
    "cifar10": [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"],
    "cifar100": ["train.bin", "test.bin"],
}


def pixel(sample: int, channel: int, row: int, column: int) -> int:
    """What the images of the small files hold."""
    return (sample * 7 + channel * 50 + row * 3 + column) % 256


def write_cifar(folder: Path, name: str, samples: int = 4) -> None:
    """Each file gets `samples` images with the labels 0, 1, 2, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES[name]:
        with open(folder / file, "wb") as out:
            for sample in range(samples):
                out.write(bytes([sample % 2] if name == "cifar100" else []))  # the coarse label
                out.write(bytes([sample]))
                places = itertools.product(range(3), range(32), range(32))
                out.write(bytes(pixel(sample, *place) for place in places))


@pytest.mark.parametrize(("name", "train"), [("cifar10", 20), ("cifar100", 4)])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_is_read_from_its_binary_files(tmp_path: Path, name: str, train: int, inside: bool) -> None:
    folder = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    write_cifar(tmp_path / folder if inside else tmp_path, name)
    load_it = {"cifar10": load_cifar10, "cifar100": load_cifar100}[name]
    data = load_it(DataConfig(name=name, dir=str(tmp_path)))
    assert data.train_images.shape == (train, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 1, 2, 3] * (train // 4)
    assert data.classes == int(name.removeprefix("cifar"))
    assert data.augment
    for place in [(0, 0, 0, 0), (3, 2, 31, 30), (2, 1, 5, 31)]:
        assert data.validation_images[place] == pixel(*place)
    assert not load_it(DataConfig(name=name, dir=str(tmp_path), augment=False)).augment


def test_cifar_files_that_are_not_there_or_not_right(tmp_path: Path) -> None:
    def refused(message: str, folder: str | None = str(tmp_path)) -> None:
        with pytest.raises(UserError, match=message):
            load_cifar10(DataConfig(name="cifar10", dir=folder))

    refused(r"needs data\.dir.*either set .* downloads \S*cifar-10-binary\.tar\.gz, or set data\.dir", folder=None)
    refused(r"has no data_batch_1\.bin, .* of cifar10: either set")
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "data_batch_4.bin").rename(tmp_path / "away")
    refused(r"has no data_batch_4\.bin")
    (tmp_path / "data_batch_4.bin").write_bytes((tmp_path / "away").read_bytes()[:-1])
    refused(r"data_batch_4\.bin has 12291 bytes, which is no whole number of records of 3073")
    (tmp_path / "data_batch_4.bin").write_bytes(bytes([10]) + bytes(3072))
    refused("a label is 10, expected 0 to 9")


def test_images_are_normalised_for_training_and_validation(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    data = load_cifar100(DataConfig(name="cifar100", dir=str(tmp_path), augment=False))
    assert data.without_images().batch(torch.arange(2), seed=0, step=1)[0].shape == (2, 0, 0, 0)
    mean, deviation = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])
    expected = (data.train_images.permute(0, 2, 3, 1) / 255 - mean) / deviation
    images, labels = data.batch(torch.tensor([2, 0]), seed=0, step=0)
    torch.testing.assert_close(images.permute(0, 2, 3, 1), expected[[2, 0]])
    assert labels.tolist() == [2, 0]
    batches = list(data.validation_batches(3))
    assert [len(each) for _, each in batches] == [3, 1]
    torch.testing.assert_close(torch.cat([each for each, _ in batches]).permute(0, 2, 3, 1), expected)


def test_augmented_images_are_moved_and_mirrored_as_seed_and_step_say(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    data = dataclasses.replace(load_cifar100(DataConfig(name="cifar100", dir=str(tmp_path))), mean=None)
    everything = torch.arange(4).repeat(16)
    images, _ = data.batch(everything, seed=1, step=5)
    assert images.dtype == torch.uint8 and images.shape == (64, 3, 32, 32)
    assert torch.equal(images, data.batch(everything, seed=1, step=5)[0])
    assert not torch.equal(images, data.batch(everything, seed=1, step=6)[0])
    assert not torch.equal(images, data.batch(everything, seed=2, step=5)[0])
    # Each is one of the 162 that there can be of it, and both kinds and many places occur.
    padded = F.pad(data.train_images, [4] * 4)
    found = set()
    for image, sample in zip(images, everything.tolist(), strict=True):
        kinds = [
            (row, column, flipped)
            for row, column, flipped in itertools.product(range(9), range(9), (False, True))
            for cut in [padded[sample, :, row : row + 32, column : column + 32]]
            if torch.equal(image, cut.flip(2) if flipped else cut)
        ]
        assert kinds
        found.add(kinds[0])
    assert {flipped for _, _, flipped in found} == {False, True}
    assert len(found) > 30


def test_cifar_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "files", "cifar100", samples=20)
    words = ["cifar100-v100x4", "data.dir=files", "train.device=cpu", "train.dtype=float32", "train.batch_size=8"]
    words += ["train.steps=3", "parallel.pipe=1", "parallel.data=1", "model.name=small-resnet", "log.every=1"]
    assert main(["train", *words, "train.micro_batches=2", "run.dir=run"]) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["val/loss"] > 0
