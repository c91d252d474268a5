"""Data sets held in memory. A data set is one file here and one line in `gtddp_dist.registry`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

__all__ = ["DataSet", "network_input"]

CROP_MARGIN = 4
"""Pixels around an image, black, out of which `augment` cuts."""


@dataclass(frozen=True)
class DataSet:
    """Images and labels, split into training and validation samples.

    Images have the shape (N, C, H, W) and are either floating point, as the network gets them, or uint8,
    which are scaled to [0, 1] when a network gets them; with `mean` and `deviation`, of each channel, they are
    normalised then: (image / 255 - mean) / deviation. Labels have the shape (N,) and hold the class, 0 to
    `classes - 1`. With `augment` training images are moved by up to CROP_MARGIN pixels and, with `mirror`,
    half of them mirrored, at random.

    Raises `ValueError` where the parts do not fit together.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    classes: int
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None
    augment: bool = False
    mirror: bool = True

    def __post_init__(self) -> None:
        for part in ("train", "validation"):
            images: Tensor = getattr(self, f"{part}_images")
            labels: Tensor = getattr(self, f"{part}_labels")
            where = f"data set {self.name!r}: {part}"
            if images.ndim != 4:
                raise ValueError(f"{where}_images has the shape {tuple(images.shape)}, not (N, C, H, W)")
            if not (images.dtype == torch.uint8 or images.dtype.is_floating_point):
                raise ValueError(f"{where}_images is {images.dtype}, not uint8 or floating point")
            if labels.dtype != torch.int64 or labels.shape != (len(images),):
                raise ValueError(
                    f"{where}_labels is {labels.dtype} of the shape {tuple(labels.shape)}, not int64 of the shape "
                    f"({len(images)},)"
                )
            if len(images) == 0:
                raise ValueError(f"{where}_images is empty")
            if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
                raise ValueError(
                    f"{where}_labels has values from {int(labels.min())} to {int(labels.max())}, outside 0 to "
                    f"{self.classes - 1}"
                )
        if self.train_images.shape[1:] != self.validation_images.shape[1:]:
            raise ValueError(
                f"data set {self.name!r}: training images of the shape {tuple(self.train_images.shape[1:])}, "
                f"validation images of {tuple(self.validation_images.shape[1:])}"
            )

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.train_images.shape[2], self.train_images.shape[3]

    def batch(self, indices: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Training images (B, C, H, W), normalised and augmented, and labels (B,) of the samples `indices`.

        What is random in it follows from seed and step, so that a resumed run sees the same images.
        """
        indices = indices.to(self.train_images.device)
        images = self.train_images[indices]
        if self.augment:
            random = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
            images = moved(images, random, mirror=self.mirror)
        return self._normalised(images), self.train_labels[indices]

    def validation_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Validation images (size, C, H, W), normalised, and labels (size,); fewer in the last of them."""
        for images, labels in zip(self.validation_images.split(size), self.validation_labels.split(size), strict=True):
            yield self._normalised(images), labels

    def _normalised(self, images: Tensor) -> Tensor:
        if self.mean is None or self.deviation is None:
            return images
        mean, deviation = (torch.tensor(each, device=images.device) for each in (self.mean, self.deviation))
        return (network_input(images, torch.float32) - mean[:, None, None]) / deviation[:, None, None]

    def without_images(self) -> DataSet:
        """The same data set with images of no pixels, for whoever needs to know how many there are."""
        return replace(
            self,
            train_images=self.train_images.new_empty((len(self.train_images), 0, 0, 0)),
            validation_images=self.validation_images.new_empty((len(self.validation_images), 0, 0, 0)),
            mean=None,
            deviation=None,
            augment=False,
        )

    def to(self, device: torch.device) -> DataSet:
        """The same data set in the memory of `device`."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            validation_images=self.validation_images.to(device),
            validation_labels=self.validation_labels.to(device),
        )


def moved(images: Tensor, random: np.random.Generator, *, mirror: bool) -> Tensor:
    """Each image of (B, C, H, W) cut at a random place out of itself with a black margin; `mirror`: half mirrored."""
    count, channels, height, width = images.shape
    offsets = torch.from_numpy(random.integers(0, 2 * CROP_MARGIN + 1, (2, count))).to(images.device)
    mirrored = torch.from_numpy(random.integers(0, 2, count).astype(bool) & mirror).to(images.device)
    rows = offsets[0][:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = offsets[1][:, None] + torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, [CROP_MARGIN] * 4)
    sample = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def network_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as a network takes them: in `dtype`, uint8 pixels scaled from 0..255 to [0, 1]."""
    converted = images.to(dtype)
    return converted / 255 if images.dtype == torch.uint8 else converted
