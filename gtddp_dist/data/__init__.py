"""Data sets held in memory. A data set is one file here and one line in `gtddp_dist.registry`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["DataSet", "network_input"]


@dataclass(frozen=True)
class DataSet:
    """Images and labels, split into training and validation samples.

    Images have the shape (N, C, H, W) and are either floating point, as the network gets them, or uint8,
    which `network_input` scales to [0, 1]. Labels have the shape (N,) and hold the class, 0 to `classes - 1`.

    Raises `ValueError` where the parts do not fit together.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    classes: int

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

    def without_images(self) -> DataSet:
        """The same data set with images of no pixels, for whoever needs to know how many there are."""
        return replace(
            self,
            train_images=self.train_images.new_empty((len(self.train_images), 0, 0, 0)),
            validation_images=self.validation_images.new_empty((len(self.validation_images), 0, 0, 0)),
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


def network_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as a network takes them: in `dtype`, uint8 pixels scaled from 0..255 to [0, 1]."""
    converted = images.to(dtype)
    return converted / 255 if images.dtype == torch.uint8 else converted
