"""CIFAR-10 and CIFAR-100: colour images of 32 x 32 pixels, read from the *binary* version of the data sets.

The other version that is offered is a pickle, which runs code when it is opened; this one is plain bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config_schema import DataConfig
from ..errors import UserError
from . import DataSet
from .files import Files, Source

PLACE = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32
"""Bytes of an image: all of red, of green, of blue, row by row."""


@dataclass(frozen=True)
class _Version:
    """What the files of a data set are called, and what a record in them is."""

    name: str
    folder: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    label_bytes: int
    """Labels before each image; the last of them is the class."""
    classes: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    """Of the training images' red, green and blue, from 0 to 1."""
    archive: Source


_CIFAR10 = _Version(
    name="cifar10",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    validation=("test_batch.bin",),
    label_bytes=1,
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    deviation=(0.2470, 0.2435, 0.2616),
    archive=Source(f"{PLACE}cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
)
_CIFAR100 = _Version(
    name="cifar100",
    folder="cifar-100-binary",
    train=("train.bin",),
    validation=("test.bin",),
    label_bytes=2,  # the coarse one of 20, then the fine one
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    deviation=(0.2673, 0.2564, 0.2762),
    archive=Source(f"{PLACE}cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
)


def load_cifar10(config: DataConfig) -> DataSet:
    """CIFAR-10: 50,000 training and 10,000 validation images of 10 classes, from `data.dir`."""
    return _load(_CIFAR10, config)


def load_cifar100(config: DataConfig) -> DataSet:
    """CIFAR-100: as many of 100 classes."""
    return _load(_CIFAR100, config)


def _load(version: _Version, config: DataConfig) -> DataSet:
    """Reads the files of `data.dir`, or of the folder in it that the archive makes.

    Raises UserError where they are missing, or are not what they are called.
    """
    found = _files(version).find(config)
    train_images, train_labels = _read(version, found[: len(version.train)])
    validation_images, validation_labels = _read(version, found[len(version.train) :])
    return DataSet(
        name=version.name,
        train_images=train_images,
        train_labels=train_labels,
        validation_images=validation_images,
        validation_labels=validation_labels,
        classes=version.classes,
        mean=version.mean,
        deviation=version.deviation,
        augment=config.augment is not False,
    )


def _files(version: _Version) -> Files:
    return Files(
        data_set=version.name,
        folders=(version.folder, "."),
        names=(*version.train, *version.validation),
        sources=(version.archive,),
        note="the binary version; the Python version is a pickle, which is not read",
    )


def _read(version: _Version, files: list[Path]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) as uint8, and labels (N,)."""
    record = version.label_bytes + PIXELS
    parts = []
    for file in files:
        values = np.fromfile(file, dtype=np.uint8)
        if len(values) == 0 or len(values) % record:
            raise UserError(
                f"{file} has {len(values)} bytes, which is no whole number of records of {record}: it is not of the "
                f"binary version of {version.name}, or was cut short"
            )
        parts.append(values.reshape(-1, record))
    records = np.concatenate(parts)
    labels = records[:, version.label_bytes - 1].astype(np.int64)
    if labels.max() >= version.classes:
        raise UserError(
            f"{files[0].parent}: a label is {labels.max()}, expected 0 to {version.classes - 1}: the files are not "
            f"those of {version.name}"
        )
    images = records[:, version.label_bytes :].reshape(-1, 3, 32, 32)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)
